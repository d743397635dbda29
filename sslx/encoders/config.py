"""Settings of an encoder.  This module does not import torch, so that --help and flag errors are fast."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """The encoder that is pretrained."""

    name: str = "resnet18"
    """Any timm model, such as resnet18, resnet50 or vit_small_patch16_224 (timm.list_models() lists them all)."""
    stem: Literal["auto", "imagenet", "small", "narrow"] = "auto"
    """small: 3x3, stride 1, no max-pool.  narrow: like small, as wide as the first stage.  auto: small up to 64 px."""
    weights: str | None = None
    """Initial weights: timm (downloads them), a run, or a file or folder, as in sslx weights FILE.  Default: random."""
    weights_part: str | None = None
    """Encoder to take from a weights file that holds several: teacher, encoder_q, ..."""
    missing: tuple[str, ...] = ()
    """Names, or patterns such as 'norm.*', of the encoder's tensors that the file of --encoder.weights may lack."""
    layers: tuple[int, ...] = ()
    """Blocks per ResNet stage (e.g. 1 1 1 1; 0 drops a stage), or number of ViT blocks (e.g. 6)."""
    channels: tuple[int, ...] = ()
    """Channels per ResNet stage (before a bottleneck's expansion), or a ViT's width."""
    patch: int | None = None
    """Side of a ViT's patches in pixels, instead of the one in its name.  Use 4 for images of 32 px."""
