"""The curves of a report: one small chart for each metric, with all runs in it, as SVG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sslx.plot.canvas import GRAY, INK, PALETTE, SOFT
from sslx.report.facts import Facts

WIDTH, HEIGHT = 4.4, 2.7
"""Of a chart, in inches.  On a phone it is as wide as the screen."""


@dataclass(frozen=True)
class Chart:
    """A chart: its title, the metric in ``metrics.jsonl``, and what a reader should know about it."""

    title: str
    metric: str
    note: str = ""
    is_share: bool = False


CHARTS = (
    Chart("Loss", "loss"),
    Chart("kNN accuracy", "knn", "online, of some test images", is_share=True),
    Chart("Learning rate", "lr"),
    Chart("Images per second", "samples_per_s"),
    Chart("Wait for data", "data_wait", "share of a step's time, of the slowest rank", is_share=True),
    Chart("Slowest rank", "slowest_rank_s", "its own seconds per step, waits for data included"),
    Chart("Other ranks", "other_ranks_s", "median of their own seconds per step"),
    Chart("Unreadable images", "unreadable_images", "found so far"),
    Chart("Skipped steps", "skipped_steps", "whose loss or gradient was not finite"),
    Chart("Gradient norm", "grad_norm", "before clipping"),
    Chart("Feature rank", "feature_rank", "RankMe, arXiv 2210.02885; higher is better"),
    Chart("Feature standard deviation", "feature_std", "0 is collapse"),
    Chart("Alignment", "feature_alignment", "distance of two views' features, arXiv 2005.10242; lower is better"),
    Chart("Uniformity", "feature_uniformity", "of features on the sphere, arXiv 2005.10242; lower is better"),
)
_SHOWN = {chart.metric for chart in CHARTS} | {"epoch", "slowest_rank"}


def charts(runs: Sequence[Facts]) -> list[Chart]:
    """Return the charts for which a run has two points or more, the method's own metrics last."""
    own = sorted({name for run in runs for name in run.curves} - _SHOWN)
    every = [*CHARTS, *(Chart(f"{name.replace('_', ' ').capitalize()} (of the method)", name) for name in own)]
    return [
        chart
        for chart in every
        if any(len(run.curves[chart.metric][0]) > 1 for run in runs if chart.metric in run.curves)
    ]


def svg(chart: Chart, runs: Sequence[Facts]) -> str:
    """Return a chart of all runs as SVG.  The color of run i is ``color(i)``."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        if chart.metric not in run.curves:
            continue
        steps, values = run.curves[chart.metric]
        values = 100 * values if chart.is_share else values
        is_noisy = len(steps) > 40
        axes.plot(steps, values, color=color(number), linewidth=1, alpha=0.3 if is_noisy else 1, marker=_marker(steps))
        if is_noisy:
            axes.plot(steps, _running_median(values), color=color(number), linewidth=1.8)
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    if chart.is_share:
        axes.set_ylabel("%", color=SOFT, fontsize=9)
    axes.grid(axis="y", color=GRAY, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.ticklabel_format(axis="x", style="plain")
    axes.locator_params(nbins=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sslx", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def color(number: int) -> str:
    """Return the color of a run, by its number in the report."""
    return PALETTE[number % len(PALETTE)]


def _marker(steps: npt.NDArray[np.float64]) -> str:
    return "o" if len(steps) < 3 else ""


def _running_median(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the running median over about a fortieth of the values, fewer at the ends."""
    half = max(2, len(values) // 80)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
