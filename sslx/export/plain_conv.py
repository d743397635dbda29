"""The shapes of timm's ResNets and ConvNeXts, as far as other libraries have models of the same kind."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sslx.encoders import Encoder
from sslx.export import limits
from sslx.export.limits import refusal


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The four stages of a trunk: numbers of blocks and of output channels.

    kind: the kind of a ResNet's blocks, or "convnext".
    """

    kind: Literal["basic", "bottleneck", "convnext"]
    depths: list[int]
    widths: list[int]


def is_resnet(encoder: Encoder) -> bool:
    """Return whether the trunk is a ResNet of timm."""
    from timm.models.resnet import ResNet  # inside the function: see encoders.build

    return type(encoder.trunk) is ResNet


def is_convnext(encoder: Encoder) -> bool:
    """Return whether the trunk is a ConvNeXt of timm."""
    from timm.models.convnext import ConvNeXt  # inside the function: see encoders.build

    return type(encoder.trunk) is ConvNeXt


def resnet(encoder: Encoder, library: str) -> Shape:
    """Return the shape of a ResNet.  Raise ConfigError for one with parts that no other library has."""
    from timm.models.resnet import BasicBlock, Bottleneck  # inside the function: see encoders.build

    limits.check_stem_and_norm(library, encoder)
    trunk: Any = encoder.trunk
    stages: list[list[Any]] = [list(getattr(trunk, f"layer{i}", ())) for i in (1, 2, 3, 4)]
    if not all(stages):
        raise refusal(library, encoder, "with a stage without blocks")
    kinds = {type(block) for stage in stages for block in stage}
    if kinds not in ({BasicBlock}, {Bottleneck}):
        raise refusal(library, encoder, "with its kind of blocks")
    if not isinstance(trunk.conv1, nn.Conv2d) or not isinstance(trunk.maxpool, nn.MaxPool2d):
        raise refusal(library, encoder, "with its stem")
    if not all(isinstance(block.act1, nn.ReLU) for stage in stages for block in stage):
        raise refusal(library, encoder, "with its activation")
    kind = "basic" if kinds == {BasicBlock} else "bottleneck"
    last = "conv2" if kind == "basic" else "conv3"
    widths = [getattr(stage[-1], last).out_channels for stage in stages]
    return Shape(kind=kind, depths=[len(stage) for stage in stages], widths=widths)


def convnext(encoder: Encoder, library: str) -> tuple[Shape, dict[str, Tensor]]:
    """Return the shape of a ConvNeXt and its tensors, with linear layers for convolutions of kernel size 1.

    Raise ConfigError for one with parts that no other library has.
    """
    trunk: Any = encoder.trunk
    stages = [list(stage.blocks) for stage in trunk.stages]
    if not all(limits.is_gelu(block.mlp.act) for stage in stages for block in stage):
        raise refusal(library, encoder, "with its activation")
    tensors = {
        name: value.clone().flatten(1) if name.endswith((".fc1.weight", ".fc2.weight")) else value.clone()
        for name, value in trunk.state_dict().items()
    }
    widths = [stage[-1].conv_dw.out_channels for stage in stages]
    return Shape(kind="convnext", depths=[len(stage) for stage in stages], widths=widths), tensors
