"""A checkpoint as an object: its encoder, how images are prepared for it, and what it was trained with.

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

if TYPE_CHECKING:  # an encoder and its features need none of these
    from PIL.Image import Image

    from sslx.config import PretrainConfig
    from sslx.methods.base import Method

    Picture = str | PathLike[str] | Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A checkpoint of a run.  What is not needed for features is read, or imported, when it is first used.

    folder: the run's.  checkpoint: the directory of the checkpoint.  step: the number of steps taken.
    size: the side of the training views in pixels.  view: how an image is prepared for features.
    recipe: the encoder's architecture; None for a checkpoint of sslx 0.1, whose config describes it.
    exported: the name of the encoder in its method: "encoder", or "teacher.encoder" where the method exports that.
    device: where encoders are built.

    Nothing here changes the state of a global random generator.
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
        """Prepares one image as ``embed`` does: a path, a PIL image or (H, W, 3) uint8 -> (3, S, S) float32.

        It can be pickled, for the workers of a ``torch.utils.data.DataLoader``.
        """
        return Transform(self.view)

    @torch.no_grad()
    def embed(self, images: "Iterable[Picture]", *, batch_size: int = 256, tokens: bool = False) -> Tensor:
        """The features of images: (N, dim) float32 on the CPU.

        images: paths, PIL images or (H, W, 3) uint8 arrays, of any sizes.  batch_size: how many are computed at once.
        tokens: the N tokens of a ViT's patches instead, (N, num_patches, dim).  Raises DataError for a file that cannot
        be read, ConfigError for tokens of an encoder that has none.
        """
        outputs, rest = list[Tensor](), iter(images)
        while batch := list(islice(rest, batch_size)):
            views = torch.stack([self.transform(image) for image in batch]).to(self.device)
            views = views.contiguous(memory_format=torch.channels_last)
            features = self.encoder.tokens(views).patches if tokens else self.encoder(views)
            outputs.append(features.float().cpu())
        return torch.cat(outputs) if outputs else torch.empty(0, self.dim)

    def to(self, device: torch.device | str) -> "Trained":
        """The same checkpoint, whose encoders are built on another device."""
        return replace(self, device=torch.device(device))

    def with_view_size(self, size: int) -> "Trained":
        """The same checkpoint, with images prepared as squares of ``size`` pixels."""
        return replace(self, view=eval_view(size, self.view.mean, self.view.std))

    def untrained_encoder(self) -> encoders.Encoder:
        """The encoder as it was initialized at the start of the run, in evaluation mode."""
        with rng.initial_weights(self.settings.seed):
            return self._new_encoder().to(self.device).eval()

    def method(self) -> "Method":
        """The whole method with its trained weights, in evaluation mode."""
        from sslx import methods

        with rng.initial_weights(self.settings.seed):
            method = methods.build(self.settings.method, self._new_encoder())
        state = checkpoint.load(self.checkpoint, needs=("method",))["method"]
        state_dicts.load(method, state, f"checkpoint in {self.folder}")
        return method.to(self.device).eval()

    @cached_property
    def settings(self) -> "PretrainConfig":
        """The config of the run.  Only this needs the command line's parser."""
        from sslx import config

        return config.loads(self.config_text)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The augmented views that the method was trained on."""
        return self.settings.method.inputs(self.settings.augment, self.size).views

    def _new_encoder(self) -> encoders.Encoder:
        """The encoder with initial weights from torch's global generator, for training's and the probes' views.

        Batch norms over all ranks become plain ones, which have the same weights and need no other rank.
        """
        if self.recipe is not None:
            norm = "batch" if self.recipe.norm == "sync" else self.recipe.norm
            return encoders.rebuild(replace(self.recipe, norm=norm), self.view.size)
        norm = "batch" if self.settings.norm == "sync" else self.settings.norm
        trunk = replace(self.settings.encoder, weights=None)
        return encoders.build(trunk, self.size, self.view.size, norm=norm)


@dataclass(frozen=True)
class Transform:
    """Prepares an image as probes see it: the central square, resized and normalized."""

    view: ViewSpec

    def __call__(self, image: "Picture") -> Tensor:
        """A path, a PIL image or an (H, W, 3) uint8 array -> (3, S, S) float32; DataError for a file not readable."""
        from sslx.data.backends import torchvision  # it takes torchvision, and so a second

        return torchvision.prepared(self.view, torch.from_numpy(_pixels(image)).permute(2, 0, 1))


def _pixels(image: "Picture") -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB."""
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

    device: where the encoder is built.  Reads the encoder's weights and the facts about it, nothing else.
    Raises MissingInput where there is no checkpoint and DataError where it is damaged.
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
        size=state.get("size", view.size),  # of the training views: the encoder's stem depends on it
        view=view,
        recipe=recipe,
        exported=state.get("exported", "encoder"),
        device=torch.device(device),
        config_text=state["config"],
        weights=state["encoder"],
    )


def _view(state: Mapping[str, Any], path: Path) -> ViewSpec:
    try:
        saved: dict[str, Any] = state["eval_view"]  # JSON has made lists of tuples
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
        what = f"checkpoint {path} was not written by sslx: its 'encoder_recipe'"
        raise DataError(f"{what}: {one_line(error)}") from error


def _suggestion(path: Path) -> str:
    """The end of an error for a path without a checkpoint: the path that may have been meant."""
    if (run := Path("runs") / path.name) != path and (run / "config.json").is_file():
        return f"; did you mean {shown(run)}?"
    if path.exists() and not (path / "config.json").is_file():
        return "; the images to look at go into --source.root"
    return ""
