"""Hugging Face DINOv3 (ViT)."""

from torch import Tensor

from sslx.encoders.weights.layouts.base import Layout
from sslx.encoders.weights.layouts.huggingface_vit import ATTENTION


def _mlp_without_gate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the first layer of an MLP as timm does if it has no gate."""
    if any(".mlp.fc1_g." in name for name in tensors):
        return tensors
    return {name.replace(".mlp.fc1_x.", ".mlp.fc1."): value for name, value in tensors.items()}


LAYOUT = Layout(
    marks=(r"embeddings\.patch_embeddings\.weight", r"(?:model\.)?layer\.0\.layer_scale1\.lambda1"),
    renames=(
        (r"^embeddings\.(cls|mask)_token$", r"\1_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^(model\.)?layer\.", "blocks."),
        *ATTENTION,
        (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
        (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
    reshape=_mlp_without_gate,
)
