"""Hugging Face BEiT and data2vec-vision."""

from sslx.encoders.weights.layouts.base import Layout
from sslx.encoders.weights.layouts.huggingface_vit import ATTENTION, NAMES

LAYOUT = Layout(
    marks=(r"embeddings\.patch_embeddings\.projection\.weight", r"(?:encoder\.layer|layers)\.0\.lambda_1"),
    renames=(
        *NAMES,
        (r"^(blocks\.\d+)(\.attention)*\.relative_position_bias\.", r"\1.attn."),
        (r"^((encoder\.)?relative|shared)_position_bias\.", "rel_pos_bias."),
        *ATTENTION,
        (r"\.lambda_([12])$", r".gamma_\1"),
        (r"^pooler\.layernorm\.", "fc_norm."),
    ),
)
