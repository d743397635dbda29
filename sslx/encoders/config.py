"""The settings of an encoder.  Imports no torch, for help and flags."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk whose features are pretrained."""

    name: str = "resnet18"
    """Any timm model: resnet18, resnet50, vit_small_patch16_224, ... (timm.list_models() lists them)."""
    stem: Literal["auto", "imagenet", "small", "narrow"] = "auto"
    """small: 3x3, stride 1, no max-pool; narrow: small and as narrow as the first stage; auto: small up to 64 px."""
    weights: str | None = None
    """Initial weights: timm (downloads its own), a run folder, or a .pt, .pth or .safetensors file; else random."""
    weights_part: str | None = None
    """Which encoder of the file to take if it holds several: teacher, encoder_q, ..."""
    layers: tuple[int, ...] = ()
    """Blocks per ResNet stage (e.g. 1 1 1 1; 0 drops a stage), or number of ViT blocks (e.g. 6)."""
    channels: tuple[int, ...] = ()
    """Channels per ResNet stage (before a bottleneck's expansion), or the width of a ViT."""
    patch: int | None = None
    """Side of a ViT's patches in pixels, if not the one in its name: 4 suits images of 32 px."""
