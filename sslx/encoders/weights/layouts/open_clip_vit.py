"""open_clip and OpenAI CLIP: the ViT of the visual tower."""

from torch import Tensor

from sslx.encoders.weights.layouts.base import Layout


def _batch_of_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the class token and the positions the dimension of the batch that they have in timm."""
    return {
        name: value.reshape(1, -1, value.shape[-1]) if name in ("cls_token", "pos_embed") else value
        for name, value in tensors.items()
    }


LAYOUT = Layout(
    marks=("class_embedding", r"transformer\.resblocks\.0\.ln_1\.weight"),
    renames=(
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        (r"\.ls_([12])\.", r".ls\1."),
        (r"^proj$", "projection"),
    ),
    reshape=_batch_of_one,
)
