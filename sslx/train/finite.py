"""What is not a finite number is neither stepped nor saved: decided on the device, by all ranks together.

A step whose loss or gradient is not finite on any rank leaves everything as it was: parameters and optimizer (which
read ``found_inf``), buffers (``Buffers``), moving averages (``Method.after_step`` at a progress of 1).  It counts as a
step all the same, so the steps after it have the images, learning rate and weight decay that they have without it.  The
host learns of it when it waits for the device anyway (``Watch``).
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslx import distributed
from sslx.data.batch import Batch

foreach: Any = torch  # its multi-tensor functions have no public names
EVERY = 20
"""Steps after which the host asks a GPU at the latest, whatever is logged."""


class NotFinite(Exception):
    """The run cannot go on from here; raised on all ranks at the same step.  Its text says what is not finite."""


@torch.no_grad()
def agreed(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether a step may be taken: the loss and the norm of the whole gradient are finite, on all ranks.

    Returns () bool, on the device, the same on all ranks; one all-reduce of a number, and nothing waits for it.
    """
    good = loss.detach().isfinite() & grad_norm.isfinite()
    return distributed.sum_over_ranks((~good).float()) == 0


def step_if(taken: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step where ``taken`` is true, nothing where it is not; decided on the device.

    optimizer: one that reads ``found_inf``, by which torch's GradScaler tells its fused optimizers the same.  All that
      ``optim.build`` makes do.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "this optimizer would step on what is not finite"
    cast(Any, optimizer).found_inf = (~taken).float()
    optimizer.step()


class Buffers:
    """A module's buffers as they are now, to be put back: one copy for each dtype, whatever their number."""

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._kinds = [(buffers, _flat(buffers)) for buffers in kinds.values()]

    @torch.no_grad()
    def put_back(self, unless: Tensor | None = None) -> None:
        """Make the buffers what they were, unless ``unless``, () bool on their device, is true."""
        for buffers, before in self._kinds:
            flat = before if unless is None else torch.where(unless, _flat(buffers), before)
            parts = flat.split([buffer.numel() for buffer in buffers])
            foreach._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def counted(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step's metrics for a sum over steps: 0 where it was not taken, and ``taken`` the number that was."""
    names = list(metrics)
    values = torch.stack([metrics[name].double() for name in names])
    return dict(zip(names, torch.where(metrics["taken"], values, 0.0).unbind(), strict=True))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Means over the steps that were taken, from those of ``counted`` over all steps; nan where none was."""
    share = sums.pop("taken")
    return {name: value / share if share else math.nan for name, value in sums.items()}


@dataclass(frozen=True)
class _Step:
    number: int
    flags: Tensor  # (2,) on the device: taken, loss
    index: Tensor  # of this rank's samples


class Watch:
    """Which steps were not taken, and whether too many in a row.

    limit: so many in a row are skipped; one more raises NotFinite.  folder: the run's, for ``nonfinite.jsonl``.
    name: of the sample at an index.
    """

    def __init__(self, limit: int, folder: Path, device: torch.device, name: Callable[[int], str]) -> None:
        self._limit, self._folder, self._name = limit, folder, name
        self._every = 1 if device.type == "cpu" else EVERY
        self._none = torch.empty(0, dtype=torch.float64, device=device)
        self._steps: list[_Step] = []
        self._in_row = 0
        self.skipped = 0

    def add(self, number: int, metrics: dict[str, Tensor], batches: Sequence[Batch]) -> None:
        """Remember a step's verdict and samples, without waiting for either."""
        flags = torch.stack([metrics["taken"].double(), metrics["loss"].double()])
        self._steps.append(_Step(number, flags, torch.cat([batch.index for batch in batches])))

    def look(self, say: Callable[[str], None]) -> None:
        """Ask the device once it has been long enough, and ``judge``; every rank calls this together."""
        if len(self._steps) >= self._every:
            self.judge(say, self.pending().tolist())  # sync point

    def pending(self) -> Tensor:
        """The verdicts on the steps that the host has not read yet, (2 * steps,) float64, on the device."""
        return torch.cat([step.flags for step in self._steps]) if self._steps else self._none

    def judge(self, say: Callable[[str], None], verdicts: Sequence[float]) -> None:
        """Given what ``pending`` gave, name the samples of each step that was not taken in ``nonfinite.jsonl``.

        Says a line of each.  NotFinite where they are too many in a row.
        """
        steps, self._steps = self._steps, []
        for step, taken, loss in zip(steps, verdicts[::2], verdicts[1::2], strict=True):
            if taken:
                self._in_row = 0
                continue
            self._in_row += 1
            self.skipped += 1
            what = self._record(step, loss)
            if self._in_row > self._limit:
                row = f", as in the {self._limit} steps before" if self._limit else ""
                raise NotFinite(f"{what} at step {step.number:,}{row} (samples in {self._path})")
            say(f"{what} at step {step.number:,}, which is skipped (samples in {self._path})")

    @property
    def _path(self) -> Path:
        return self._folder / "nonfinite.jsonl"

    def _record(self, step: _Step, loss: float) -> str:
        """Write down each rank's loss and samples, on rank 0; what is not finite, in words."""
        index: list[int] = step.index.tolist()
        names = [self._name(i) for i in index]
        own = {"step": step.number, "rank": distributed.rank(), "loss": str(loss), "samples": index, "names": names}
        lines = distributed.gather_objects(own)
        if distributed.rank() == 0:
            with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:  # a help, not worth the run
                file.writelines(json.dumps(line) + "\n" for line in lines)
        bad = [line for line in lines if not math.isfinite(float(line["loss"]))]
        if not bad:
            return "the gradient is not finite"
        return f"the loss is {bad[0]['loss']}" + (f" on rank {bad[0]['rank']}" if len(lines) > 1 else "")
