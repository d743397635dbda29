"""Hugging Face DINOv2, with and without register tokens."""

from sslx.encoders.weights.layouts.base import Layout, class_position_into_token
from sslx.encoders.weights.layouts.huggingface_vit import ATTENTION, NAMES

LAYOUT = Layout(
    marks=(r"embeddings\.patch_embeddings\.projection\.weight", r"encoder\.layer\.0\.layer_scale1\.lambda1"),
    renames=(
        *NAMES,
        *ATTENTION,
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1[0]."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1[1]."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
    reshape=class_position_into_token,
)
