"""A checkpoint as an object: its encoder, the transform of images for it, and the settings it was trained with.

Example::

    import sslx

    trained = sslx.load("runs/simclr_digits")
    vectors = trained.embed(["cat.jpg", "dog.jpg"])  # (2, trained.dim) float32

    dinov2 = sslx.load("dinov2-small")  # a folder of transformers, timm or open_clip, or a file of weights
    print(dinov2.notes)  # what was loaded, and how images are prepared
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import encoders, rng
from sslx.console.progress import Progress, reporting
from sslx.console.words import one_line, shown
from sslx.data import pictures, views
from sslx.data.augment import Augment
from sslx.data.pictures import image_paths as image_paths
from sslx.data.views import ResizedView, ViewSpec, eval_view
from sslx.encoders import state_dicts
from sslx.encoders.modes import evaluation_mode
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine import cores, devices
from sslx.runs import checkpoint
from sslx.runs.state import VIEW

if TYPE_CHECKING:  # only for types: encoders and features need none of these
    from sslx.config import PretrainConfig
    from sslx.data import Config as DataConfig
    from sslx.data.pictures import Images, Picture
    from sslx.methods.base import Method


class Options(TypedDict, total=False):
    """The options of ``Trained.embed`` that do not change what it returns."""

    tokens: bool
    batch_size: int
    device: torch.device | str
    precision: devices.Precision
    threads: int | None
    progress: bool | Progress | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A checkpoint of a run.  Whatever features do not need is read or imported when it is first used.

    Or weights that sslx did not train: there is no run with settings, views and a method, the folder and the checkpoint
    are the given path, and the step is 0.

    folder: the run folder.  checkpoint: the directory of the checkpoint.  step: the number of steps taken.
    size: the side of the training views in pixels.  view: the transform of an image for features.
    recipe: the encoder's architecture; None for a checkpoint of sslx 0.1, whose config describes it.
    exported: the name of the encoder in its method: "encoder", or "teacher.encoder" if the method exports that one.
    device: the device on which encoders are built.
    config_text: the run's config; None for weights that sslx did not train.
    notes: of weights that sslx did not train, a line that accounts for all tensors, and one on how images are prepared.

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
    config_text: str | None = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()

    @cached_property
    def encoder(self) -> encoders.Encoder:
        """The encoder with its trained weights, a plain ``nn.Module`` in evaluation mode: (B, C, H, W) -> (B, dim)."""
        with rng.OwnGenerator():
            encoder = self._new_encoder()
        state_dicts.load(encoder, self.weights, f"checkpoint in {self.folder}")
        return encoder.to(self.device).eval()

    @property
    def dim(self) -> int:
        """The length of an image's features."""
        return self.encoder.dim

    @cached_property
    def transform(self) -> "Callable[[Picture], Tensor]":
        """The transform of ``embed``: a path, a PIL image, (H, W, 3) uint8 or another picture -> (C, S, S) float32.

        It can be pickled for the workers of a ``torch.utils.data.DataLoader``.
        """
        return pictures.Transform(self.view)

    @overload
    def embed(self, images: "Images", *, as_numpy: Literal[False] = False, **options: Unpack[Options]) -> Tensor: ...
    @overload
    def embed(
        self, images: "Images", *, as_numpy: Literal[True], **options: Unpack[Options]
    ) -> npt.NDArray[np.float32]: ...
    def embed(
        self,
        images: "Images",
        *,
        as_numpy: bool = False,
        tokens: bool = False,
        batch_size: int = 64,
        device: torch.device | str = "auto",
        precision: devices.Precision = "auto",
        threads: int | None = None,
        progress: "bool | Progress | None" = None,
    ) -> Tensor | npt.NDArray[np.float32]:
        """Return the features of images: (N, dim) float32 on the CPU.

        images: a folder, of which every image file below it is taken in the order of ``sslx.image_paths``; a source of
          sslx; or an iterable or a torch Dataset of pictures, which may differ in size.  A picture is a path, a PIL
          image, an (H, W, 3) array of uint8, a (3, H, W) tensor of uint8 or of floats from 0 to 1, or a tuple that
          starts with one of these, such as (picture, label).  A single picture gives (1, dim).  An encoder of other
          channels takes arrays (H, W, C) of the type of its images (``view.channels``) or uint8, and tensors (C, H, W).
        as_numpy: return an array instead of a tensor.
        tokens: return the tokens of a ViT's patches instead, (N, num_patches, dim).
        batch_size: the number of images that are computed at once.
        device: where to compute.  "auto" is the checkpoint's device if it is a GPU, else a GPU if there is one.  On
          another device than the checkpoint's, each call copies the encoder there.
        precision: "fp32", "bf16" or "fp16"; "auto" is bf16 on a GPU that supports it, else fp32.
        threads: the number of threads that read and decode images while the encoder computes.  Default: one for each
          core.  A Dataset or a generator gives all its items to one thread, because not every one bears several.
        progress: a function, called as ``progress(num_done, num_total)`` after each batch; True shows the progress of a
          call of over two seconds anywhere, False nowhere, and None on a terminal but not in a notebook.

        It may be called in a notebook, in any thread, and in several at once.  Raises DataError for a file that cannot
        be read (``sslx embed`` leaves such files out instead, and can be continued), ValueError for what is no picture,
        and ConfigError for tokens of an encoder that has none.

        Example::

            trained = sslx.load("runs/photos")
            vectors = trained.embed("photos")  # (N, dim), in the order of sslx.image_paths("photos")
            array = trained.embed(["cat.jpg", "dog.jpg"], as_numpy=True)  # (2, dim)
        """
        if (num := self.encoder.recipe.channels) != self.view.channels.num:
            raise ConfigError(
                f"{shown(self.folder)} has an encoder for {num} channels, and nothing says how such images are prepared"
            )
        where = _device(device, self.device)
        encoder = self.encoder if where == self.device else deepcopy(self.encoder).to(where)
        autocast = devices.autocast(where, precision)
        found, outputs, num_done = pictures.pictures_of(images, self.view.channels), list[Tensor](), 0
        views = pictures.batches(found, self.view, batch_size, threads or cores.allowed())
        with reporting(progress, "images") as report, closing(views), evaluation_mode(encoder):
            for batch in views:
                x = pictures.normalized(batch, self.view, where)
                with torch.no_grad(), torch.autocast(where.type, autocast, enabled=autocast is not None):
                    features = encoder.tokens(x).patches if tokens else encoder(x)
                outputs.append(features.float().cpu())
                num_done += len(batch)
                report(num_done, found.num)
        vectors = torch.cat(outputs) if outputs else torch.empty(0, self.dim)
        return vectors.numpy() if as_numpy else vectors

    def to(self, device: torch.device | str) -> "Trained":
        """Return the same checkpoint, with encoders built on another device."""
        return replace(self, device=torch.device(device))

    def with_view_size(self, size: int) -> "Trained":
        """Return the same checkpoint, with images prepared as squares of ``size`` pixels."""
        view = eval_view(size, self.view.mean, self.view.std, self.view.channels)
        if isinstance(self.view, ResizedView):
            resized = max(size, round(self.view.resized * size / self.view.size))
            view = replace(self.view, size=size, resized=resized)
        before, now = (f"preprocessing: {side} px" for side in (self.view.size, size))
        return replace(self, view=view, notes=tuple(note.replace(before, now) for note in self.notes))

    def averaged(self) -> "Trained":
        """Return the same checkpoint with the moving average of its encoder (``--average.momentum``) as the encoder.

        Raises ConfigError if the run kept none.
        """
        self._check_run("a moving average of the encoder")
        state: Mapping[str, Tensor] = checkpoint.load(self.checkpoint, needs=("method",))["method"]
        prefix = "encoder_average.encoder."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not weights:
            raise ConfigError(
                f"{shown(self.folder)} has no average of its encoder: pretrain with --average.momentum 0.999"
            )
        return replace(self, weights=weights, exported=prefix.rstrip("."))

    @property
    def seed(self) -> int:
        """The seed of the run; 0 for weights that sslx did not train."""
        return self.settings.seed if self.is_run else 0

    def untrained_encoder(self) -> encoders.Encoder:
        """Return the encoder as it was initialized at the start of the run, in evaluation mode.

        For weights that sslx did not train, it is initialized as in a run with seed 0.
        """
        with rng.initial_weights(self.seed):
            return self._new_encoder().to(self.device).eval()

    def method(self) -> "Method":
        """Return the whole method with its trained weights, in evaluation mode."""
        from sslx import methods

        with rng.initial_weights(self.settings.seed):
            method = methods.build(self.settings.method, self._new_encoder(), self.settings.average.momentum)
        state = checkpoint.load(self.checkpoint, needs=("method",))["method"]
        state_dicts.load(method, state, f"checkpoint in {self.folder}")
        return method.to(self.device).eval()

    @property
    def is_run(self) -> bool:
        """Whether this is a checkpoint of a run of sslx."""
        return self.config_text is not None

    @property
    def name(self) -> str:
        """The name of the run, or of the file or folder of weights that sslx did not train."""
        return self.settings.name if self.is_run else shown(self.folder.name)

    def folder_for_results(self) -> Path:
        """Return the run folder.  Raise ConfigError for weights that sslx did not train: nothing is written there."""
        if not self.is_run:
            raise ConfigError(f"{shown(self.folder)} is no run of sslx, so nothing is written there: name an --output")
        return self.folder

    @cached_property
    def settings(self) -> "PretrainConfig":
        """The config of the run.  Nothing else here needs the command line's parser.

        Raises ConfigError for weights that sslx did not train.
        """
        from sslx import config

        return config.loads(self._check_run("settings"))

    def _check_run(self, what: str) -> str:
        """Return the text of the config; raise ConfigError, which names what only a run has, if there is none."""
        if self.config_text is None:
            raise ConfigError(f"{shown(self.folder)} has no {what}, because it is no run of sslx: use a run folder")
        return self.config_text

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The augmented views that the method was trained on; for weights of other libraries, SimCLR's."""
        if not self.is_run:
            from sslx.methods import simclr

            if self.view.channels.is_plain:
                return simclr.Config().inputs(Augment(), self.size).views
            augment = Augment() if self.view.channels.is_rgb else Augment(saturation=0.0, hue=0.0, gray=0.0)
            return views.for_images(simclr.Config().inputs(augment, self.size).views, self.view)
        return views.for_images(self.settings.method.inputs(self.settings.augment, self.size).views, self.view)

    def reading(self, settings: "DataConfig") -> "DataConfig":
        """Return settings for reading images with the channels and the range of the run, where they name none."""
        of_run = pictures.reading(self.view.channels)
        channels = of_run.channels if settings.channels is None else settings.channels
        return replace(settings, channels=channels, range=of_run.range if settings.range == "auto" else settings.range)

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


