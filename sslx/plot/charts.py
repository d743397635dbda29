"""Pictures: a t-SNE map of the features, the loss over training, what a method shows of images, and measurements."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import outcome, rng
from sslx.data.views import ViewSpec
from sslx.errors import DataError, MissingInput
from sslx.probe.features import by_class
from sslx.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten of Okabe and Ito's, Tol's and Petroff's colours: the choice with the largest least distance in OKLab for
# normal, protan, deutan and tritan vision together (as Machado et al. 2009 simulate them) that was found.
PALETTE = (
    "#3f90da", "#e69f00", "#228833", "#ee3377", "#832db6",
    "#66ccee", "#000000", "#b2df8a", "#882255", "#332288",
)  # fmt: skip
_INK, _SOFT, _LR = "#22262b", "#6b7280", "#c2571a"
_DPI = 160
OPACITY = 0.85
"""Of the points of a map."""


def tsne(
    features: Tensor,
    labels: Tensor | None,
    classes: tuple[str, ...] | None,
    path: Path,
    title: str,
    *,
    max_points: int = 2000,
    seed: int = 0,
) -> None:
    """Write a PNG with a t-SNE map (van der Maaten and Hinton, JMLR 2008) of features (N, D).

    labels: (N,) int64, shown by colour, or None (one colour).  classes: their names; without them the labels'
    numbers.  At most ``max_points`` samples are shown, each class by its share, drawn from ``seed``, which
    t-SNE gets as well.  Ten or fewer classes get colours that most colour-blind readers can tell apart; more
    than twenty get no legend.  Raises DataError for fewer than 4 samples.
    """
    rows = torch.from_numpy(subsample(len(features), labels, max_points, seed))
    place, collapsed = _map(features[rows].double().numpy(), seed)
    subtitle = f"t-SNE of {len(rows):,}" + (f" of {len(features):,}" if len(rows) < len(features) else "")
    subtitle += " samples" + (", whose features are all the same (collapsed)" if collapsed else "")
    figure, axes = _canvas(8.0, 7.2)
    size = 26 * min(1.0, (800 / len(rows)) ** 0.5) + 4
    if labels is None:
        axes.scatter(*place.T, s=size, c=PALETTE[0], alpha=OPACITY, linewidths=0)
    else:
        label = labels[rows].numpy()
        present = np.unique(label).tolist()
        colour = _colours(labels)
        axes.scatter(*place.T, s=size, c=[colour[int(c)] for c in label], alpha=OPACITY, linewidths=0)
        if len(present) <= 20:
            _legend(axes, {str(classes[c] if classes else c): colour[c] for c in present})
        else:
            subtitle += f", {len(present)} classes by colour (too many for a legend)"
    axes.set_aspect("equal")
    axes.margins(0.02)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    _titles(axes, title, subtitle)
    _save(figure, path)


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
    figure, axes = _canvas(8.0, 4.6)
    many = len(step) > 20
    marker = "o" if len(step) < 3 else ""
    axes.plot(step, loss, color=PALETTE[0], alpha=0.3 if many else 1, linewidth=1, marker=marker, label="loss")
    if many:
        width = max(5, len(step) // 40)
        axes.plot(step, _median(loss, width), color=PALETTE[0], linewidth=2, label="loss, running median")
        axes.set_ylim(*_limits(loss))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if np.isfinite(lr).any():
        _lr_axis(axes, step, lr)
    with_epochs = len(step) > 1 and bool(np.isfinite(epoch).any())
    if with_epochs:
        _epoch_axis(axes, step, epoch)
    _titles(
        axes,
        title,
        f"{len(step):,} points, last loss {loss[-1]:.4g} at step {step[-1]:,}",
        above=42 if with_epochs else 10,
    )
    _save(figure, path)


def images(rows: Sequence[tuple[str, Tensor]], view: ViewSpec, path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of rows of images, each with its name: the same B samples in every row, one below the other.

    rows: of (B, 3, H, W) images, normalised with the view's mean and std; what is outside of [0, 1] then is cut off.
    Small images are enlarged pixel by pixel.
    """
    gap, num = 0.06, len(rows[0][1])  # in images
    figure, axes = _canvas(1.5 * num, 1.6 * len(rows))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    for row, (_, samples) in enumerate(rows):
        pixels = (samples.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for column, image in enumerate(pixels):
            left, top = (1 + gap) * column, (1 + gap) * row
            axes.imshow(image, extent=(left, left + 1, top + 1, top))
    axes.set_xlim(0, (1 + gap) * num - gap)
    axes.set_ylim((1 + gap) * len(rows) - gap, 0)
    axes.set_xticks([])
    axes.set_yticks(
        [(1 + gap) * row + 0.5 for row in range(len(rows))], [shown(name, 60) for name, _ in rows], parse_math=False
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _titles(axes, title, subtitle, above=10)
    _save(figure, path)


def roofline(
    points: Sequence[tuple[str, float, float, float]], peak: float, bandwidth: float, path: Path, title: str
) -> None:
    """Write a roofline (Williams, Waterman and Patterson, CACM 2009): what each operator reaches of the roof.

    points: (name, share of the time in [0, 1], FLOP/byte, FLOP/s).  peak: FLOP/s.  bandwidth: bytes/s.
    """
    figure, axes = _canvas(8.0, 5.6)
    intensities = [intensity for _, _, intensity, _ in points]
    low, high = min(intensities) / 3, max(*intensities, peak / bandwidth) * 6
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(x * bandwidth, peak), color=_INK, linewidth=1.5)
    for number, (name, share, intensity, rate) in enumerate(points):
        colour = PALETTE[number % len(PALETTE)]
        axes.scatter([intensity], [rate], s=40 + 900 * share, color=colour, alpha=OPACITY, linewidths=0, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("floating-point operations / byte")
    axes.set_ylabel("floating-point operations / s")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    labels = [f"{name}, {100 * share:.0f} %" for name, share, _, _ in points]
    _legend(axes, {label: PALETTE[number % len(PALETTE)] for number, label in enumerate(labels)})
    roofs = f"roofs: {peak / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s, measured here; areas: share of the time"
    _titles(axes, title, roofs, above=10)
    _save(figure, path)


def bars(
    rows: Sequence[tuple[str, float, float, float]],
    path: Path,
    title: str,
    subtitle: str,
    *,
    ours: str = "",
    line: tuple[str, float] | None = None,
) -> None:
    """Write horizontal bars, as a PNG or SVG by the path's suffix.

    rows: (name, value, and from where to where it spreads), from the top.  ours: those whose name begins so are
    coloured, the others gray; "" colours all.  line: a name and a value to compare with, drawn across.
    """
    figure, axes = _canvas(8.0, 0.42 * len(rows) + 0.9)
    most = max(high for _, _, _, high in rows)
    for place, (name, value, low, high) in enumerate(rows):
        axes.barh(place, value, color=PALETTE[0] if name.startswith(ours) else "#c3c8d0", height=0.62)
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.6, solid_capstyle="butt")
        text = f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
        axes.text(max(value, high) + 0.012 * most, place, text, va="center", color=_INK, fontsize=9)
    if line is not None:
        axes.axvline(line[1], color=_LR, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.text(line[1], len(rows) - 0.42, line[0], color=_LR, fontsize=9, ha="center", va="top")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * most)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    _titles(axes, title, subtitle)
    _save(figure, path)


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

    series: (name, points), of which each is (x, y, and from where to where y spreads).  x, y: the axes' names.
    """
    figure, axes = _canvas(8.0, 4.6)
    for (name, points), colour in zip(series, PALETTE, strict=False):
        along, value, low, high = zip(*points, strict=True)
        axes.plot(along, value, color=colour, linewidth=2, marker="o", markersize=5, label=name)
        axes.vlines(along, low, high, color=colour, linewidth=1.4)
    if powers_of_2:
        every = sorted({point[0] for _, points in series for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [f"{value:g}" for value in every])
        axes.set_ylim(bottom=0)  # a ratio is what such a curve is looked at for
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best")
    _titles(axes, title, subtitle, above=10)
    _save(figure, path)


def subsample(size: int, labels: Tensor | None, most: int, seed: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of ``range(size)``, ascending; with labels each class by its share, at least one."""
    if size <= most:
        return np.arange(size)
    if labels is None:
        return np.sort(rng.permutation(seed, "plot", size=size)[:most])
    rows = by_class(labels, seed, "plot").values()
    # Each row stands at its quantile within its class, so the first ones of the merged order are stratified.
    quantile = np.concatenate([(np.arange(len(r)) + 0.5) / len(r) for r in rows])
    first = np.concatenate([np.arange(len(r)) > 0 for r in rows])
    return np.sort(np.concatenate(list(rows))[np.lexsort((quantile, first))[:most]])


def _map(x: npt.NDArray[np.float64], seed: int) -> tuple[npt.NDArray[np.float64], bool]:
    """((N, 2) t-SNE places, whether all rows of x (N, D) are the same, which t-SNE has no map of)."""
    from sklearn.manifold import TSNE

    if len(x) < 4:
        raise DataError(f"expected 4 or more samples to map by t-SNE, got {len(x)}; give it more of them")
    if not np.ptp(x, axis=0).any():
        return np.zeros((len(x), 2)), True
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x), False


