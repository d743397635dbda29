"""A picture of the loss and the learning rate over the steps of a run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sslx.console.words import plural
from sslx.errors import MissingInput
from sslx.plot.canvas import GRAY, LR_COLOR, PALETTE, SOFT, canvas, save, titles
from sslx.runs import records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def loss_curve(metrics: Path, path: Path, *, title: str = "Pretraining loss") -> None:
    """Write a PNG of the loss (raw and running median) and the learning rate over the steps of a run.

    metrics: JSON lines, of which those with a ``step`` and a ``loss`` are shown, with their ``lr`` and ``epoch`` if
      they have them.  If a restart repeated a step, its last line is shown.  Truncated lines and losses that are not
      finite are skipped.
    Raises MissingInput if there is no file or nothing to show in it.
    """
    if not metrics.is_file():
        raise MissingInput(f"expected the metrics of a run, but {metrics} does not exist: check the run folder")
    points = _points(metrics)
    if not points:
        raise MissingInput(f"expected lines with a step and a loss in {metrics}, got none: let the run continue")
    step = np.array(sorted(points))
    loss, lr, epoch = (
        np.array([points[s].get(key, math.nan) for s in step.tolist()]) for key in ("loss", "lr", "epoch")
    )
    figure, axes = canvas(8.0, 4.6)
    if len(step) > 20:
        width = max(5, len(step) // 40)
        axes.plot(step, loss, color=PALETTE[0], alpha=0.3, linewidth=1, label="loss")
        axes.plot(step, _running_median(loss, width), color=PALETTE[0], linewidth=2, label="loss, running median")
        axes.set_ylim(*_limits(loss))
    else:
        axes.plot(step, loss, color=PALETTE[0], linewidth=1, marker="o", label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color=GRAY, linewidth=0.8)
    axes.ticklabel_format(axis="y", useOffset=False)
    _whole_steps(axes, step)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = list(axes.get_lines())
    if np.isfinite(lr).any():
        lines += _draw_lr(axes, step, lr)
    if len(lines) > 1:  # the legend stands below the axes, where it does not cover a line
        names = [str(line.get_label()) for line in lines]
        axes.legend(lines, names, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), borderaxespad=0, ncols=3)
    marks = epoch_marks(step, epoch)
    if len(marks) > 1:
        _draw_epochs(axes, marks)
    titles(
        axes,
        title,
        f"{plural(len(step), 'point')}, last loss {loss[-1]:.4g} at step {step[-1]:,}",
        above=42 if len(marks) > 1 else 10,
    )
    save(figure, path)


def _points(metrics: Path) -> dict[int, dict[str, float]]:
    lines = records.read_metrics(metrics)
    return {int(line["step"]): line for line in lines if math.isfinite(line.get("loss", math.nan))}


def _running_median(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the running median over about ``width`` values, fewer at the ends."""
    half = width // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _limits(loss: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the limits of the loss axis, which ignore a few spikes that would flatten the curve."""
    low, high = float(loss.min()), float(np.quantile(loss, 0.995))
    pad = 0.05 * (high - low) or 0.5
    return low - pad, max(high, float(loss[: max(1, len(loss) // 100)].max())) + pad


def _draw_lr(axes: "Axes", step: npt.NDArray[np.int64], lr: npt.NDArray[np.float64]) -> "list[Line2D]":
    """Draw the learning rate with a separate axis on the right, and return its line."""
    right = axes.twinx()
    lines = right.plot(step, lr, color=LR_COLOR, linewidth=1.4, linestyle=(0, (4, 2)), label="learning rate")
    right.set_ylabel("learning rate", color=LR_COLOR)
    right.tick_params(colors=LR_COLOR)
    right.set_ylim(bottom=0)
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    return lines


def _whole_steps(axes: "Axes", step: npt.NDArray[np.int64]) -> None:
    """Put ticks at whole steps, even for a run of one or two steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    pad = 0.01 * float(step[-1] - step[0]) or 0.5
    axes.set_xlim(float(step[0]) - pad, float(step[-1]) + pad)


def epoch_marks(step: npt.NDArray[np.int64], epoch: npt.NDArray[np.float64]) -> dict[int, float]:
    """Return at most eleven whole epochs and the steps at which they ended, interpolated between logged steps."""
    is_logged = np.isfinite(epoch)
    if not is_logged.any():
        return {}
    logged = np.maximum.accumulate(epoch[is_logged])
    whole = range(math.ceil(logged[0]), math.floor(logged[-1]) + 1)
    interval = max(1, -(-len(whole) // 10))
    marked = [number for number in whole if number % interval == 0]
    return {number: float(np.interp(number, logged, step[is_logged])) for number in marked}


def _draw_epochs(axes: "Axes", marks: dict[int, float]) -> None:
    """Mark whole epochs along the top."""
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(marks.values()), [f"{number:,}" for number in marks])
    top.set_xlabel("epoch", color=SOFT, fontsize=9)
    top.tick_params(colors=SOFT, labelsize=9)
    top.spines["top"].set_visible(False)
