"""The Encoder class, and functions that build one from settings or from a recipe."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sslx.console import activity
from sslx.console.words import plural
from sslx.encoders import trunk as trunks
from sslx.encoders import vit, weights
from sslx.encoders.config import Config
from sslx.encoders.recipe import Norm, Recipe
from sslx.encoders.vit import Tokens
from sslx.errors import ConfigError
from sslx.machine import onednn


class Encoder(nn.Module):
    """A timm trunk that gives pooled features: (B, C, H, W) -> (B, dim).  ``trunk`` keeps timm's parameter names.

    dim: length of an image's feature vector, and of a token.
    recipe: the architecture, enough to build the encoder again (``rebuild``) and to export it.
    kind: "vit" for timm's plain vision transformers, which have tokens and a grid of patches; "conv" for all others.
    patch: side of a ViT's patches in pixels; None for "conv".
    """

    def __init__(self, trunk: nn.Module, dim: int, recipe: Recipe) -> None:
        super().__init__()
        self.trunk, self.dim, self.recipe = trunk, dim, recipe
        self.kind: Literal["conv", "vit"] = "vit" if vit.is_vit(trunk) else "conv"
        self.patch = vit.patch_side(trunk) if self.kind == "vit" else None

    @property
    def size(self) -> int:
        """Side of the views that the encoder was built for, in pixels."""
        return self.recipe.size

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features (B, dim) of images (B, C, H, W)."""
        return self.trunk(x)

    def grid(self, size: int) -> tuple[int, int]:
        """Return the number of rows and columns of patches in views of ``size`` pixels.

        Raises ConfigError for an encoder without tokens.
        """
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
        """Return the tokens of images (B, C, H, W) after the last block: prefix (B, P, dim), patches (B, N or K, dim).

        keep: (B, K) int64, indices of the patches that the encoder sees, counted row by row from 0.  The encoder
        computes as if the others did not exist (MAE, arXiv 2111.06377; I-JEPA, arXiv 2301.08243).  It always sees the
        prefix tokens.  By default it sees all N patches.
        mask: (B, N) bool, True for the patches whose embeddings are replaced by ``mask_token``, (dim,) or (1, 1, dim),
        before position embeddings are added (iBOT, arXiv 2111.07832; DINOv2, arXiv 2304.07193).

        Raises ConfigError for an encoder without tokens and ValueError for wrong shapes or dtypes.
        """
        self.check_tokens("a sequence of tokens")
        return vit.tokens(self.trunk, x, keep=keep, mask=mask, mask_token=mask_token)

    def check_tokens(self, purpose: str) -> None:
        """Raise ConfigError, which names ``purpose``, if the encoder has no tokens."""
        if self.kind != "vit":
            raise ConfigError(
                f"{purpose} needs a ViT, not {type(self.trunk).__name__}: use --encoder.name vit_small_patch16_224 "
                "(with --encoder.patch 4 for images of 32 px)"
            )

    @property
    def has_last_norm(self) -> bool:
        """True if a final norm is applied to the tokens.  A mean-pooling ViT may apply it after pooling instead."""
        return self.kind == "vit" and vit.has_last_norm(self.trunk)

    def freeze_pooling(self) -> None:
        """Freeze the parameters that only ``forward`` uses, for a method that trains on tokens alone.

        DDP waits for a gradient of every parameter that is not frozen, and these would never get one.
        """
        self.check_tokens("training on tokens")
        vit.freeze_pooling(self.trunk)

    def freeze_patch_projection(self) -> None:
        """Freeze a ViT's patch projection (MoCo v3, arXiv 2104.02057, section 4.2)."""
        self.check_tokens("freezing the patch projection")
        vit.freeze_patch_projection(self.trunk)


@activity.doing("building the encoder")
def build(
    config: Config,
    size: int,
    *other_sizes: int,
    norm: Norm = "batch",
    channels: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> Encoder:
    """Build an encoder for views of ``size`` pixels that also accepts ``other_sizes``, such as local crops' or probes'.

    A ViT interpolates its position embeddings for the other sizes.
    norm: replaces timm's batch norms before weights are loaded.  channels: number of channels of the images.
    say: called with a line about the weights that were loaded from a file.
    Initial weights are drawn from torch's global generator.  Raises a one-line ConfigError, MissingInput or DataError.
    """
    # timm is imported inside functions: it takes three seconds, and --help and errors in flags do not need it.
    trunks.check_name(config.name)
    arguments = {**trunks.arguments(config), "img_size": size}
    recipe = Recipe(name=config.name, size=size, arguments=arguments, norm=norm, channels=channels)
    trunk, recipe = trunks.create(trunks.with_sizes(recipe, other_sizes), pretrained=config.weights == "timm")
    recipe = trunks.with_stem(recipe, config, trunk)
    encoder = _encoder(trunk, recipe, other_sizes)
    if config.weights == "timm" and channels != 3 and recipe.stem == "imagenet":
        say(f"--encoder.weights timm: the first layer was adapted by timm from 3 to {plural(channels, 'channel')}")
    if config.weights == "timm" and recipe.stem != "imagenet":
        say(
            f"--encoder.weights timm: loaded all but conv1, which is new in a {recipe.stem} stem "
            "(--encoder.stem imagenet keeps timm's)"
        )
    if config.weights is not None and config.weights != "timm":
        say(weights.load(encoder.trunk, config.weights, config.name, config.weights_part, config.missing))
    return encoder


@activity.doing("building the encoder")
def rebuild(recipe: Recipe, *other_sizes: int) -> Encoder:
    """Build the encoder of a recipe with new initial weights, the same as ``build`` draws in the same random state.

    other_sizes: view sizes in pixels that the encoder must accept besides the recipe's.  Raises a one-line ConfigError.
    """
    trunks.check_name(recipe.name)
    trunk, recipe = trunks.create(trunks.with_sizes(recipe, other_sizes))
    return _encoder(trunk, recipe, other_sizes)


def _encoder(trunk: nn.Module, recipe: Recipe, other_sizes: tuple[int, ...]) -> Encoder:
    trunk = trunks.complete(trunk, recipe)
    sizes = dict.fromkeys((recipe.size, *other_sizes))
    dims = [trunks.dim(trunk, size, recipe.channels, recipe.name) for size in sizes]
    encoder = Encoder(trunk, dims[0], recipe).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    onednn.apply_workarounds(encoder)
    return encoder


def accepts_size(encoder: Encoder, size: int) -> bool:
    """Return whether the encoder, which must be on the CPU, accepts images of ``size`` pixels.

    A ViT that was built for other sizes does not.
    """
    try:
        dim = trunks.dim(encoder.trunk, size, encoder.recipe.channels, encoder.recipe.name)
    except ConfigError:
        return False
    return dim == encoder.dim
