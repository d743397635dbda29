"""Planner: what is to be made of batch t, before anything of it is read."""

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
    """What reads each sample itself: no image is known to be unreadable."""
    return index


@dataclass(frozen=True, eq=False)
class Work:
    """Batch number t.  What only one of a backend's processes needs is worked out when it is first asked for."""

    planner: "Planner"
    t: int

    @cached_property
    def index(self) -> Indices:
        """(B,) the samples."""
        return self.planner.order.batch(self.t)

    @cached_property
    def files(self) -> Indices:
        """(B,) the images that are read: the samples, or what stands in for unreadable ones."""
        return self.planner.substitute(self.index)

    @cached_property
    def draws(self) -> list[Draw | None]:
        """The parameters of each view; None for evaluation views."""
        planner = self.planner
        return views.draws(planner.specs, planner.seed, planner.order.epoch(self.t), self.index)

    @property
    def along(self) -> Arrays:
        """What travels to the device beside the views: labels, and what the method draws."""
        return self.planner.along(self.t)


@dataclass(frozen=True, kw_only=True, eq=False)
class Planner:
    """The work of any batch, as a function of its number t.

    Pickled for the processes that read images, where nothing travels along.

    substitute: maps samples to the images that are read in their place.  along: what else batch t brings.
    """

    order: Order
    specs: Sequence[ViewSpec]
    seed: int = 0
    substitute: Callable[[Indices], Indices] = no_substitute
    along: Along = nothing

    def __call__(self, t: int) -> Work | None:
        """Batch t, or None where there is none, nor any after it."""
        return None if self.order.finished(t) else Work(self, t)

    def __reduce__(self) -> tuple[Any, ...]:
        return _planner, (self.order, self.specs, self.seed, self.substitute)


def _planner(order: Order, specs: Sequence[ViewSpec], seed: int, substitute: Callable[[Indices], Indices]) -> Planner:
    return Planner(order=order, specs=specs, seed=seed, substitute=substitute)
