"""The plan of a run: the values that follow from its config, its images and the machine.

The config keeps the user's settings.  The plan holds the values derived from them, which are printed before the first
step, logged with the run, and never written back to the config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sslx import by_name, optim
from sslx.config import PretrainConfig
from sslx.console.words import plural
from sslx.data import statistics
from sslx.data.sources import Source
from sslx.data.text import TextSpec
from sslx.data.views import ViewSpec, for_images
from sslx.distributed import Ranks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The derived values of a run, the same on every rank.

    size: the side of the (global) training views in pixels.  views, text: what the method needs of each sample.
    eval_view: the view that probes see.  dtype: the parameters' dtype.  autocast: mixed precision's dtype, or None.
    schedule: that of learning rate and weight decay.  num_images: the number of images in the source.
    """

    size: int
    views: tuple[ViewSpec, ...]
    text: TextSpec | None
    eval_view: ViewSpec
    dtype: torch.dtype
    autocast: torch.dtype | None
    schedule: optim.Schedule
    num_images: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(
        cls,
        config: PretrainConfig,
        source: Source,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        say: Callable[[str], None] = lambda _: None,
    ) -> "Plan":
        """Return the plan for a config whose defaults are settled, and for the images of a source.

        say: takes a line about numbers that were measured on the images.
        """
        size = config.data.size or source.facts.size
        inputs = config.method.inputs(config.augment, size)
        plain = statistics.evaluation_view(config.data, source, say)
        steps_per_epoch = len(source) // config.batch_size
        return cls(
            size=size,
            views=for_images(inputs.views, plain),
            text=inputs.text,
            eval_view=plain,
            dtype=dtype,
            autocast=autocast,
            schedule=optim.Schedule.of(config.optim, config.batch_size),
            num_images=len(source),
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=config.steps or config.epochs * steps_per_epoch,
        )

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of the views and of large matrix products."""
        return self.autocast or self.dtype

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """The sides in pixels of all views that the encoder must accept, besides ``size``."""
        return (*(view.size for view in self.views), self.eval_view.size)

    def lines(self, config: PretrainConfig, ranks: Ranks) -> list[str]:
        """Return the lines that tell the user what is about to happen."""
        precision = str(self.input_dtype).removeprefix("torch.")
        lines = [
            f"{by_name.label(config.method.name)} on {config.encoder.name}, {self.size} px, {precision}, "
            f"{ranks.world_size} x {ranks.device.type}",
            f"{plural(self.total_steps, 'step')} of {self.batch_size} ({self.steps_per_epoch:,} an epoch), "
            f"{config.optim.name}, peak lr {self.schedule.peak_lr:.4g}",
        ]
        num_left = self.num_images - self.steps_per_epoch * self.batch_size
        if num_left * 10 >= self.num_images:
            lines.append(
                f"{num_left:,} of {self.num_images:,} images are left out of each epoch, because they do not fill a "
                "batch; they are different ones each time"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the values that are logged with the run."""
        return {
            "size": self.size,
            "view_sizes": list(self.view_sizes),
            "channels": self.eval_view.channels.in_words,
            "mean": list(self.eval_view.mean),
            "std": list(self.eval_view.std),
            "precision": str(self.input_dtype).removeprefix("torch."),
            "peak_lr": self.schedule.peak_lr,
            "num_images": self.num_images,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }
