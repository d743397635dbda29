"""Lineage: every batch, view and crop that an image took part in, computed from the order and the draws of a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslx.data import views
from sslx.data.order import Shuffled
from sslx.data.views import ViewSpec

_OF_THE_BOX = ("area", "ratio", "place")


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """A view of an image in a batch.

    step: the optimizer step, counted from 1.  epoch: counted from 0.  view: its number in ``Batch.views``.
    sample: the sample whose place the image took, which is its own unless that one was unreadable or excluded.
    box: (top, left, bottom, right) in pixels of the upright image.  draws: the parameters of the other operations by
    their names in ``sslx.data.views.Draw``, lists where a sample has several; empty for a view without augmentation.
    """

    step: int
    epoch: int
    view: int
    sample: int
    box: tuple[int, int, int, int]
    draws: Mapping[str, float | list[float]]

    def as_json(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        return {**vars(self), "box": list(self.box), "draws": dict(self.draws)}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run trained on, up to a step.

    order: that of all ranks together, with a rank's share being the whole batch.  num_steps: the steps that were
    taken.  specs: the views.  seed: of the views' draws.
    """

    order: Shuffled
    num_steps: int
    specs: Sequence[ViewSpec]
    seed: int

    def appearances(self, samples: Sequence[int], height: int, width: int) -> Iterator[Appearance]:
        """Yield each view of an image of this size, in the order of training.

        samples: the samples in whose places the image was read, its own among them.
        """
        num_batches = self.num_steps * self.order.accumulate
        num_epochs = -(-num_batches // self.order.num_batches)
        for epoch in range(num_epochs):
            placed = [(t, sample, number) for sample in samples for t, number in self.order.batches_of(sample, epoch)]
            for t, sample, number in sorted(placed):
                if t < num_batches:
                    yield from self._of_batch(t, epoch, number, sample, height, width)

    def _of_batch(self, t: int, epoch: int, number: int, sample: int, height: int, width: int) -> Iterator[Appearance]:
        """Yield the views of a sample.  number: that of the pass over the samples, on which its draws depend."""
        for view, drawn in enumerate(views.draws(self.specs, self.seed, number, np.array([sample]))):
            top, left, bottom, right = views.boxes(self.specs[view], drawn, [height], [width])[0].tolist()
            others = {} if drawn is None else {
                name: values[0].tolist() for name, values in drawn.arrays().items() if name not in _OF_THE_BOX
            }  # fmt: skip
            yield Appearance(
                step=t // self.order.accumulate + 1,
                epoch=epoch,
                view=view,
                sample=sample,
                box=(top, left, bottom, right),
                draws=others,
            )
