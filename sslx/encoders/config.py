"""The settings of an encoder.  Imports no torch, for help and flags."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk whose features are pretrained."""

    name: str = "resnet18"
    """Any timm model: resnet18, resnet50, vit_small_patch16_224, ...; timm.list_models() lists them."""
    stem: Literal["auto", "imagenet", "small", "narrow"] = "auto"
    """small: 3x3, stride 1, no max-pool; narrow: so, and as wide as the first stage; auto: small up to 64 px."""
    weights: str | None = None
    """timm (its own, downloaded), a run folder of sslx, or a .pt, .pth or .safetensors file; None: random."""
    weights_part: str | None = None
    """Where in the file the encoder is, where that holds several: teacher, encoder_q, ..."""
    layers: tuple[int, ...] = ()
    """Blocks of each stage, for a ResNet other than its name's (1 1 1 1; 0: no such stage), or of a whole ViT (6)."""
    channels: tuple[int, ...] = ()
    """Channels of each stage of such a ResNet (before a bottleneck's expansion), or the width of a ViT."""
    patch: int | None = None
    """Side of a ViT's patches in pixels, where not its name's: 4 for images of 32 px."""
