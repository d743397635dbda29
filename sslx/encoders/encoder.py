"""Encoders: any timm trunk by name, without its classifier, in channels_last."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sslx.console import activity
from sslx.encoders import trunk as trunks
from sslx.encoders import vit, weights
from sslx.encoders.config import Config
from sslx.encoders.recipe import Norm, Recipe
from sslx.encoders.vit import Tokens
from sslx.errors import ConfigError
from sslx.machine import onednn


class Encoder(nn.Module):
    """A timm trunk with pooled features: (B, C, H, W) -> (B, dim).  ``trunk`` keeps timm's parameter names.

    dim: the length of an image's features, and of a token.
    recipe: enough to build the encoder again (``rebuild``) and to export it.
    kind: "vit" for timm's plain vision transformers, which have tokens and a grid of patches; "conv" for any other.
    patch: the side of a ViT's patches in pixels; None for "conv".
    """

    def __init__(self, trunk: nn.Module, dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.trunk, self.dim, self.recipe = trunk, dim, recipe
        self.kind: Literal["conv", "vit"] = "vit" if vit.is_vit(trunk) else "conv"
        self.patch = vit.patch_side(trunk) if self.kind == "vit" else None

    @property
    def size(self) -> int:
        """The side of the views that the encoder was built for, in pixels."""
        return self.recipe.size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> pooled features (B, dim)."""
        return self.trunk(x)

    def grid(self, size: int) -> tuple[int, int]:
        """The number of rows and columns of patches in views of ``size`` pixels; ConfigError without tokens."""
        self.check_tokens("a grid of patches")
        return vit.grid(self.trunk, size)

    def tokens(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tokens:
        """The tokens of images (B, C, H, W) after the last block: prefix (B, P, dim), patches (B, N or K, dim).

        keep: (B, K) int64, the patches that the encoder sees, counted row by row from 0; it computes as if the others
        did not exist (MAE, arXiv 2111.06377; I-JEPA, arXiv 2301.08243).  Prefix tokens are always seen.  None: all N.
        mask: (B, N) bool, the patches whose embeddings ``mask_token``, (dim,) or (1, 1, dim), takes the place of before
        position embeddings are added (iBOT, arXiv 2111.07832; DINOv2, arXiv 2304.07193).

        Raises ConfigError for an encoder without tokens, ValueError for shapes and dtypes that do not fit.
        """
        self.check_tokens("a sequence of tokens")
        return vit.tokens(self.trunk, x, keep=keep, mask=mask, mask_token=mask_token)

    def check_tokens(self, purpose: str) -> None:
        """Raise ConfigError for ``purpose``, which needs tokens, where the encoder has none."""
        if self.kind != "vit":
            raise ConfigError(
                f"{purpose} needs a ViT, not {type(self.trunk).__name__}: take --encoder.name vit_small_patch16_224 "
                "(--encoder.patch 4 for images of 32 px)"
            )

    @property
    def has_last_norm(self) -> bool:
        """Whether the tokens come out of a last norm.  A ViT that pools by a mean may have it after the pooling."""
        return self.kind == "vit" and vit.has_last_norm(self.trunk)

    def freeze_pooling(self) -> None:
        """Freeze the parameters that only ``forward`` uses, for a method that trains nothing but tokens.

        DDP waits for the gradient of every parameter that is not frozen.
        """
        self.check_tokens("training on tokens")
        vit.freeze_pooling(self.trunk)

    def freeze_patch_projection(self) -> None:
        """Freeze a ViT's projection of patches (MoCo v3, arXiv 2104.02057, section 4.2)."""
        self.check_tokens("freezing the patch projection")
        vit.freeze_patch_projection(self.trunk)


@activity.doing("building the encoder")
def build(
    config: Config,
    size: int,
    *others: int,
    norm: Norm = "batch",
    channels: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Encoder:
    """The encoder for views of ``size`` pixels, which takes those of ``others``, small crops' and probes', too.

    A ViT interpolates its position embeddings for those.  norm: takes the place of timm's batch norms before weights
    are loaded.  channels: of the images.  say: told what was loaded from a file.
    Initial weights are drawn from torch's global generator.  Raises ConfigError, MissingInput or DataError in one line.
    """
    # timm is imported inside of functions: it takes three seconds, and --help and a wrong flag need none of it.
    trunks.check_name(config.name)
    arguments = {**trunks.arguments(config), "img_size": size}
    recipe = Recipe(name=config.name, size=size, arguments=arguments, norm=norm, channels=channels)
    trunk, recipe = trunks.create(trunks.with_sizes(recipe, others), pretrained=config.weights == "timm")
    recipe = trunks.with_stem(recipe, config, trunk)
    encoder = _encoder(trunk, recipe, others)
    if config.weights == "timm" and recipe.stem != "imagenet":
        say(f"--encoder.weights timm: all but conv1, new in a {recipe.stem} stem (--encoder.stem imagenet keeps it)")
    if config.weights is not None and config.weights != "timm":
        say(weights.load(encoder.trunk, config.weights, config.name, config.weights_part))
    return encoder


@activity.doing("building the encoder")
def rebuild(recipe: Recipe, *others: int) -> Encoder:
    """The encoder of a recipe with new initial weights, the same as ``build`` draws in the same random state.

    others: sizes of views in pixels that it is to take beside the recipe's own.  ConfigError in one line.
    """
    trunks.check_name(recipe.name)
    trunk, recipe = trunks.create(trunks.with_sizes(recipe, others))
    return _encoder(trunk, recipe, others)


def _encoder(trunk: nn.Module, recipe: Recipe, others: tuple[int, ...]) -> Encoder:
    trunk = trunks.complete(trunk, recipe)
    sizes = dict.fromkeys((recipe.size, *others))
    dims = [trunks.dim(trunk, size, recipe.channels, recipe.name) for size in sizes]
    encoder = Encoder(trunk, dims[0], recipe).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    onednn.apply_workarounds(encoder)
    return encoder


def takes(encoder: Encoder, size: int) -> bool:
    """Whether the encoder, on the CPU, makes features of images of ``size`` pixels; a ViT of another size does not."""
    try:
        dim = trunks.dim(encoder.trunk, size, encoder.recipe.channels, encoder.recipe.name)
    except ConfigError:
        return False
    return dim == encoder.dim
