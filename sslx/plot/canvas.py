"""What all pictures share: canvas, colors, markers, titles, legend, the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sslx.console.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten of Okabe and Ito's, Tol's and Petroff's colors: the choice with the largest least distance in OKLab for
# normal, protan, deutan and tritan vision together (as Machado et al. 2009 simulate them) that was found.
PALETTE = (
    "#3f90da", "#e69f00", "#228833", "#ee3377", "#832db6",
    "#66ccee", "#000000", "#b2df8a", "#882255", "#332288",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "d")
"""Of ten classes, each its own: what tells them apart in gray."""
INK, SOFT, GRAY, LR = "#22262b", "#6b7280", "#e5e7eb", "#c2571a"
DPI = 160
OPACITY = 0.85
"""Of the points of a map."""


def legend(axes: "Axes", looks: Mapping[str, tuple[str, str]]) -> None:
    """Names with their (color, marker), right of the axes."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], linestyle="", marker=marker, markersize=8, markeredgewidth=0, color=color, label="class")
        for color, marker in looks.values()
    ]
    small = len(marks) > 10
    drawn = axes.legend(
        handles=marks,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8 if small else 10,
        labelspacing=0.5 if small else 0.8,
        handletextpad=0.2,
    )
    for text, name in zip(drawn.get_texts(), looks, strict=True):  # a label's dollars and first underscore mean more
        text.set_parse_math(False)
        text.set_text(shown(name, 60))


def canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure and axes without pyplot, whose global state would outlive the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def titles(axes: "Axes", title: str, subtitle: str, *, above: float = 4) -> None:
    """Two lines from the upper left corner of the axes on, ``above`` points over it."""
    for text, height, size, weight, colour in (
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
            color=colour,
            parse_math=False,  # names from outside may have dollars
        )


def save(figure: "Figure", path: Path) -> None:
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    form = "svg" if path.suffix == ".svg" else "png"
    made = {"Date": None} if form == "svg" else {}  # the same data, the same file
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sslx"}):
        figure.savefig(path, format=form, dpi=DPI, bbox_inches="tight", pad_inches=0.2, metadata=made)
