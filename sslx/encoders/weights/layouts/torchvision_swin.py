"""torchvision Swin and Swin V2."""

import re

from torch import Tensor

from sslx.encoders.weights.layouts.base import Layout, without_key_bias


def _stage(match: re.Match[str]) -> str:
    stage, is_blocks = divmod(int(match[1]), 2)  # features.1, 3, 5, 7 are blocks, and features.2, 4, 6 are between them
    return f"layers.{stage}.blocks.{match[2]}." if is_blocks else f"layers.{stage}.downsample.{match[2]}."


def _biases_of_version_2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the biases of Swin V2: torchvision sets that of the keys to zero when it computes."""
    return without_key_bias(tensors) if any(name.endswith(".logit_scale") for name in tensors) else tensors


LAYOUT = Layout(
    marks=(r"features\.0\.0\.weight", r"features\.1\.0\.attn\.qkv\.weight"),
    renames=(
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (r"^features\.(\d)\.(\w+)\.", _stage),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    ),
    reshape=_biases_of_version_2,
)
