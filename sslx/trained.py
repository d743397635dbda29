"""A checkpoint as an object: its encoder, the transform of images for it, and the settings it was trained with.

Example::

    import sslx

    trained = sslx.load("runs/simclr_digits")
    vectors = trained.embed(["cat.jpg", "dog.jpg"])  # (2, trained.dim) float32
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import encoders, rng
from sslx.console.words import one_line, shown
from sslx.data.views import ViewSpec, eval_view
from sslx.encoders import state_dicts
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.runs import checkpoint
from sslx.runs.state import VIEW

if TYPE_CHECKING:  # only for types: encoders and features need none of these
    from PIL.Image import Image

    from sslx.config import PretrainConfig
    from sslx.methods.base import Method

    Picture = str | PathLike[str] | Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A checkpoint of a run.  Whatever features do not need is read or imported when it is first used.

    folder: the run folder.  checkpoint: the directory of the checkpoint.  step: the number of steps taken.
    size: the side of the training views in pixels.  view: the transform of an image for features.
    recipe: the encoder's architecture; None for a checkpoint of sslx 0.1, whose config describes it.
    exported: the name of the encoder in its method: "encoder", or "teacher.encoder" if the method exports that one.
    device: the device on which encoders are built.

    No method changes the state of a global random generator.
    """

    folder: Path
    checkpoint: Path
    step: int
    size: int
    view: ViewSpec
    recipe: encoders.Recipe | None
    exported: str
    device: torch.device
    config_text: str = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)

    @cached_property
    def encoder(self) -> encoders.Encoder:
        """The encoder with its trained weights, in evaluation mode: (B, C, H, W) -> (B, dim)."""
        with rng.initial_weights(0):
            encoder = self._new_encoder()
        state_dicts.load(encoder, self.weights, f"checkpoint in {self.folder}")
        return encoder.to(self.device).eval()

    @property
    def dim(self) -> int:
        """The length of an image's features."""
        return self.encoder.dim

    @cached_property
    def transform(self) -> "Callable[[Picture], Tensor]":
        """The transform of ``embed``: a path, a PIL image or (H, W, 3) uint8 -> (3, S, S) float32.

        It can be pickled for the workers of a ``torch.utils.data.DataLoader``.
        """
        return Transform(self.view)

    @torch.no_grad()
    def embed(self, images: "Iterable[Picture]", *, batch_size: int = 256, tokens: bool = False) -> Tensor:
        """Return the features of images: (N, dim) float32 on the CPU.

        images: paths, PIL images or (H, W, 3) uint8 arrays, of any sizes.  batch_size: the images computed at once.
        tokens: return the tokens of a ViT's patches instead, (N, num_patches, dim).
        Raises DataError for a file that cannot be read, and ConfigError for tokens of an encoder that has none.
        """
        outputs, remaining = list[Tensor](), iter(images)
        while batch := list(islice(remaining, batch_size)):
            views = torch.stack([self.transform(image) for image in batch]).to(self.device)
            views = views.contiguous(memory_format=torch.channels_last)
            features = self.encoder.tokens(views).patches if tokens else self.encoder(views)
            outputs.append(features.float().cpu())
        return torch.cat(outputs) if outputs else torch.empty(0, self.dim)

    def to(self, device: torch.device | str) -> "Trained":
        """Return the same checkpoint, with encoders built on another device."""
        return replace(self, device=torch.device(device))

    def with_view_size(self, size: int) -> "Trained":
        """Return the same checkpoint, with images prepared as squares of ``size`` pixels."""
        return replace(self, view=eval_view(size, self.view.mean, self.view.std))

    def averaged(self) -> "Trained":
        """Return the same checkpoint with the moving average of its encoder (``--average.momentum``) as the encoder.

        Raises ConfigError if the run kept none.
        """
        state: Mapping[str, Tensor] = checkpoint.load(self.checkpoint, needs=("method",))["method"]
        prefix = "encoder_average.encoder."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not weights:
            raise ConfigError(
                f"{shown(self.folder)} has no average of its encoder: pretrain with --average.momentum 0.999"
            )
        return replace(self, weights=weights, exported=prefix.rstrip("."))

    def untrained_encoder(self) -> encoders.Encoder:
        """Return the encoder as it was initialized at the start of the run, in evaluation mode."""
        with rng.initial_weights(self.settings.seed):
            return self._new_encoder().to(self.device).eval()

    def method(self) -> "Method":
        """Return the whole method with its trained weights, in evaluation mode."""
        from sslx import methods

        with rng.initial_weights(self.settings.seed):
            method = methods.build(self.settings.method, self._new_encoder(), self.settings.average.momentum)
        state = checkpoint.load(self.checkpoint, needs=("method",))["method"]
        state_dicts.load(method, state, f"checkpoint in {self.folder}")
        return method.to(self.device).eval()

    @cached_property
    def settings(self) -> "PretrainConfig":
        """The config of the run.  Nothing else here needs the command line's parser."""
        from sslx import config

        return config.loads(self.config_text)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The augmented views that the method was trained on."""
        return self.settings.method.inputs(self.settings.augment, self.size).views

    def _new_encoder(self) -> encoders.Encoder:
        """Return the encoder for the views of training and probes, with weights from torch's global generator.

        Synchronized batch norms become plain ones, which have the same weights and need no other rank.
        """
        if self.recipe is not None:
            norm = "batch" if self.recipe.norm == "sync" else self.recipe.norm
            return encoders.rebuild(replace(self.recipe, norm=norm), self.view.size)
        norm = "batch" if self.settings.norm == "sync" else self.settings.norm
        trunk = replace(self.settings.encoder, weights=None)
        return encoders.build(trunk, self.size, self.view.size, norm=norm)


@dataclass(frozen=True)
class Transform:
    """The transform of an image for probes: the central square, resized and normalized."""

    view: ViewSpec

    def __call__(self, image: "Picture") -> Tensor:
        """Return (3, S, S) float32 of a path, PIL image or (H, W, 3) uint8; raise DataError for an unreadable file."""
        from sslx.data.backends import torchvision  # here: it imports torchvision, which takes a second

        return torchvision.prepared(self.view, torch.from_numpy(_pixels(image)).permute(2, 0, 1))


def _pixels(image: "Picture") -> npt.NDArray[np.uint8]:
    """Return the image as (H, W, 3) uint8 RGB."""
    from sslx.data.codecs import formats, headers

    if isinstance(image, str | PathLike):
        try:
            return formats.read(str(image))
        except headers.Unreadable as error:
            raise DataError(f"{shown(str(image))} cannot be read: {error}") from error
    pixels: npt.NDArray[Any] = np.array(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an (H, W, 3) array of uint8, got {pixels.shape} of {pixels.dtype}")
    return pixels


def load(path: str | PathLike[str], device: torch.device | str = "cpu") -> Trained:
    """Read a run folder (its newest good checkpoint), a checkpoint directory or a file in one.

    device: the device on which the encoder is built.  Only the encoder's weights and the facts about it are read.
    Raises MissingInput if there is no checkpoint, and DataError if it is damaged.
    """
    path = Path(path)
    try:
        directory = checkpoint.find(path, VIEW)
        state = checkpoint.load(directory, needs=VIEW)
    except MissingInput as error:
        raise MissingInput(f"{error}{_suggestion(path)}") from error
    view, recipe = _view(state, path), _recipe(state, path)
    folder = directory
    if directory.parent.name == "checkpoints":
        folder = directory.parent.parent
    return Trained(
        folder=folder,
        checkpoint=directory,
        step=state["step"],
        size=state.get("size", view.size),  # of the training views, on which the encoder's stem depends
        view=view,
        recipe=recipe,
        exported=state.get("exported", "encoder"),
        device=torch.device(device),
        config_text=state["config"],
        weights=state["encoder"],
    )


def _view(state: Mapping[str, Any], path: Path) -> ViewSpec:
    try:
        saved: dict[str, Any] = state["eval_view"]  # JSON turned tuples into lists
        tuples: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        return ViewSpec(**saved | tuples)
    except (TypeError, ValueError) as error:
        raise DataError(f"checkpoint {path} was not written by sslx: its 'eval_view': {one_line(error)}") from error


def _recipe(state: Mapping[str, Any], path: Path) -> encoders.Recipe | None:
    if "encoder_recipe" not in state:
        return None
    try:
        return encoders.Recipe(**state["encoder_recipe"])
    except (TypeError, ConfigError) as error:
        reason = f"checkpoint {path} was not written by sslx: its 'encoder_recipe'"
        raise DataError(f"{reason}: {one_line(error)}") from error


def _suggestion(path: Path) -> str:
    """Return the end of an error about a path without a checkpoint: a suggestion, or ""."""
    if (run := Path("runs") / path.name) != path and (run / "config.json").is_file():
        return f"; did you mean {shown(run)}?"
    if path.exists() and not (path / "config.json").is_file():
        return "; use --source.root for the images"
    return ""
