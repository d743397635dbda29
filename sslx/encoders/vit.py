"""Access to the inside of timm's VisionTransformer: its patch grid, its tokens, and the parts that methods freeze.

Besides ``sslx/export/plain_vit.py``, which writes its parts under other names, no other file depends on how timm's
VisionTransformer works inside.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """The tokens of B images after a ViT's last block, as timm's ``forward_features`` returns them.

    prefix: (B, P, dim), the class token, if there is one, followed by the register tokens; P may be 0.
    patches: (B, N, dim), row by row, or (B, K, dim), in the order of ``keep``.
    """

    prefix: Tensor
    patches: Tensor


def is_vit(trunk: nn.Module) -> bool:
    """Return whether a trunk is timm's VisionTransformer, like its vit_* and deit_* models.

    All functions below expect such a trunk.
    """
    from timm.models.vision_transformer import VisionTransformer  # here: see encoders.build

    return isinstance(trunk, VisionTransformer)


def patch_side(trunk: Any) -> int:
    """Return the side of a patch in image pixels (for a hybrid model, the stride of its convolutions)."""
    return int(trunk.patch_embed.feat_ratio())


def grid(trunk: Any, size: int) -> tuple[int, int]:
    """Return the number of rows and columns of patches in an image with a side of ``size`` pixels."""
    rows, columns = trunk.patch_embed.dynamic_feat_size((size, size))
    return int(rows), int(columns)


def tokens(
    trunk: Any, images: Tensor, *, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None
) -> Tokens:
    """Return the tokens of images (B, C, H, W); see ``Encoder.tokens``."""
    embedded: Tensor = trunk.patch_embed(images)  # (B, N, dim); (B, rows, columns, dim) if timm accepts any size
    num_patches = math.prod(embedded.shape[1:-1])
    _check(images, num_patches, keep, mask, mask_token)
    if mask is not None and mask_token is not None:
        is_masked = mask.view(embedded.shape[:-1])[..., None]
        embedded = torch.where(is_masked, mask_token.to(embedded.dtype).view(-1), embedded)
    # timm's method knows which prefix tokens there are, which of them have positions, and how to interpolate positions.
    sequence: Tensor = trunk._pos_embed(embedded)  # (B, P + N, dim)
    num_prefix = sequence.shape[1] - num_patches
    if keep is not None:
        prefix = torch.arange(num_prefix, device=keep.device).expand(len(keep), -1)
        indices = torch.cat([prefix, num_prefix + keep], 1)
        sequence = sequence.take_along_dim(indices[..., None], 1)
    sequence = trunk.norm(trunk.blocks(trunk.norm_pre(sequence)))
    return Tokens(*sequence.split([num_prefix, sequence.shape[1] - num_prefix], 1))


def _check(
    images: Tensor, num_patches: int, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None
) -> None:
    """Raise ValueError if ``keep`` or ``mask`` does not fit the images."""
    num_images = len(images)
    if keep is not None and (keep.ndim != 2 or len(keep) != num_images or keep.dtype != torch.int64):
        raise ValueError(
            f"expected keep to be int64 of shape ({num_images}, K), got {keep.dtype} of shape {tuple(keep.shape)}"
        )
    if mask is not None and (mask.shape != (num_images, num_patches) or mask.dtype != torch.bool):
        raise ValueError(
            f"expected mask to be bool of shape ({num_images}, {num_patches}), "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if (mask is None) != (mask_token is None):
        raise ValueError("expected both mask and mask_token or neither, got only one")


def has_last_norm(trunk: Any) -> bool:
    """Return whether a final norm is applied to the tokens; many mean-pooling ViTs apply it after pooling instead."""
    return not isinstance(trunk.norm, nn.Identity)


def freeze_pooling(trunk: Any) -> None:
    """Freeze the parameters after the tokens: the norm of pooled features and attention pooling."""
    for module in (trunk.fc_norm, trunk.attn_pool):
        if module is not None:
            module.requires_grad_(False)


def freeze_patch_projection(trunk: Any) -> None:
    """Freeze the linear patch projection."""
    trunk.patch_embed.proj.requires_grad_(False)
