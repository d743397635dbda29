"""A checkpoint as an object: its encoder, how images are cut for it, and what it was trained with."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sslx import config, data, encoders, methods, rng
from sslx.config import PretrainConfig
from sslx.console.words import one_line, shown
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.methods.base import Method
from sslx.runs import checkpoint
from sslx.runs.state import VIEW


@dataclass(frozen=True)
class Trained:
    """A checkpoint: its config, its views' size, the probes' view, the method's weights, and its run folder.

    recipe: the encoder's; None for a checkpoint of sslx 0.1, whose encoder the config describes.
    """

    settings: PretrainConfig
    recipe: encoders.Recipe | None
    size: int
    view: ViewSpec
    weights: dict[str, Any]
    step: int
    folder: Path

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The augmented views that the method was trained on."""
        return self.settings.method.inputs(self.settings.augment, self.size).views

    def has_seen(self, settings: data.Config) -> bool:
        """Whether the training images of these settings are those of the run."""
        theirs, ours = (
            (config.source, None if config.root is None else os.path.realpath(config.root))
            for config in (settings, self.settings.data)
        )
        return theirs == ours

    def encoder(self, *, trained: bool, device: torch.device) -> encoders.Encoder:
        """The encoder that the method exports, or one as it was initialized at the start of the run.

        Global random generators stay as they are.
        """
        if trained:
            return self.method(device).exported
        with rng.initial_weights(self.settings.seed):
            encoder = self._untrained()
        return encoder.to(device)

    def method(self, device: torch.device) -> Method:
        """The method, with the checkpoint's weights, in evaluation mode.  Global random generators stay as they are."""
        with rng.initial_weights(self.settings.seed):
            method = methods.build(self.settings.method, self._untrained())
        checkpoint.load_weights(method, self.weights, f"checkpoint in {self.folder}")
        return method.to(device).eval()

    def _untrained(self) -> encoders.Encoder:
        """The encoder with initial weights from torch's global generator, for training's and the probes' views.

        Batch norms of all ranks become plain ones, which have the same weights and need no other rank.
        """
        norm = "batch" if self.settings.norm == "sync" else self.settings.norm
        if self.recipe is not None:
            return encoders.rebuild(replace(self.recipe, norm=norm), self.view.size)
        trunk = replace(self.settings.encoder, weights=None)
        return encoders.build(trunk, self.size, self.view.size, norm=norm)


def load(path: Path) -> Trained:
    """Read a run folder, a checkpoint directory or a file in one."""
    try:
        state = checkpoint.load(path, needs=VIEW)
    except MissingInput as error:
        raise MissingInput(f"{error}{_meant(path)}") from error
    try:
        saved: dict[str, Any] = state["eval_view"]  # JSON has made lists of tuples
        tuples: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        view = ViewSpec(**saved | tuples)
    except (TypeError, ValueError) as error:
        raise DataError(f"checkpoint {path} is not one that sslx wrote: its 'eval_view': {one_line(error)}") from error
    try:
        recipe = encoders.Recipe(**state["encoder_recipe"]) if "encoder_recipe" in state else None
    except (TypeError, ConfigError) as error:
        raise DataError(
            f"checkpoint {path} is not one that sslx wrote: its 'encoder_recipe': {one_line(error)}"
        ) from error
    folder = checkpoint.folder_of(path)
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    size = state.get("size", view.size)  # of the training views: the encoder's stem depends on it
    return Trained(config.loads(state["config"]), recipe, size, view, state["method"], state["step"], folder)


def _meant(path: Path) -> str:
    """What may have been meant by a path without a checkpoint, to be added to the error; else ""."""
    if (run := Path("runs") / path.name) != path and (run / "config.json").is_file():
        return f"; did you mean {shown(run)}?"
    if path.exists() and not (path / "config.json").is_file():
        return "; the images to look at go into --data.root"
    return ""
