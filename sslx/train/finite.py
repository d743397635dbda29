"""Steps that are not finite are not taken, which all ranks decide together on the device.

A step whose loss or gradient is not finite on any rank leaves everything unchanged: parameters and optimizer (which
reads ``found_inf``), buffers (``Buffers``), and moving averages (``Method.after_step`` at a progress of 1).  It still
counts as a step, so later steps keep their images, learning rate and weight decay.  The host reads the verdict when it
waits for the device anyway (``Watch``).
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
MAX_UNREAD_STEPS = 20
"""The host reads a GPU's verdicts after this many steps at the latest, even if nothing is logged."""


class NotFinite(Exception):
    """The run cannot go on from here.  Raised on all ranks at the same step; its text says what is not finite."""


@torch.no_grad()
def agreed(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Return whether a step may be taken: loss and gradient norm are finite on all ranks.

    The result is () bool, on the device, the same on all ranks.  It takes one all-reduce of a number, for which the
    host does not wait.
    """
    is_finite = loss.detach().isfinite() & grad_norm.isfinite()
    return distributed.sum_over_ranks((~is_finite).float()) == 0


def step_if(taken: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step if ``taken`` is true, which is decided on the device.

    optimizer: one that reads ``found_inf``, as torch's GradScaler sets it for fused optimizers; all optimizers of
      ``optim.build`` do.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "this optimizer ignores found_inf"
    cast(Any, optimizer).found_inf = (~taken).float()
    optimizer.step()


class Buffers:
    """A copy of a module's buffers, to restore them later; it takes one operation per dtype, however many there are."""

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._copies = [(buffers, _flattened(buffers)) for buffers in by_dtype.values()]

    @torch.no_grad()
    def put_back(self, unless: Tensor | None = None) -> None:
        """Restore the buffers, except if ``unless``, () bool on their device, is true."""
        for buffers, before in self._copies:
            flat = before if unless is None else torch.where(unless, _flattened(buffers), before)
            parts = flat.split([buffer.numel() for buffer in buffers])
            foreach._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def counted(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a step's metrics for a sum over steps: all are 0 if it was not taken, so ``taken`` counts taken steps."""
    names = list(metrics)
    values = torch.stack([metrics[name].double() for name in names])
    return dict(zip(names, torch.where(metrics["taken"], values, 0.0).unbind(), strict=True))


def means(sums: dict[str, float]) -> dict[str, float]:
    """Return means over the steps that were taken, given those of ``counted`` over all steps; nan if none was taken."""
    fraction = sums.pop("taken")
    return {name: value / fraction if fraction else math.nan for name, value in sums.items()}


@dataclass(frozen=True)
class _Step:
    number: int
    flags: Tensor  # (2,) on the device: taken, loss
    index: Tensor  # of this rank's samples


class Watch:
    """Keeps track of the steps that were not taken.

    limit: the number of steps in a row that may be skipped; one more raises NotFinite.
    folder: the run folder, for ``nonfinite.jsonl``.  name: returns the name of the sample at an index.
    """

    def __init__(self, limit: int, folder: Path, device: torch.device, name: Callable[[int], str]) -> None:
        self._limit, self._folder, self._name = limit, folder, name
        self._every = 1 if device.type == "cpu" else MAX_UNREAD_STEPS
        self._none = torch.empty(0, dtype=torch.float64, device=device)
        self._steps: list[_Step] = []
        self._in_row = 0
        self.skipped = 0

    def add(self, number: int, metrics: dict[str, Tensor], batches: Sequence[Batch]) -> None:
        """Remember a step's verdict and samples without waiting for the device."""
        flags = torch.stack([metrics["taken"].double(), metrics["loss"].double()])
        self._steps.append(_Step(number, flags, torch.cat([batch.index for batch in batches])))

    def look(self, say: Callable[[str], None]) -> None:
        """Read and ``judge`` the verdicts once enough steps have none; every rank calls this together."""
        if len(self._steps) >= self._every:
            self.judge(say, self.pending().tolist())  # sync point

    def pending(self) -> Tensor:
        """Return the verdicts that the host has not read yet, (2 * steps,) float64, on the device."""
        return torch.cat([step.flags for step in self._steps]) if self._steps else self._none

    def judge(self, say: Callable[[str], None], verdicts: Sequence[float]) -> None:
        """Record the samples of each step that was not taken in ``nonfinite.jsonl``, and say a line about each.

        verdicts: those of ``pending``.  Raises NotFinite if too many steps in a row were not taken.
        """
        steps, self._steps = self._steps, []
        for step, taken, loss in zip(steps, verdicts[::2], verdicts[1::2], strict=True):
            if taken:
                self._in_row = 0
                continue
            self._in_row += 1
            self.skipped += 1
            reason = self._record(step, loss)
            if self._in_row > self._limit:
                repeated = f", as in the {self._limit} steps before" if self._limit else ""
                raise NotFinite(f"{reason} at step {step.number:,}{repeated} (samples in {self._path})")
            say(f"{reason} at step {step.number:,}, which is skipped (samples in {self._path})")

    @property
    def _path(self) -> Path:
        return self._folder / "nonfinite.jsonl"

    def _record(self, step: _Step, loss: float) -> str:
        """Write each rank's loss and samples to the file, on rank 0; return in words what is not finite."""
        index: list[int] = step.index.tolist()
        names = [self._name(i) for i in index]
        own = {"step": step.number, "rank": distributed.rank(), "loss": str(loss), "samples": index, "names": names}
        lines = distributed.gather_objects(own)
        if distributed.rank() == 0:
            with suppress(OSError), open(self._path, "a", encoding="utf-8") as file:  # the record is not worth the run
                file.writelines(json.dumps(line) + "\n" for line in lines)
        not_finite = [line for line in lines if not math.isfinite(float(line["loss"]))]
        if not not_finite:
            return "the gradient is not finite"
        where = f" on rank {not_finite[0]['rank']}" if len(lines) > 1 else ""
        return f"the loss is {not_finite[0]['loss']}{where}"
