"""Frozen features of a whole split: extraction over ranks, the raw-pixel baseline, draws of labelled rows."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import distributed, rng
from sslx.console.words import one_line
from sslx.data.batch import Batch
from sslx.errors import ConfigError, NonFiniteError, UserError
from sslx.machine import memory

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while something that may take seconds goes on."""

PIXEL_SIDE = 16
_GATHER_BYTES = 64 << 20


def silent(what: str, done: int, total: int) -> None:
    """The progress callback of whoever wants none."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a representation makes of one split, in the order of its source, on the CPU.

    x: (N, D) float32.  label: (N,) int64, or None where the source has no labels.
    index: (N,) int64, ascending: each row's place in the source.
    """

    x: Tensor
    label: Tensor | None
    index: Tensor


def extract(
    encoder: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: torch.dtype | None = None,
    num_samples: int,
    num_views: int = 1,
    progress: Progress = silent,
) -> Features:
    """The features of a split's first view, computed by all ranks and given to each.

    encoder: (B, 3, H, W) -> (B, D), run in evaluation mode; each submodule's mode is put back.
    batches: this rank's share, in any order and any batch size; over all ranks each of the ``num_samples``
      samples once.
    autocast: the dtype to autocast to, or None for float32 throughout.
    num_views: of more than one view, the features of each stand beside one another: (N, num_views * D).
    Raises NonFiniteError, on all ranks, if a feature is not finite.
    """

    # Around the encoder only: tensors that a loader makes and keeps must stay usable by autograd.
    def embed(view: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(view.device.type, autocast, enabled=autocast is not None),
        ):
            return encoder(view if autocast is not None else view.float())

    with evaluating(encoder):
        return _collect(embed, batches, num_samples, num_views, progress)


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """In evaluation mode for a while; each submodule's mode is put back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def pixels(
    batches: Iterable[Batch],
    *,
    num_samples: int,
    num_views: int = 1,
    side: int = PIXEL_SIDE,
    progress: Progress = silent,
) -> Features:
    """The raw-pixel baseline: the normalised pixels of each sample's first view, flattened to (N, 3·H·W).

    Views of more than 16 pixels a side are averaged down to 16 × 16 (``PIXEL_SIDE``) first: at 224 pixels a
    row would hold 150,528 numbers, and an ordinary training split would not fit in memory.
    num_views: as of ``extract``.  side: for another number of pixels than 16.
    """

    def flatten(view: Tensor) -> Tensor:
        height, width = (min(length, side) for length in view.shape[-2:])
        return F.adaptive_avg_pool2d(view.float(), (height, width)).flatten(1)

    return _collect(flatten, batches, num_samples, num_views, progress)


def by_class(label: Tensor, seed: int, name: str, *counters: int) -> dict[int, npt.NDArray[np.int64]]:
    """For each class in ``label`` (N,), its rows in an order drawn from (seed, name, counters)."""
    values = label.numpy()
    rows = {int(c): np.flatnonzero(values == c) for c in np.unique(values)}
    return {c: r[rng.permutation(seed, name, *counters, c, size=len(r))] for c, r in rows.items()}


def _collect(
    embed: Callable[[Tensor], Tensor], batches: Iterable[Batch], num_samples: int, num_views: int, progress: Progress
) -> Features:
    world_size = distributed.world_size()
    x, label, index = list[Tensor](), list[Tensor](), list[Tensor]()
    done, problem = 0, None
    try:
        for batch in batches:
            x.append(torch.cat([embed(view).float().cpu() for view in batch.views[:num_views]], 1))
            memory.reuse_freed(batch.views[0].device)
            index.append(batch.index.cpu())
            if batch.label is not None:
                label.append(batch.label.cpu())
            done += len(batch)
            progress("features", min(done * world_size, num_samples), num_samples)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        problem = error if isinstance(error, UserError) else ConfigError(f"out of memory: {one_line(error)}")
    problems = [found for found in distributed.gather_objects(problem) if found is not None]
    if problems:  # on all ranks, or the others would wait
        raise problems[0]
    parts = _gather(x, label, index, -(-num_samples // world_size))
    features = Features(
        torch.cat([part[0] for part in parts if len(part[0])]),
        torch.cat([part[1] for part in parts]) if any(len(part[1]) for part in parts) else None,
        torch.cat([part[2] for part in parts]),
    )
    return _sorted(features, num_samples)


def _gather(
    x: list[Tensor], label: list[Tensor], index: list[Tensor], most: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All ranks' rows, in pieces of bounded size; ``most``: the largest number of rows that a rank has."""
    none = torch.empty(0, dtype=torch.int64)
    own = (
        torch.cat(x) if x else torch.empty(0, 0),
        torch.cat(label) if label else none,
        torch.cat(index) if index else none,
    )
    if distributed.world_size() == 1:
        return [own]
    width = max(distributed.gather_objects(own[0].shape[1]))
    rows = max(1, _GATHER_BYTES // (4 * width))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, most, rows):
        piece = tuple(tensor[start : start + rows].numpy() for tensor in own)
        gathered = distributed.gather_objects(piece)
        parts += [(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(c)) for a, b, c in gathered]
    return parts


def _sorted(features: Features, num_samples: int) -> Features:
    order = features.index.argsort()
    label = None if features.label is None else features.label[order]
    features = Features(features.x[order], label, features.index[order])
    assert torch.equal(features.index, torch.arange(num_samples)), "a sample came twice, or never"
    assert label is None or len(label) == num_samples, "some batches had labels and some had none"
    bad = int((~features.x.isfinite().all(1)).sum())
    if bad:
        raise NonFiniteError(
            f"expected finite features, but {bad} of {num_samples} samples have NaN or infinite ones; "
            "use an earlier checkpoint, or float32 instead of autocast"
        )
    return features
