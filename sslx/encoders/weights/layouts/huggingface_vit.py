"""Hugging Face ViT, ViTMAE and I-JEPA."""

from sslx.encoders.weights.layouts.base import Layout

NAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls|mask)_token$", r"\1_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
ATTENTION = (  # as files have it, and as models of transformers 5 have it in memory
    (r"\.attention\.(attention\.query|self\.query|q_proj)\.", ".attn.qkv[0]."),
    (r"\.attention\.(attention\.key|self\.key|k_proj)\.", ".attn.qkv[1]."),
    (r"\.attention\.(attention\.value|self\.value|v_proj)\.", ".attn.qkv[2]."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
LAYOUT = Layout(
    marks=(
        r"embeddings\.patch_embeddings\.projection\.weight",
        r"(?:encoder\.layer|layers)\.0\.layernorm_before\.weight",
    ),
    renames=(*NAMES, *ATTENTION),
)
