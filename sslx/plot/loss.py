"""The loss and the learning rate over the steps of a run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sslx.errors import MissingInput
from sslx.plot.canvas import GRAY, LR, PALETTE, SOFT, canvas, save, titles
from sslx.runs import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def loss_curve(metrics: Path, path: Path, *, title: str = "Pretraining loss") -> None:
    """Write a PNG of the loss (raw and running median) and the learning rate over the steps of a run.

    metrics: JSON lines; those with a ``step`` and a ``loss`` count; ``lr`` and ``epoch`` are shown if given.
    Of a step that came twice (a restart) the later line holds; lines cut short and losses that are not finite
    are passed over.  Raises MissingInput without a file or without a point in it.
    """
    if not metrics.is_file():
        raise MissingInput(f"expected the metrics of a run, but {metrics} is not there; check the run folder")
    points = _points(metrics)
    if not points:
        raise MissingInput(f"expected lines with a step and a loss in {metrics}, got none; let the run go on")
    step = np.array(sorted(points))
    loss, lr, epoch = (
        np.array([points[s].get(key, math.nan) for s in step.tolist()]) for key in ("loss", "lr", "epoch")
    )
    figure, axes = canvas(8.0, 4.6)
    many = len(step) > 20
    axes.plot(
        step, loss, color=PALETTE[0], alpha=0.3 if many else 1, linewidth=1, marker="" if many else "o", label="loss"
    )
    if many:
        width = max(5, len(step) // 40)
        axes.plot(step, _median(loss, width), color=PALETTE[0], linewidth=2, label="loss, running median")
        axes.set_ylim(*_limits(loss))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color=GRAY, linewidth=0.8)
    axes.ticklabel_format(axis="y", useOffset=False)
    _whole_steps(axes, step)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = list(axes.get_lines())
    lines += _lr_axis(axes, step, lr) if np.isfinite(lr).any() else []
    if len(lines) > 1:  # the legend stands below the axes, where it lies over no line
        names = [str(line.get_label()) for line in lines]
        axes.legend(lines, names, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), borderaxespad=0, ncols=3)
    marks = epoch_marks(step, epoch)
    if len(marks) > 1:
        _epoch_axis(axes, marks)
    titles(
        axes,
        title,
        f"{len(step):,} point{'s' * (len(step) > 1)}, last loss {loss[-1]:.4g} at step {step[-1]:,}",
        above=42 if len(marks) > 1 else 10,
    )
    save(figure, path)


def _points(metrics: Path) -> dict[int, dict[str, float]]:
    lines = records.read_metrics(metrics)
    return {int(line["step"]): line for line in lines if math.isfinite(line.get("loss", math.nan))}


def _median(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The running median over ``width`` values around each, fewer at the ends."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _limits(loss: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Of the loss axis: one spike should not flatten the curve."""
    low, high = float(loss.min()), float(np.quantile(loss, 0.995))
    pad = 0.05 * (high - low) or 0.5
    return low - pad, max(high, float(loss[: max(1, len(loss) // 100)].max())) + pad


def _lr_axis(axes: "Axes", step: npt.NDArray[np.int64], lr: npt.NDArray[np.float64]) -> "list[Line2D]":
    """The learning rate, on an axis of its own at the right; its line."""
    right = axes.twinx()
    lines = right.plot(step, lr, color=LR, linewidth=1.4, linestyle=(0, (4, 2)), label="learning rate")
    right.set_ylabel("learning rate", color=LR)
    right.tick_params(colors=LR)
    right.set_ylim(bottom=0)
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    return lines


def _whole_steps(axes: "Axes", step: npt.NDArray[np.int64]) -> None:
    """Ticks at whole steps, also of a run of one or two."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    pad = 0.01 * float(step[-1] - step[0]) or 0.5
    axes.set_xlim(float(step[0]) - pad, float(step[-1]) + pad)


def epoch_marks(step: npt.NDArray[np.int64], epoch: npt.NDArray[np.float64]) -> dict[int, float]:
    """Whole epochs, at most eleven, and the steps at which they ended, between those that were logged."""
    known = np.isfinite(epoch)
    if not known.any():
        return {}
    passed = np.maximum.accumulate(epoch[known])
    whole = range(math.ceil(passed[0]), math.floor(passed[-1]) + 1)
    every = max(1, -(-len(whole) // 10))
    marked = [number for number in whole if number % every == 0]
    return {number: float(np.interp(number, passed, step[known])) for number in marked}


def _epoch_axis(axes: "Axes", marks: dict[int, float]) -> None:
    """Whole epochs along the top."""
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(marks.values()), [f"{number:,}" for number in marks])
    top.set_xlabel("epoch", color=SOFT, fontsize=9)
    top.tick_params(colors=SOFT, labelsize=9)
    top.spines["top"].set_visible(False)
