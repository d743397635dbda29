"""A timm ViT as the plain ViT that other libraries have: one grid of positions, no layer scale, a bias everywhere.

All of these changes leave the features the same: they only add up or multiply constant tensors beforehand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslx.encoders import Encoder, Recipe
from sslx.export import limits
from sslx.trained import Trained

EPS = 1e-6
"""The epsilon of every layer norm, which timm and torchvision have as their default."""


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """The shape of a ViT, and its tensors by timm's names.

    size: side of the images, the only one that the positions fit.  patch: side of a patch.  Both are in pixels.
    num_registers: number of register tokens, which stand between the class token and the patches.
    pools_patches: True if the features are the mean of the patches' tokens, False if they are the class token.
    tensors: ``cls_token`` and ``reg_token`` contain their own positions, so ``pos_embed`` (1, 1 + N, dim) is zero in
      its first row.
    """

    size: int
    patch: int
    depth: int
    width: int
    num_heads: int
    mlp_width: int
    num_registers: int
    pools_patches: bool
    tensors: dict[str, Tensor]


@torch.no_grad()
def convert(trained: Trained, library: str) -> PlainViT:
    """Return the plain ViT with the same features.  Raise ConfigError for an encoder that no plain ViT equals."""
    encoder, size = trained.encoder, trained.view.size
    trunk: Any = encoder.trunk
    if feature := _feature(trunk):
        raise limits.refusal(library, encoder, feature)
    tensors = {name: value.clone() for name, value in trunk.state_dict().items()}
    # timm's method adds the positions, resized to this grid, to the class, register and patch tokens that have one.
    patches = trunk.patch_embed(torch.zeros(1, encoder.recipe.channels, size, size))
    sequence: Tensor = trunk._pos_embed(torch.zeros_like(patches))
    num_registers, first = int(trunk.num_reg_tokens), sequence[:, :1]
    tensors["cls_token"] = first
    if num_registers:
        tensors["reg_token"] = sequence[:, 1 : 1 + num_registers]
    tensors["pos_embed"] = torch.cat([torch.zeros_like(first), sequence[:, 1 + num_registers :]], 1)
    for i, block in enumerate(trunk.blocks):
        _merge_scale(tensors, f"blocks.{i}.ls1.gamma", f"blocks.{i}.attn.proj")
        _merge_scale(tensors, f"blocks.{i}.ls2.gamma", f"blocks.{i}.mlp.fc2")
        tensors.setdefault(f"blocks.{i}.attn.qkv.bias", torch.zeros(block.attn.qkv.out_features))
    return PlainViT(
        size=size,
        patch=int(trunk.patch_embed.patch_size[0]),
        depth=len(trunk.blocks),
        width=encoder.dim,
        num_heads=int(trunk.blocks[0].attn.num_heads),
        mlp_width=int(trunk.blocks[0].mlp.fc1.out_features),
        num_registers=num_registers,
        pools_patches=pools_patches(encoder),
        tensors=tensors,
    )


def recipe(encoder: Encoder, vit: PlainViT) -> Recipe:
    """Return the recipe of a plain ViT, whatever the encoder's own has beside."""
    arguments: dict[str, Any] = {
        "img_size": vit.size,
        "patch_size": vit.patch,
        "depth": vit.depth,
        "embed_dim": vit.width,
        "num_heads": vit.num_heads,
        "mlp_ratio": (vit.mlp_width + 0.5) / vit.width,  # timm rounds the product down
    }
    if vit.pools_patches:
        arguments |= {"global_pool": "avg", "fc_norm": False}
    if vit.num_registers:  # a model with registers has layer scales, too
        arguments |= {"reg_tokens": vit.num_registers, "no_embed_class": True, "init_values": 1.0}
    return Recipe(name="vit_base_patch16_224", size=vit.size, arguments=arguments, channels=encoder.recipe.channels)


def pools_patches(encoder: Encoder) -> bool:
    """Return whether a ViT's features are the mean of the patches' tokens."""
    trunk: Any = encoder.trunk
    return trunk.global_pool == "avg"


def _merge_scale(tensors: dict[str, Tensor], scale: str, layer: str) -> None:
    """Multiply the output of a linear layer by a layer scale, if there is one, which is removed."""
    gamma = tensors.pop(scale, None)
    if gamma is not None:
        tensors[f"{layer}.weight"] *= gamma[:, None]
        tensors[f"{layer}.bias"] *= gamma


def _feature(trunk: Any) -> str:
    """Return a feature that a plain ViT does not have, or an empty string."""
    from timm.layers.patch_embed import PatchEmbed  # inside the function: see encoders.build
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(trunk) is not VisionTransformer or type(trunk.patch_embed) is not PatchEmbed:
        return "with its kind of patches and tokens"
    if any(type(block) is not Block for block in trunk.blocks):
        return "with its kind of blocks"
    if not trunk.has_class_token:
        return "without a class token"
    if trunk.attn_pool is not None or trunk.global_pool not in ("token", "avg") or _includes_prefix(trunk):
        return f"with its pooling ({trunk.global_pool})"
    if not isinstance(trunk.norm_pre, nn.Identity):
        return "with a norm before the blocks"
    if isinstance(trunk.norm, nn.Identity) or not isinstance(trunk.fc_norm, nn.Identity):
        return "with a norm after pooling"
    norms = [trunk.norm, *(norm for block in trunk.blocks for norm in (block.norm1, block.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) and norm.eps == EPS for norm in norms):
        return "with its kind of norm"
    if not all(limits.is_gelu(getattr(block.mlp, "act", None)) for block in trunk.blocks):
        return "with its activation"
    return ""


def _includes_prefix(trunk: Any) -> bool:
    return bool(getattr(trunk, "pool_include_prefix", False)) and trunk.global_pool == "avg"