def load(path: str | PathLike[str], device: torch.device | str = "cpu", *, part: str | None = None) -> Trained:
    """Read a run of sslx, an encoder that sslx exported, or weights of another library.

    path: a run folder (its newest good checkpoint), a checkpoint directory or a file in one; a folder that
      ``sslx export``, timm, open_clip or transformers wrote; or a file of torch or safetensors that ``sslx weights``
      recognizes (sslx/encoders/weights/README.md lists the libraries).
    device: the device on which the encoder is built.  Only the encoder's weights and the facts about it are read.
    part: the place of the encoder in a file of another library that holds several, such as "teacher".

    Images are prepared as the files beside the weights say (``preprocessor_config.json`` of transformers,
    ``config.json`` of timm, ``open_clip_config.json``), else with ImageNet's mean and standard deviation, or CLIP's for
    its towers, at the model's own size.  ``Trained.notes`` says which, ``Trained.view`` is the result, and
    ``Trained.with_view_size`` chooses another size.  No code in a file is run.

    Raises MissingInput if there is nothing to read, and DataError if it is damaged, or holds no encoder that is
    recognized, only a part of one, or several different ones.

    Example::

        trained = sslx.load("runs/photos")
        vit = sslx.load("dino_vitsmall16.pth", part="teacher").with_view_size(256)
        vectors = vit.embed("photos")
    """
    path = Path(path)
    from sslx.encoders.weights import foreign  # here: encoders, which it builds, import the package that it is in

    if foreign.is_foreign(path):
        found = foreign.read(path, part)
        return Trained(
            folder=path,
            checkpoint=path,
            step=0,
            size=found.view.size,
            view=found.view,
            recipe=found.recipe,
            exported="encoder",
            device=torch.device(device),
            config_text=None,
            weights=found.weights,
            notes=found.notes,
        )
    if part is not None:
        raise ConfigError(f"{shown(path)} is no file of another library, of which --part names an encoder")
    return _of_run(path, device)


def _of_run(path: Path, device: torch.device | str) -> Trained:
    """Read a run folder, a checkpoint directory or a file in one."""
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


def _device(choice: torch.device | str, own: torch.device) -> torch.device:
    """Return the device to compute features on; for "auto" a GPU if there is one, else that of the checkpoint."""
    if choice != "auto":
        return torch.device(choice)
    return own if own.type != "cpu" else devices.of_rank("auto", 0)


def _view(state: Mapping[str, Any], path: Path) -> ViewSpec:
    try:
        return views.from_json(state["eval_view"])
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
