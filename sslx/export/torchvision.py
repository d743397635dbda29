"""A state dict that a model of torchvision loads, with its classifier replaced by ``torch.nn.Identity``."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslx.encoders import Encoder, Recipe
from sslx.export import limits, plain_conv, plain_vit
from sslx.export.card import quoted
from sslx.export.limits import Rules, refusal
from sslx.trained import Trained

FILE = "model.pth"
_VIT: Rules = (
    (r"cls_token", "class_token"),
    (r"pos_embed", "encoder.pos_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"conv_proj.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.encoder_layer_\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"encoder.layers.encoder_layer_\1.mlp.3.\2"),
    (r"norm\.(\w+)", r"encoder.ln.\1"),
)


def _place(stage: re.Match[str], offset: int) -> str:
    """Return the place of a ConvNeXt's stage, or of what stands before it, in torchvision's list of both."""
    return f"features.{2 * int(stage[1]) + offset}"


_CONVNEXT: Rules = (
    (r"stem\.([01])\.(\w+)", r"features.0.\1.\2"),
    (r"stages\.(\d)\.downsample\.([01])\.(\w+)", lambda m: f"{_place(m, 0)}.{m[2]}.{m[3]}"),
    (r"stages\.(\d)\.blocks\.(\d+)\.gamma", lambda m: f"{_place(m, 1)}.{m[2]}.layer_scale"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(\w+)", lambda m: f"{_place(m, 1)}.{m[2]}.block.0.{m[3]}"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm\.(\w+)", lambda m: f"{_place(m, 1)}.{m[2]}.block.2.{m[3]}"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc1\.(\w+)", lambda m: f"{_place(m, 1)}.{m[2]}.block.3.{m[3]}"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc2\.(\w+)", lambda m: f"{_place(m, 1)}.{m[2]}.block.5.{m[3]}"),
    (r"head\.norm\.(\w+)", r"classifier.0.\1"),
)


def write(trained: Trained, folder: Path) -> None:
    """Write ``model.pth``, a state dict by torchvision's names.

    Raises ConfigError for an encoder that is not one of torchvision's.
    """
    limits.save(_tensors(trained), folder / FILE)


def _tensors(trained: Trained) -> dict[str, Tensor]:
    """Return the tensors by torchvision's names.  Raise ConfigError unless torchvision's model has the same ones."""
    encoder = trained.encoder
    if encoder.recipe.channels != 3:
        raise refusal("torchvision", encoder, f"for {encoder.recipe.channels} channels", also="hf")
    with torch.random.fork_rng(devices=[]):
        expected = _model(trained).state_dict()
    if encoder.kind == "vit":
        tensors = limits.renamed(_vit(trained).tensors, _VIT, "torchvision", encoder)
    elif plain_conv.is_convnext(encoder):
        tensors = limits.renamed(plain_conv.convnext(encoder, "torchvision")[1], _CONVNEXT, "torchvision", encoder)
        tensors |= {name: value[:, None, None] for name, value in tensors.items() if name.endswith(".layer_scale")}
    else:
        tensors = {name: value.contiguous() for name, value in encoder.trunk.state_dict().items()}
    for name in [*tensors, *expected]:
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape:
            if "channels" in encoder.recipe.arguments:
                raise refusal("torchvision", encoder, "with other widths", also="hf")
            raise refusal("torchvision", encoder, f"with its {name}")
    return tensors


def _vit(trained: Trained) -> plain_vit.PlainViT:
    vit = plain_vit.convert(trained, "torchvision")
    if vit.num_registers or vit.pools_patches:
        feature = "with register tokens" if vit.num_registers else "with its pooling (avg)"
        raise refusal("torchvision", trained.encoder, feature, also="hf")
    return vit


def _model(trained: Trained) -> Any:
    """Return torchvision's model, without its classifier, with new weights."""
    from torchvision import models  # inside the function: it takes a second
    from torchvision.models import convnext, resnet

    name, arguments, classifier = _constructor(trained)
    if name == "ResNet":
        arguments = {**arguments, "block": getattr(resnet, arguments["block"])}
    if name == "ConvNeXt":
        arguments = {"block_setting": [convnext.CNBlockConfig(*stage) for stage in arguments["block_setting"]]}
    model: Any = getattr(models, name)(**arguments)
    if classifier == "classifier[2]":
        model.classifier[2] = nn.Identity()
    else:
        setattr(model, classifier, nn.Identity())
    return model


