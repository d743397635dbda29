"""Charts of measurements: bars, lines through points, a roofline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslx.plot.canvas import GRAY, INK, LR_COLOR, OPACITY, PALETTE, canvas, legend, save, titles


def roofline(
    points: Sequence[tuple[str, float, float, float]], peak: float, bandwidth: float, path: Path, title: str
) -> None:
    """Write a roofline (Williams, Waterman and Patterson, CACM 2009): how close each operator comes to the roof.

    points: (name, share of the time in [0, 1], FLOP/byte, FLOP/s).  peak: FLOP/s.  bandwidth: bytes/s.
    """
    figure, axes = canvas(8.0, 5.6)
    intensities = [intensity for _, _, intensity, _ in points]
    low, high = min(intensities) / 3, max(*intensities, peak / bandwidth) * 6
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(x * bandwidth, peak), color=INK, linewidth=1.5)
    for number, (name, share, intensity, rate) in enumerate(points):
        color = PALETTE[number % len(PALETTE)]
        axes.scatter([intensity], [rate], s=40 + 900 * share, color=color, alpha=OPACITY, linewidths=0, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("floating-point operations / byte")
    axes.set_ylabel("floating-point operations / s")
    axes.grid(color=GRAY, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    labels = [f"{name}, {100 * share:.0f} %" for name, share, _, _ in points]
    legend(axes, {label: (PALETTE[number % len(PALETTE)], "o") for number, label in enumerate(labels)})
    roofs = f"roofs: {peak / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s, measured here; areas: share of the time"
    titles(axes, title, roofs, above=10)
    save(figure, path)


def bars(
    rows: Sequence[tuple[str, float, float, float]],
    path: Path,
    title: str,
    subtitle: str,
    *,
    highlight: str = "",
    line: tuple[str, float] | None = None,
) -> None:
    """Write horizontal bars, as a PNG or SVG by the path's suffix.

    rows: (name, value, low, high) from the top; a thin line spans low to high.  highlight: bars whose name begins with
    it are colored and the others gray; "" colors all.  line: name and value of a line across all bars.
    """
    figure, axes = canvas(8.0, 0.42 * len(rows) + 0.9)
    most = max(high for _, _, _, high in rows)
    for place, (name, value, low, high) in enumerate(rows):
        axes.barh(place, value, color=PALETTE[0] if name.startswith(highlight) else "#c3c8d0", height=0.62)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.6, solid_capstyle="butt")
        text = f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
        axes.text(max(value, high) + 0.012 * most, place, text, va="center", color=INK, fontsize=9)
    if line is not None:
        axes.axvline(line[1], color=LR_COLOR, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.text(line[1], len(rows) - 0.42, line[0], color=LR_COLOR, fontsize=9, ha="center", va="top")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * most)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    titles(axes, title, subtitle)
    save(figure, path)


def curves(
    series: Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]],
    path: Path,
    title: str,
    subtitle: str,
    *,
    x: str,
    y: str,
    powers_of_2: bool = False,
) -> None:
    """Write lines through points, as a PNG or SVG by the path's suffix.

    series: (name, points), each point (x, y, low, high); a thin line spans low to high.  x, y: names of the axes.
    """
    figure, axes = canvas(8.0, 4.6)
    for (name, points), color in zip(series, PALETTE, strict=False):
        along, value, low, high = zip(*points, strict=True)
        axes.plot(along, value, color=color, linewidth=2, marker="o", markersize=5, label=name)
        axes.vlines(along, low, high, color=color, linewidth=1.4)
    if powers_of_2:
        every = sorted({point[0] for _, points in series for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [f"{value:g}" for value in every])
        axes.set_ylim(bottom=0)  # readers compare ratios
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color=GRAY, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best")
    titles(axes, title, subtitle, above=10)
    save(figure, path)
