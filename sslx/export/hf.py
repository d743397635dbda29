"""A folder that Hugging Face's transformers loads: ``AutoModel.from_pretrained`` and ``AutoImageProcessor``.

The tensors have the names of the checkpoints on Hugging Face's hub, which every version of transformers reads.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sslx.encoders import Encoder, Recipe
from sslx.errors import ConfigError
from sslx.export import limits, plain_conv, plain_vit
from sslx.export.card import quoted
from sslx.export.limits import Rules, refusal
from sslx.export.plain_vit import PlainViT
from sslx.export.preprocessing import of_hugging_face
from sslx.trained import Trained

LIBRARY = "transformers"
_LAYER = r"blocks\.(\d+)\."
_VIT: Rules = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (rf"{_LAYER}norm1\.(\w+)", r"encoder.layer.\1.layernorm_before.\2"),
    (rf"{_LAYER}norm2\.(\w+)", r"encoder.layer.\1.layernorm_after.\2"),
    (rf"{_LAYER}attn\.(query|key|value)\.(\w+)", r"encoder.layer.\1.attention.attention.\2.\3"),
    (rf"{_LAYER}attn\.proj\.(\w+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (rf"{_LAYER}mlp\.fc1\.(\w+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (rf"{_LAYER}mlp\.fc2\.(\w+)", r"encoder.layer.\1.output.dense.\2"),
    (r"norm\.(\w+)", r"layernorm.\1"),
)
_DINOV2: Rules = (
    (r"reg_token", "embeddings.register_tokens"),
    (rf"{_LAYER}(norm[12]|mlp\.fc[12])\.(\w+)", r"encoder.layer.\1.\2.\3"),
    *_VIT,
)
_RESNET: Rules = (
    (r"conv1\.(\w+)", r"embedder.embedder.convolution.\1"),
    (r"bn1\.(\w+)", r"embedder.embedder.normalization.\1"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.(\w+)", lambda m: f"{_block(m)}.shortcut.convolution.{m[3]}"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)", lambda m: f"{_block(m)}.shortcut.normalization.{m[3]}"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.(\w+)", lambda m: f"{_block(m)}.layer.{int(m[3]) - 1}.convolution.{m[4]}"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)", lambda m: f"{_block(m)}.layer.{int(m[3]) - 1}.normalization.{m[4]}"),
)
_CONVNEXT: Rules = (
    (r"stem\.0\.(\w+)", r"embeddings.patch_embeddings.\1"),
    (r"stem\.1\.(\w+)", r"embeddings.layernorm.\1"),
    (r"stages\.(\d)\.downsample\.([01])\.(\w+)", r"encoder.stages.\1.downsampling_layer.\2.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.gamma", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(\w+)", r"encoder.stages.\1.layers.\2.dwconv.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.norm\.(\w+)", r"encoder.stages.\1.layers.\2.layernorm.\3"),
    (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", r"encoder.stages.\1.layers.\2.pwconv\3.\4"),
    (r"head\.norm\.(\w+)", r"layernorm.\1"),
)


def _block(match: Any) -> str:
    return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}"


def write(trained: Trained, folder: Path) -> None:
    """Write ``model.safetensors``, ``config.json``, and ``preprocessor_config.json``.

    Raises ConfigError for an encoder that is not one of transformers', or without transformers.
    """
    limits.require("hf", LIBRARY)
    encoder, channels = trained.encoder, trained.view.channels
    if not channels.is_plain:
        raise ConfigError(
            f"{LIBRARY} prepares images as RGB of 8 bits, and this encoder takes {channels.in_words}: use --to timm, "
            "safetensors or onnx"
        )
    if encoder.kind == "vit":
        config, tensors = _vit(trained, plain_vit.convert(trained, LIBRARY))
    elif plain_conv.is_resnet(encoder):
        config, tensors = _resnet(encoder)
    elif plain_conv.is_convnext(encoder):
        config, tensors = _convnext(encoder)
    else:
        raise limits.unknown(LIBRARY, encoder)
    config["num_channels"] = encoder.recipe.channels
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", of_hugging_face(trained.view))
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _vit(trained: Trained, vit: PlainViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of ViTModel or, for an encoder with registers, of Dinov2WithRegistersModel."""
    tensors = dict(vit.tensors)
    for i in range(vit.depth):
        for kind in ("weight", "bias"):
            parts = tensors.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            names = ("query", "key", "value")
            tensors |= {f"blocks.{i}.attn.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    config: dict[str, Any] = {
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": vit.size,
        "patch_size": vit.patch,
        "layer_norm_eps": plain_vit.EPS,
    }
    if not vit.num_registers:
        config |= {"architectures": ["ViTModel"], "model_type": "vit", "intermediate_size": vit.mlp_width}
        # ViTModel always has a pooler, a linear layer and an activation, which here change nothing.
        pooler = {"pooler.dense.weight": torch.eye(vit.width), "pooler.dense.bias": torch.zeros(vit.width)}
        return config | {"pooler_act": "linear"}, limits.renamed(tensors, _VIT, LIBRARY, trained.encoder) | pooler
    if vit.mlp_width % vit.width:
        raise refusal(LIBRARY, trained.encoder, f"with {vit.mlp_width} channels inside its MLPs")
    config |= {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
    config |= {"mlp_ratio": vit.mlp_width // vit.width, "num_register_tokens": vit.num_registers}
    names = limits.renamed(tensors, _DINOV2, LIBRARY, trained.encoder)
    names["embeddings.mask_token"] = torch.zeros(1, vit.width)  # which only masked images need
    for i in range(vit.depth):
        names |= {f"encoder.layer.{i}.layer_scale{j}.lambda1": torch.ones(vit.width) for j in (1, 2)}
    return config, names


def _resnet(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of ResNetModel."""
    shape = plain_conv.resnet(encoder, LIBRARY)
    trunk: Any = encoder.trunk
    for i, width in enumerate(shape.widths):
        inner = getattr(trunk, f"layer{i + 1}")[0].conv2  # transformers computes its number of channels from the width
        expected = width // 4 if shape.kind == "bottleneck" else width
        if inner.groups != 1 or inner.out_channels != expected:
            raise refusal(LIBRARY, encoder, "with wide or grouped convolutions", also="torchvision")
    config: dict[str, Any] = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "embedding_size": trunk.conv1.out_channels,
        "hidden_sizes": shape.widths,
        "depths": shape.depths,
        "layer_type": shape.kind,
    }
    return config, limits.renamed(encoder.trunk.state_dict(), _RESNET, LIBRARY, encoder)


def _convnext(encoder: Encoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of ConvNextModel."""
    shape, tensors = plain_conv.convnext(encoder, LIBRARY)
    trunk: Any = encoder.trunk
    config: dict[str, Any] = {
        "architectures": ["ConvNextModel"],
        "model_type": "convnext",
        "patch_size": trunk.stem[0].kernel_size[0],
        "hidden_sizes": shape.widths,
        "depths": shape.depths,
        "num_stages": len(shape.depths),
        "layer_norm_eps": plain_vit.EPS,
    }
    return config, limits.renamed(tensors, _CONVNEXT, LIBRARY, encoder)


def recipe(trained: Trained) -> Recipe:
    """Return the recipe of what is written, which for a ViT is that of the plain one."""
    encoder = trained.encoder
    return plain_vit.recipe(encoder, plain_vit.convert(trained, LIBRARY)) if encoder.kind == "vit" else encoder.recipe


def takes_other_sizes(encoder: Encoder) -> bool:
    """Return whether transformers' model takes images of other sizes; a ViT's positions fit one."""
    return encoder.kind != "vit"


class _Features(nn.Module):
    """A model of transformers that returns the features (B, dim), as ``usage`` says."""

    def __init__(self, model: nn.Module, num_prefix: int | None) -> None:
        super().__init__()
        self.model, self.num_prefix = model, num_prefix

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, dim) of images (B, C, H, W)."""
        outputs = self.model(images)
        if self.num_prefix is not None:
            return outputs.last_hidden_state[:, self.num_prefix :].mean(1)
        return outputs.pooler_output.flatten(1)


def read(trained: Trained, folder: Path) -> nn.Module:
    """Return the model as a user of transformers gets it: (B, C, H, W) -> (B, dim)."""
    transformers = import_module(LIBRARY)  # which only this target needs
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    try:
        return _Features(transformers.AutoModel.from_pretrained(folder), _num_prefix(trained.encoder))
    finally:
        logging.enable_progress_bar()


def _num_prefix(encoder: Encoder) -> int | None:
    """Return the number of tokens before the patches of a ViT that pools the patches, and None for any other."""
    if encoder.kind != "vit" or not plain_vit.pools_patches(encoder):
        return None
    trunk: Any = encoder.trunk
    return int(trunk.num_prefix_tokens)


def usage(trained: Trained, folder: Path) -> str:
    """Return the Python code that loads the model and computes the features of images."""
    prefix = _num_prefix(trained.encoder)
    pooled = f"last_hidden_state[:, {prefix}:].mean(1)" if prefix is not None else "pooler_output.flatten(1)"
    return "\n".join(
        [
            "from transformers import AutoModel",
            f"model = AutoModel.from_pretrained({quoted(folder)}).eval()",
            f"features = model(images).{pooled}",
        ]
    )


def preprocessing(_: Trained, folder: Path) -> str:
    """Return the Python code that prepares an image, as PIL opens it."""
    return "\n".join(
        [
            "from transformers import AutoImageProcessor",
            f"processor = AutoImageProcessor.from_pretrained({quoted(folder)})",
            'images = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]',
        ]
    )
