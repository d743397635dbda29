"""Architectures: which of timm's models has tensors of these names and shapes, as a recipe with its arguments."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sslx.encoders import trunk
from sslx.encoders.recipe import Recipe

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]
"""The content of a ``config.json`` of Hugging Face or timm; empty without one."""
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge",
         (1408, 40): "giant", (1536, 40): "giant", (1664, 48): "gigantic"}  # fmt: skip
_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Number of heads of the widths at which a head does not have 64 channels."""
_DINOV3 = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 4096: "7b"}
_RESNETS: dict[str, tuple[bool, tuple[int, ...]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
_CLIP_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (4, 6, 10, 6): "resnet50x4",
    (6, 8, 18, 8): "resnet50x16",
    (3, 15, 36, 10): "resnet50x64",
}
_CONVNEXTS: dict[tuple[int, tuple[int, ...]], str] = {
    (40, (2, 2, 6, 2)): "atto",
    (48, (2, 2, 6, 2)): "femto",
    (64, (2, 2, 6, 2)): "pico",
    (80, (2, 2, 8, 2)): "nano",
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
}
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
_ATTENTION = (".attn.qkv.weight", ".attn.q_proj.weight")


def recipe(shapes: Shapes, settings: Settings) -> Recipe | None:
    """Return the recipe of the timm model whose tensors have these names and shapes, or None if it is not known.

    The number of heads of a ViT cannot be seen in its tensors: it is that of the settings or of timm's model of this
    width.  The side of the images of a convolutional model is 224 pixels, or 32 with the stem for small images.
    """
    for architecture in (_configured, _vit, _dinov3, _beit, _resnet, _clip_resnet, _convnext, _swin):
        with suppress(
            LookupError, ValueError, TypeError, AttributeError
        ):  # a file that has only some of the names, or shapes of something else
            if found := architecture(shapes, settings):
                return found
    return None


def is_of_timm(settings: Settings) -> bool:
    """Return whether the settings are those of timm, which name its model."""
    name = settings.get("architecture")
    return isinstance(name, str) and trunk.import_timm().is_model(name)


def _configured(shapes: Shapes, settings: Settings) -> Recipe | None:
    """Return the recipe of the model that timm's settings name, which may be any of its models."""
    if not is_of_timm(settings) or not shapes:
        return None
    channels, side, _ = settings.get("pretrained_cfg", settings)["input_size"]
    arguments = {"img_size": side, **settings.get("model_args", {})}
    channels = arguments.pop("in_chans", channels)
    arguments.pop("num_classes", None)
    return Recipe(name=settings["architecture"], size=side, channels=channels, arguments=arguments)


def _count(shapes: Shapes, pattern: str) -> int:
    """Return one more than the largest number that the pattern finds in a name; 0 if it finds none."""
    return max((int(match[1]) + 1 for name in shapes if (match := re.match(pattern, name))), default=0)


def _counts(shapes: Shapes, pattern: str, stages: range) -> tuple[int, ...]:
    return tuple(_count(shapes, pattern.format(stage)) for stage in stages)


def _patches(shapes: Shapes) -> tuple[int, int, int] | None:
    """Return the width, the channels of the images and the side of the patches; None if this is not a ViT."""
    weight = shapes.get("patch_embed.proj.weight", ())
    has_blocks = any(f"blocks.0{name}" in shapes for name in _ATTENTION)
    return weight[:3] if has_blocks and len(weight) == 4 and weight[2] == weight[3] else None


def _transformer_arguments(shapes: Shapes, settings: Settings, width: int, patch: int) -> dict[str, Any]:
    """Return the arguments of all of timm's ViTs, except for the side of the images."""
    first, last = (shapes.get(f"blocks.0.mlp.{name}.weight", (0, 0)) for name in ("fc1", "fc2"))
    num_hidden = first[0] or last[1]
    arguments = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count(shapes, r"blocks\.(\d+)\."),
        "num_heads": settings.get("num_attention_heads") or _HEADS.get(width) or max(1, width // 64),
    }
    # timm rounds the product of the ratio and the width down
    return arguments if num_hidden == last[1] == 4 * width else {**arguments, "mlp_ratio": (num_hidden + 0.5) / width}


def _vit(shapes: Shapes, settings: Settings) -> Recipe | None:
    positions = shapes.get("pos_embed", ())
    found = _patches(shapes)
    if not found or len(positions) != 3 or "blocks.0.norm1.weight" not in shapes or "blocks.0.gamma_1" in shapes:
        return None
    width, channels, patch = found
    arguments = _transformer_arguments(shapes, settings, width, patch)
    size = _VITS.get((width, arguments["depth"]), "base")
    has_class, num_registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0))[1]
    first, last = shapes["blocks.0.mlp.fc1.weight"], shapes["blocks.0.mlp.fc2.weight"]
    if "blocks.0.ls1.gamma" in shapes:
        size = "giant" if first[0] != last[1] else size if size != "tiny" else "small"
        name = f"vit_{size}_patch14_{'reg4_' if num_registers else ''}dinov2"
    elif "norm_pre.weight" in shapes:
        kind = "clip_quickgelu_224" if settings.get("quick_gelu") else "clip_224"
        name = _first_model(f"vit_{size}_patch{patch}_{kind}", f"vit_base_patch16_{kind}")
    elif not has_class:
        name = "vit_huge_patch14_gap_224"
    else:
        name = _first_model(f"vit_{size}_patch{patch}_224", "vit_base_patch16_224")
    if num_registers not in (0, 4):
        arguments["reg_tokens"] = num_registers
    if "blocks.0.attn.qkv.bias" not in shapes:
        arguments["qkv_bias"] = False
    if has_class and "fc_norm.weight" in shapes:
        arguments["global_pool"] = "avg"
    num_prefix = has_class if "reg_token" not in shapes else 0
    side = math.isqrt(positions[1] - num_prefix) * patch
    return Recipe(name=name, size=side, channels=channels, arguments={**arguments, "img_size": side})


