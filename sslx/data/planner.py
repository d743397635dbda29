"""Planner: the samples, files and parameters of batch t, known before any of its images is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.data import views
from sslx.data.order import Order
from sslx.data.transfer import Along, Arrays, nothing
from sslx.data.views import Draw, ViewSpec

Indices = npt.NDArray[np.int64]


def no_substitute(index: Indices) -> Indices:
    """Return the samples themselves, for sources without known unreadable images."""
    return index


@dataclass(frozen=True, eq=False)
class Work:
    """The plan of batch number t.  Each part is computed at its first use, since not every process needs all."""

    planner: "Planner"
    t: int

    @cached_property
    def index(self) -> Indices:
        """The samples: (B,)."""
        return self.planner.order.batch(self.t)

    @cached_property
    def files(self) -> Indices:
        """The images to read, which are the samples or the stand-ins of unreadable ones: (B,)."""
        return self.planner.substitute(self.index)

    @cached_property
    def draws(self) -> list[Draw | None]:
        """The parameters of each view; None for evaluation views."""
        planner = self.planner
        return views.draws(planner.specs, planner.seed, planner.order.passes(self.t), self.index)

    @property
    def along(self) -> Arrays:
        """The arrays sent to the device beside the views: labels and the method's draws."""
        return self.planner.along(self.t)


@dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """The work of any batch, as a function of its number t.

    A planner is pickled for the processes that read images, without ``along``.

    substitute: maps samples to the images that are read in their place.  along: makes batch t's labels and draws.
    """

    order: Order
    specs: Sequence[ViewSpec]
    seed: int = 0
    substitute: Callable[[Indices], Indices] = no_substitute
    along: Along = nothing

    def __call__(self, t: int) -> Work | None:
        """Return the work of batch t, or None if the order ends before it."""
        return None if self.order.finished(t) else Work(self, t)

    def __reduce__(self) -> tuple[Any, ...]:
        return _planner, (self.order, self.specs, self.seed, self.substitute)


def _planner(order: Order, specs: Sequence[ViewSpec], seed: int, substitute: Callable[[Indices], Indices]) -> Planner:
    return Planner(order=order, specs=specs, seed=seed, substitute=substitute)
