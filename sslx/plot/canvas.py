"""Parts that all pictures share: the canvas, colors, markers, titles, the legend and the file format."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sslx.console.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten of the colors of Okabe and Ito, Tol, and Petroff.  Of the choices that were searched, this one has the largest
# minimum distance in OKLab over normal, protan, deutan and tritan vision (simulated as in Machado et al. 2009).
PALETTE = (
    "#3f90da", "#e69f00", "#228833", "#ee3377", "#832db6",
    "#66ccee", "#000000", "#b2df8a", "#882255", "#332288",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "d")
"""A different marker for each of ten classes, which distinguishes them without colors."""
INK, SOFT, GRAY, LR_COLOR = "#22262b", "#6b7280", "#e5e7eb", "#c2571a"
DPI = 160
OPACITY = 0.85
"""Opacity of the points of a map."""


def legend(axes: "Axes", styles: Mapping[str, tuple[str, str]]) -> None:
    """Draw a legend of names and their (color, marker) to the right of the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=marker, markersize=8, markeredgewidth=0, color=color, label="class")
        for color, marker in styles.values()
    ]
    is_long = len(handles) > 10
    entries = axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8 if is_long else 10,
        labelspacing=0.5 if is_long else 0.8,
        handletextpad=0.2,
    )
    # matplotlib interprets dollar signs and a leading underscore in labels, so the names are set afterwards.
    for text, name in zip(entries.get_texts(), styles, strict=True):
        text.set_parse_math(False)
        text.set_text(shown(name, 60))


def canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure and its axes, ``width`` by ``height`` inches.

    They are made without pyplot, whose global state would outlive the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def titles(axes: "Axes", title: str, subtitle: str, *, above: float = 4) -> None:
    """Write a title and a subtitle, left-aligned with the axes and ``above`` points over them."""
    for text, height, size, weight, color in (
        (title, above + 18, 14, "bold", INK),
        (subtitle, above, 10, "normal", SOFT),
    ):
        axes.annotate(
            shown(text, 160),
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, height),
            textcoords="offset points",
            fontsize=size,
            fontweight=weight,
            color=color,
            parse_math=False,  # the user's names may contain dollar signs
        )


def save(figure: "Figure", path: Path) -> None:
    """Write the figure as SVG or PNG, by the path's suffix; the same figure gives the same bytes."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    is_svg = path.suffix == ".svg"
    metadata = {"Date": None} if is_svg else {}  # a date would make every file different
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sslx"}):
        figure.savefig(
            path,
            format="svg" if is_svg else "png",
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.2,
            metadata=metadata,
        )