def _first_model(*names: str) -> str:
    """Return the first name of a model that timm has."""
    is_model = trunk.import_timm().is_model
    return next(name for name in names if is_model(name))


def _dinov3(shapes: Shapes, settings: Settings) -> Recipe | None:
    found = _patches(shapes)
    if not found or "reg_token" not in shapes or "blocks.0.gamma_1" not in shapes:
        return None
    width, channels, patch = found
    size = _DINOV3.get(width, "base")
    if "blocks.0.mlp.fc1_g.weight" in shapes and size != "7b":
        size = "small_plus" if size == "small" else "huge_plus"
    with_bias = _first_model(f"vit_{size}_patch16_dinov3_qkvb", f"vit_{size}_patch16_dinov3")
    name = with_bias if "blocks.0.attn.q_bias" in shapes else f"vit_{size}_patch16_dinov3"
    arguments = _transformer_arguments(shapes, settings, width, patch)
    side = int(settings.get("image_size") or 14 * patch)
    return Recipe(name=name, size=side, channels=channels, arguments={**arguments, "img_size": side})


def _beit(shapes: Shapes, settings: Settings) -> Recipe | None:
    found = _patches(shapes)
    tables = [shape for name, shape in shapes.items() if name.endswith("relative_position_bias_table")]
    if not found or not tables or "blocks.0.gamma_1" not in shapes:
        return None
    width, channels, patch = found
    arguments = _transformer_arguments(shapes, settings, width, patch)
    arguments["num_heads"] = tables[0][1]
    if "rel_pos_bias.relative_position_bias_table" in shapes:
        arguments |= {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
    side = (math.isqrt(tables[0][0] - 3) + 1) // 2 * patch
    size = "large" if arguments["depth"] == 24 else "base"
    name = f"beit_{size}_patch16_224"
    return Recipe(name=name, size=side, channels=channels, arguments={**arguments, "img_size": side})


def _resnet(shapes: Shapes, settings: Settings) -> Recipe | None:
    del settings
    stem = shapes.get("conv1.weight", ())
    if len(stem) != 4 or "layer1.0.conv1.weight" not in shapes:
        return None
    layers = _counts(shapes, r"layer{}\.(\d+)\.conv1\.weight", range(1, 5))
    is_bottleneck = "layer1.0.conv3.weight" in shapes
    width = shapes["layer1.0.conv1.weight"][0]
    widths: list[int] = []
    for stage in range(1, 5):
        width = shapes.get(f"layer{stage}.0.conv1.weight", (width,))[0]  # a stage without layers may have any
        widths.append(width)
    name = next(
        (name for name, kind in _RESNETS.items() if kind == (is_bottleneck, layers)),
        "resnet50" if is_bottleneck else "resnet18",
    )
    arguments: dict[str, Any] = {}
    if is_bottleneck and widths == [128, 256, 512, 1024]:
        grouped = shapes["layer1.0.conv2.weight"][1]
        wide = {128: {50: "wide_resnet50_2", 101: "wide_resnet101_2"}, 4: {50: "resnext50_32x4d"}}
        name = wide.get(grouped, {}).get(int(name.removeprefix("resnet")), name)
    elif widths != [64, 128, 256, 512]:
        arguments["channels"] = widths
    if layers != _RESNETS.get(name, (True, layers))[1]:
        arguments["layers"] = list(layers)
    kind = "imagenet" if stem[2] == 7 else "small" if stem[0] == 64 else "narrow"
    if kind == "narrow":
        arguments |= {"stem_type": "deep", "stem_width": widths[0] // 2}
    norm = "batch" if "bn1.running_mean" in shapes else "group"
    size = 224 if kind == "imagenet" else 32
    return Recipe(name=name, size=size, stem=kind, norm=norm, channels=stem[1], arguments=arguments)


def _clip_resnet(shapes: Shapes, settings: Settings) -> Recipe | None:
    del settings
    layers = _counts(shapes, r"stages\.{}\.(\d+)\.conv1_1x1\.conv\.weight", range(4))
    if layers not in _CLIP_RESNETS or len(stem := shapes.get("stem.conv1.conv.weight", ())) != 4:
        return None
    name, width = f"{_CLIP_RESNETS[layers]}_clip_gap", shapes["stages.0.0.conv1_1x1.conv.weight"][0]
    usual = {"resnet50x4": 80, "resnet50x16": 96, "resnet50x64": 128}.get(_CLIP_RESNETS[layers], 64)
    arguments: dict[str, Any] = {} if width == usual else {"width_factor": width / 64}
    size = 224
    if positions := shapes.get("head.pos_embed"):  # of the attention that pools the last feature map
        name, size = name.removesuffix("_gap"), 32 * math.isqrt(positions[0] - 1)
        arguments["img_size"] = size
    return Recipe(name=name, size=size, channels=stem[1], arguments=arguments)


def _convnext(shapes: Shapes, settings: Settings) -> Recipe | None:
    del settings
    stem = shapes.get("stem.0.weight", ())
    if len(stem) != 4 or "stages.0.blocks.0.conv_dw.weight" not in shapes:
        return None
    stages = range(_count(shapes, r"stages\.(\d+)\."))
    depths = _counts(shapes, r"stages\.{}\.blocks\.(\d+)\.", stages)
    dims = tuple(shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in stages)
    family = "convnextv2" if "stages.0.blocks.0.mlp.grn.weight" in shapes else "convnext"
    doubled = tuple(dims[0] * 2**stage for stage in stages)
    size = _CONVNEXTS.get((dims[0], depths)) if dims == doubled else None
    arguments: dict[str, Any] = {"patch_size": stem[2]} if stem[2] != 4 else {}
    if size is None:
        arguments |= {"depths": list(depths), "dims": list(dims)}
    name = _first_model(f"{family}_{size}", f"{family}_tiny")
    return Recipe(name=name, size=224, channels=stem[1], arguments=arguments)


def _swin(shapes: Shapes, settings: Settings) -> Recipe | None:
    weight = shapes.get("patch_embed.proj.weight", ())
    if len(weight) != 4 or "layers.0.blocks.0.attn.qkv.weight" not in shapes:
        return None
    width, channels, patch = weight[:3]
    stages = range(_count(shapes, r"layers\.(\d+)\."))
    depths = _counts(shapes, r"layers\.{}\.blocks\.(\d+)\.", stages)
    attention = "layers.{}.blocks.0.attn."
    is_second = f"{attention.format(0)}logit_scale" in shapes
    if is_second:
        heads = [shapes[f"{attention.format(stage)}logit_scale"][0] for stage in stages]
        span = shapes.get(f"{attention.format(0)}relative_coords_table", (1, 0))[1]
    else:
        heads = [shapes[f"{attention.format(stage)}relative_position_bias_table"][1] for stage in stages]
        span = math.isqrt(shapes[f"{attention.format(0)}relative_position_bias_table"][0])
    window = (span + 1) // 2 if span else int(settings.get("window_size") or 8)
    size = _SWINS.get((width, depths), "tiny")
    family = f"swinv2_{size}_window8_256" if is_second else f"swin_{size}_patch4_window7_224"
    if is_second and size == "large":
        family = "swinv2_large_window12_192"
    side = int(settings.get("image_size") or window * patch * 2 ** (len(stages) - 1))
    arguments = {"patch_size": patch, "embed_dim": width, "depths": list(depths), "num_heads": heads,
                 "window_size": window, "img_size": side}  # fmt: skip
    return Recipe(name=family, size=side, channels=channels, arguments=arguments)
