"""Hugging Face Swin and Swin V2."""

import re

from sslx.encoders.weights.layouts.base import Layout
from sslx.encoders.weights.layouts.huggingface_vit import ATTENTION, NAMES


def _downsample(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample."  # timm's stages begin with it, the others' end with it


SHIFTED = (r"^layers\.(\d+)\.downsample\.", _downsample)
LAYOUT = Layout(
    marks=(
        r"embeddings\.patch_embeddings\.projection\.weight",
        r"encoder\.layers\.0\.blocks\.0\.layernorm_before\.weight",
    ),
    renames=(
        (r"^encoder\.layers\.", "layers."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        *((pattern, new) for pattern, new in NAMES if "layers" not in pattern),
        (r"\.attention\.(self\.)?relative_position_bias\.", ".attn."),
        (r"\.attention\.self\.(relative_position_\w+|logit_scale)", r".attn.\1"),
        (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
        *ATTENTION,
        SHIFTED,
    ),
)
