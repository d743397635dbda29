"""The inside of a plain vision transformer: its grid of patches, its tokens, and parts of it that a method freezes.

This is the only file that knows how timm's VisionTransformer works inside.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """The tokens of B images after a ViT's last block, as ``forward_features`` of timm gives them.

    prefix: (B, P, dim), the class token (first, where there is one), then the register tokens; P may be 0.
    patches: (B, N, dim), row by row; or (B, K, dim), in the order of ``keep``.
    """

    prefix: Tensor
    patches: Tensor


def is_vit(trunk: nn.Module) -> bool:
    """Whether a trunk is timm's VisionTransformer, as its vit_* and deit_* models are; the functions below take one."""
    from timm.models.vision_transformer import VisionTransformer  # here: see encoders.build

    return isinstance(trunk, VisionTransformer)


def patch_side(trunk: Any) -> int:
    """The side of a patch in pixels of the image; of a hybrid, the stride of its convolutions."""
    return int(trunk.patch_embed.feat_ratio())


def grid(trunk: Any, size: int) -> tuple[int, int]:
    """The number of rows and columns of patches in an image with a side of ``size`` pixels."""
    rows, columns = trunk.patch_embed.dynamic_feat_size((size, size))
    return int(rows), int(columns)


def tokens(
    trunk: Any, images: Tensor, *, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None
) -> Tokens:
    """The tokens of images (B, C, H, W); see ``Encoder.tokens``."""
    embedded: Tensor = trunk.patch_embed(images)  # (B, N, dim), or (B, rows, columns, dim) where timm takes any size
    num_patches = math.prod(embedded.shape[1:-1])
    _check(images, num_patches, keep, mask, mask_token)
    if mask is not None and mask_token is not None:
        is_masked = mask.view(embedded.shape[:-1])[..., None]
        embedded = torch.where(is_masked, mask_token.to(embedded.dtype).view(-1), embedded)
    # timm's own: it knows which tokens come first, which of them have a position, and how to interpolate positions.
    sequence: Tensor = trunk._pos_embed(embedded)  # (B, P + N, dim)
    num_prefix = sequence.shape[1] - num_patches
    if keep is not None:
        prefix = torch.arange(num_prefix, device=keep.device).expand(len(keep), -1)
        places = torch.cat([prefix, num_prefix + keep], 1)
        sequence = sequence.take_along_dim(places[..., None], 1)
    sequence = trunk.norm(trunk.blocks(trunk.norm_pre(sequence)))
    return Tokens(*sequence.split([num_prefix, sequence.shape[1] - num_prefix], 1))


def _check(
    images: Tensor, num_patches: int, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None
) -> None:
    """Raise ValueError for a selection of patches that does not fit the images."""
    batch = len(images)
    if keep is not None and (keep.ndim != 2 or len(keep) != batch or keep.dtype != torch.int64):
        raise ValueError(f"expected keep as int64 of shape ({batch}, K), got {keep.dtype} of {tuple(keep.shape)}")
    if mask is not None and (mask.shape != (batch, num_patches) or mask.dtype != torch.bool):
        raise ValueError(
            f"expected mask as bool of shape ({batch}, {num_patches}), got {mask.dtype} of {tuple(mask.shape)}"
        )
    if (mask is None) != (mask_token is None):
        raise ValueError("expected mask and mask_token together, got only one of them")


def has_last_norm(trunk: Any) -> bool:
    """Whether tokens come out of a last norm; many ViTs that pool by a mean have that norm after the pooling."""
    return not isinstance(trunk.norm, nn.Identity)


def freeze_pooling(trunk: Any) -> None:
    """Freeze what comes after the tokens: a norm of pooled features, attention that pools."""
    for module in (trunk.fc_norm, trunk.attn_pool):
        if module is not None:
            module.requires_grad_(False)


def freeze_patch_projection(trunk: Any) -> None:
    """Freeze the linear projection of patches."""
    trunk.patch_embed.proj.requires_grad_(False)