def _points(metrics: Path) -> dict[int, dict[str, float]]:
    lines = outcome.read_metrics(metrics)
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


def _lr_axis(axes: "Axes", step: npt.NDArray[np.int64], lr: npt.NDArray[np.float64]) -> None:
    right = axes.twinx()
    right.plot(step, lr, color=_LR, linewidth=1.2, linestyle=(0, (4, 2)), label="learning rate")
    right.set_ylabel("learning rate", color=_LR)
    right.tick_params(colors=_LR)
    right.set_ylim(bottom=0)
    right.margins(x=0.01)
    for side in ("top", "left"):
        right.spines[side].set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="upper right")


def _epoch_axis(axes: "Axes", step: npt.NDArray[np.int64], epoch: npt.NDArray[np.float64]) -> None:
    """Whole epochs along the top, each where its first point is."""
    firsts = {int(e): int(s) for s, e in zip(step[::-1], epoch[::-1], strict=True) if math.isfinite(e)}
    every = max(1, -(-len(firsts) // 10))
    marked = sorted(firsts)[::every]
    top = axes.secondary_xaxis("top")
    top.set_xticks([firsts[e] for e in marked], [str(e) for e in marked])
    top.set_xlabel("epoch", color=_SOFT, fontsize=9)
    top.tick_params(colors=_SOFT, labelsize=9)
    top.spines["top"].set_visible(False)


def _colours(labels: Tensor) -> dict[int, str]:
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_hex

    classes = labels.unique().tolist()
    if len(classes) <= len(PALETTE):
        colours = list(PALETTE)
    elif len(classes) <= 20:
        colours = [to_hex(colormaps["tab20"](i)) for i in range(20)]
    else:
        hues = np.arange(len(classes)) / len(classes)
        colours = [to_hex(tuple(hsv_to_rgb((h, 0.75, (0.95, 0.7, 0.5)[i % 3])))) for i, h in enumerate(hues)]
    return dict(zip(classes, colours, strict=False))


def _legend(axes: "Axes", colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], linestyle="", marker="o", markersize=8, markeredgewidth=0, color=colour, label="class")
        for colour in colours.values()
    ]
    small = len(marks) > 10
    legend = axes.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8 if small else 10,
        labelspacing=0.5 if small else 0.8,
        handletextpad=0.2,
    )
    for text, name in zip(legend.get_texts(), colours, strict=True):  # a label's dollars and first underscore mean more
        text.set_parse_math(False)
        text.set_text(shown(name, 60))


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure and axes without pyplot, whose global state would outlive the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _titles(axes: "Axes", title: str, subtitle: str, *, above: float = 4) -> None:
    """Two lines from the upper left corner of the axes on, ``above`` points over it."""
    for text, height, size, weight, colour in (
        (title, above + 18, 14, "bold", _INK),
        (subtitle, above, 10, "normal", _SOFT),
    ):
        axes.annotate(
            shown(text, 160),
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, height),
            textcoords="offset points",
            fontsize=size,
            fontweight=weight,
            color=colour,
            parse_math=False,  # names from outside may have dollars
        )


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    form = "svg" if path.suffix == ".svg" else "png"
    made = {"Date": None} if form == "svg" else {}  # the same data, the same file
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sslx"}):
        figure.savefig(path, format=form, dpi=_DPI, bbox_inches="tight", pad_inches=0.2, metadata=made)
