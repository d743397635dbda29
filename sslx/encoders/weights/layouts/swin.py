"""The official code of Swin and of what builds on it (SimMIM, EsViT)."""

from sslx.encoders.weights.layouts.base import Layout
from sslx.encoders.weights.layouts.huggingface_swin import SHIFTED

LAYOUT = Layout(
    marks=(r"layers\.0\.blocks\.0\.attn\.qkv\.weight", r"layers\.0\.downsample\.reduction\.weight"),
    renames=(SHIFTED,),
)
