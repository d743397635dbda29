"""MAE (He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377).

One view of each image, cut into patches of which most are masked.  A ViT encodes the visible ones; a small decoder
predicts from them the pixels of the masked ones.  The paper's augmentation (crop and flip) belongs in the recipe.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, masks
from sslx.methods.config import MethodConfig

EPS = 1e-6
"""Added to a patch's variance, which may be 0."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """MAE's settings; the defaults are the paper's for ImageNet (section 4)."""

    encoders: ClassVar = ("vit",)
    num_views: ClassVar = 1
    name: Literal["mae"] = "mae"
    mask_ratio: float = 0.75
    """Fraction of the patches that are masked."""
    decoder_dim: int = 512
    """Width of the decoder, which has one attention head per 32 of it."""
    decoder_layers: int = 8
    """Transformer blocks of the decoder."""
    normalize_target: bool = True
    """Predict pixels relative to their patch's mean and standard deviation (better in table 1d), not raw pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("decoder_layers", least=1)
        self.require("mask_ratio", above=0, below=1)
        if self.decoder_dim % (4 * self.decoder_heads):
            raise ConfigError(
                "mae needs a decoder_dim that is a multiple of 4 x its heads, one for each 32 of it, got "
                f"{self.decoder_dim}: use a multiple of 32"
            )

    @property
    def decoder_heads(self) -> int:
        """Attention heads of each block of the decoder: the paper's code has 16 for a width of 512."""
        return max(1, self.decoder_dim // 32)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """A ViT, a decoder, and the squared error of the masked patches' pixels.

    Deviations from the paper's code: the encoder keeps its initial weights and its learned position embeddings, where
    the code has Xavier's weights and fixed sines and cosines.  This keeps weights that were loaded, and makes the
    untrained encoder of probes the one that training starts from.  The decoder sees the tokens in the order of the
    draws, each with the position embedding of its place; the code puts them in their places first, which makes no
    difference to attention.  If a ViT has its last norm after the pooling, its tokens are normalized here.
    """

    positions: Tensor

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed  # here: see encoders.build
        from timm.models.vision_transformer import Block

        self.config = config
        encoder.check_tokens("mae")
        encoder.freeze_pooling()
        assert encoder.patch is not None
        (rows, columns), dim = encoder.grid(encoder.size), config.decoder_dim
        self.patch, self.num_patches = encoder.patch, rows * columns
        self.num_visible = int(self.num_patches * (1 - config.mask_ratio))
        if self.num_visible in (0, self.num_patches):
            raise ConfigError(
                f"mae needs patches to see and patches to predict; of {self.num_patches}, mask_ratio "
                f"{config.mask_ratio:g} leaves {self.num_visible} to see: set --method.mask-ratio or --encoder.patch"
            )
        self.encoder_norm = nn.Identity() if encoder.has_last_norm else nn.LayerNorm(encoder.dim, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        blocks = [Block(dim, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_layers)]
        pixels = encoder.recipe.channels * self.patch**2
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, pixels))
        for layer in (self.decoder_embed, *self.decoder.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.register_buffer("positions", build_sincos2d_pos_embed([rows, columns], dim)[None], persistent=False)

    def draw(self, draws: Draws) -> tuple[npt.NDArray[Any], ...]:
        """Return the places of visible (B, K) and masked patches (B, M), counted row by row from 0; int64."""
        return masks.random(draws, self.num_patches, self.num_visible)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return predictions (B, M, C * patch^2) of masked patches in the draws' order; ``given`` has the targets."""
        (view,), (visible, masked) = batch.views, batch.draws
        patches = patchify(view, self.patch).take_along_dim(masked[..., None], 1)
        mean, std = self._scale(patches)
        return base.Embedded((self._predict(view, visible, masked),), ((patches - mean) / std,))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the mean squared error over all pixels of masked patches, of which every sample has the same number.

        ``reconstruction_error``: relative to the targets' mean square, so that a prediction of 0 has 1.  That
        prediction is each patch's mean, or without ``normalize_target`` the mean color of the data.
        """
        (prediction,), (target,) = (map(base.full_precision, tensors) for tensors in embedded)
        loss = F.mse_loss(prediction, target)
        with torch.no_grad():
            error = loss / target.square().mean().clamp_min(EPS)
        return base.Step(loss, {"reconstruction_error": error.float()})

    @torch.no_grad()
    def picture(self, batch: Batch) -> tuple[tuple[str, Tensor], ...]:
        """Return the images, the patches that the encoder sees, and these with the predictions of all others.

        Masked patches have the mean color of the data, 0.  With ``normalize_target`` the predictions get the mean
        and the standard deviation of the true patch, which the model does not predict.
        """
        (view,), (visible, masked) = batch.views, batch.draws
        patches = patchify(view, self.patch)
        mean, std = self._scale(patches.take_along_dim(masked[..., None], 1))
        places = masked[..., None].expand(-1, -1, patches.shape[2])
        predicted = self._predict(view, visible, masked).to(patches.dtype) * std + mean
        shown = patches, patches.scatter(1, places, 0.0), patches.scatter(1, places, predicted)
        images = (F.fold(each.mT, view.shape[2:], self.patch, stride=self.patch) for each in shown)
        return tuple(zip(("image", "masked", "reconstruction"), images, strict=True))

    def _scale(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation, (B, M, 1) each, by which targets (B, M, P) are normalized."""
        var, mean = torch.var_mean(patches, dim=2, keepdim=True)
        if self.config.normalize_target:
            return mean, (var + EPS).sqrt()
        return torch.zeros_like(mean), torch.ones_like(var)

    def _predict(self, view: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return the decoder's (B, M, C * patch^2) for the masked patches of (B, C, H, W), from the visible ones."""
        prefix, patches = self.encoder.tokens(view, keep=visible)
        visible_tokens = self.decoder_embed(self.encoder_norm(torch.cat([prefix, patches], 1)))
        tokens = torch.cat([visible_tokens, self.mask_token.expand(*masked.shape, -1)], 1)
        places = torch.cat([visible, masked], 1)[..., None]
        positions = F.pad(self.positions.take_along_dim(places, 1), (0, 0, prefix.shape[1], 0))  # 0 for prefix tokens
        return self.decoder(tokens + positions)[:, visible_tokens.shape[1] :]


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return the square patches of (B, C, H, W), row by row: (B, N, C * patch^2), channel-major, fp32 or fp64."""
    images = base.full_precision(images)
    rows, columns = (side // patch for side in images.shape[2:])
    images = images[:, :, : rows * patch, : columns * patch]
    patches = images.reshape(*images.shape[:2], rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(len(images), rows * columns, -1)  # one copy; F.unfold is a launch for each image on a GPU
