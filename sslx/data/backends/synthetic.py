"""A backend that repeats one random batch in memory, as an upper bound on any loader's speed for benchmarks."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import rng
from sslx.data.planner import Planner
from sslx.data.transfer import Delivery, send
from sslx.data.views import ViewSpec


class Synthetic:
    """Random pixels, drawn once and kept on the device.  They are not zeros, because zeros compute faster."""

    def __init__(self, specs: Sequence[ViewSpec], *, seed: int, max_per_rank: int, device: torch.device) -> None:
        self.views: list[Tensor] = []
        self.specs, self.device = tuple(specs), device
        for number, spec in enumerate(specs):
            shape = (spec.size, spec.size, spec.channels.num)
            index = np.arange(max_per_rank)
            values = rng.uniform(seed, "synthetic batch", index, number, num=int(np.prod(shape)))
            pixels = torch.from_numpy(values.reshape(-1, *shape).astype(np.float32)).to(device)
            self.views.append((2 * pixels - 1).permute(0, 3, 1, 2))

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield the same views for every batch."""
        for t in count(start):
            if (work := planner(t)) is None:
                return
            (extras,) = send([work.along], self.device)
            yield Delivery(work.index, tuple(view[: len(work.index)] for view in self.views), extras)

    def unreadable(self, index: npt.NDArray[np.int64]) -> dict[int, str]:  # noqa: ARG002 (nothing is read)
        return {}