def _constructor(trained: Trained) -> tuple[str, dict[str, Any], str]:
    """Return the name of torchvision's class or function, its arguments, and the name of its classifier."""
    from torchvision import models  # inside the function: it takes a second

    encoder = trained.encoder
    name = encoder.recipe.name.partition(".")[0]
    if encoder.kind == "vit":
        vit = _vit(trained)
        arguments = {"image_size": vit.size, "patch_size": vit.patch, "num_layers": vit.depth}
        arguments |= {"num_heads": vit.num_heads, "hidden_dim": vit.width, "mlp_dim": vit.mlp_width}
        return "VisionTransformer", arguments, "heads"
    if plain_conv.is_convnext(encoder):
        shape, _ = plain_conv.convnext(encoder, "torchvision")
        after = [*shape.widths[1:], None]
        return "ConvNeXt", {"block_setting": list(zip(shape.widths, after, shape.depths, strict=True))}, "classifier[2]"
    if not plain_conv.is_resnet(encoder):
        raise limits.unknown("torchvision", encoder)
    shape = plain_conv.resnet(encoder, "torchvision")
    if hasattr(models, name) and "layers" not in encoder.recipe.arguments:
        return name, {}, "fc"
    if shape.kind == "basic":
        return "ResNet", {"block": "BasicBlock", "layers": shape.depths}, "fc"
    trunk: Any = encoder.trunk
    inner = trunk.layer1[0].conv2
    width = 64 * inner.out_channels // (shape.widths[0] // 4 * inner.groups)
    groups = {} if (inner.groups, width) == (1, 64) else {"groups": inner.groups, "width_per_group": width}
    return "ResNet", {"block": "Bottleneck", "layers": shape.depths, **groups}, "fc"


def recipe(trained: Trained) -> Recipe:
    """Return the recipe of what is written, which for a ViT is that of the plain one."""
    encoder = trained.encoder
    return (
        plain_vit.recipe(encoder, plain_vit.convert(trained, "torchvision"))
        if encoder.kind == "vit"
        else encoder.recipe
    )


def takes_other_sizes(encoder: Encoder) -> bool:
    """Return whether torchvision's model takes images of other sizes: all but ViTs do."""
    return encoder.kind != "vit"


def read(trained: Trained, folder: Path) -> nn.Module:
    """Return the model as a user of torchvision gets it: (B, 3, H, W) -> (B, dim)."""
    model: nn.Module = _model(trained)
    model.load_state_dict(torch.load(folder / FILE, weights_only=True), strict=True)
    return model


def usage(trained: Trained, folder: Path) -> str:
    """Return the Python code that loads the model and computes the features of images."""
    name, arguments, classifier = _constructor(trained)
    values = {key: repr(value) for key, value in arguments.items()}
    if name == "ResNet":
        values["block"] = f"torchvision.models.resnet.{arguments['block']}"
    if name == "ConvNeXt":
        stages = ", ".join(f"stage{stage}" for stage in arguments["block_setting"])
        values["block_setting"] = f"[{stages}]"
    call = f"torchvision.models.{name}({', '.join(f'{key}={value}' for key, value in values.items())})"
    return "\n".join(
        [
            "import torch, torchvision",
            *(["stage = torchvision.models.convnext.CNBlockConfig"] if name == "ConvNeXt" else []),
            f"model = {call}.eval()",
            f"model.{classifier} = torch.nn.Identity()",
            f"model.load_state_dict(torch.load({quoted(folder / FILE)}))",
            "features = model(images)",
        ]
    )
