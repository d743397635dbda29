"""Tables of scores: one row for each representation, in as few tables as fit the width of the terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sslx.console.words import shown

Column = tuple[str, list[tuple[float | None, str]]]
"""A head, and for each row the value by which the best is chosen (None: not compared) and the text."""


def percent(value: float | None, std: float | None = None) -> tuple[float | None, str]:
    """Return a cell for a fraction in [0, 1], with its standard deviation: the percentage as printed, and its text."""
    if value is None:
        return None, ""
    text = f"{100 * value:.1f}"
    return float(text), text if std is None else f"{text} ± {100 * std:.1f}"


def fitting(
    names: Sequence[str], groups: Sequence[Sequence[Column]], console: Console, kind: str = "representation"
) -> Iterator[Table]:
    """Yield tables with all groups of columns, as many groups in each as fit the width of the console.

    names: of the rows.  kind: what a row is of.  Columns without any text are left out.
    """
    kept = [[column for column in group if any(text for _, text in column[1])] for group in groups]
    current: list[Column] = []
    for group in filter(None, kept):
        if current and _width(table(names, [*current, *group], kind), console) > console.width:
            yield table(names, current, kind)
            current = []
        current += group
    if current:
        yield table(names, current, kind)


def table(names: Sequence[str], columns: Sequence[Column], kind: str = "representation") -> Table:
    """Return a table with one row for each name, and the best of each compared column in bold, unless it is alone."""
    result = Table()
    result.add_column(kind, overflow="fold")
    for head, _ in columns:
        result.add_column(head, justify="right", no_wrap="\n" not in head and " " not in head)
    best = [max((value for value, _ in cells if value is not None), default=None) for _, cells in columns]
    for row, name in enumerate(names):
        cells = [(cells[row], top) for (_, cells), top in zip(columns, best, strict=True)]
        texts = [
            Text().append(text, style="bold" if value is not None and value == top and len(names) > 1 else "")
            for (value, text), top in cells
        ]
        result.add_row(Text(shown(name)), *texts)
    return result


def _width(of: Table, console: Console) -> int:
    """Return the width at which no cell wraps."""
    return Measurement.get(console, console.options.update(max_width=10_000), of).maximum
