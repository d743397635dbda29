"""The scorecard of a report: the scores in ``probe.json``, what each of them is, and its paper."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from sslx.console.words import plural

Score = Mapping[str, Any]
"""The scores of one representation, an entry of ``scores`` or ``label_free`` in ``probe.json``."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, and the value by which the best of a column is chosen (NaN: not compared)."""

    text: str
    value: float = math.nan


@dataclass(frozen=True)
class Column:
    """A column of the scorecard: its name, what it is, and the cells that it has for a representation."""

    name: str
    explanation: str
    paper: str
    cells: Callable[[Score], Mapping[str, Cell]]
    """Returns the cells by their heads: one, or one for each number of labels."""


@dataclass(frozen=True)
class Table:
    """A table: its title, the heads of its columns, and for each representation its run, its name and its cells."""

    title: str
    columns: Sequence[Column]
    heads: Sequence[str]
    rows: Sequence[tuple[int, str, Mapping[str, Cell]]]

    def is_best(self, head: str, cell: Cell) -> bool:
        """Return whether no other row has a better value in a compared column."""
        values = [cells[head].value for _, _, cells in self.rows if head in cells]
        return len(self.rows) > 1 and cell.value == max((v for v in values if math.isfinite(v)), default=math.nan)


def tables(probes: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the tables of the contents of the runs' ``probe.json``: with labels, without, and on further images."""
    found = [
        _table("With labels, accuracy in %", LABELED, [_entries(probe, "scores") for probe in probes]),
        _table("Without labels", LABEL_FREE, [_entries(probe, "label_free") for probe in probes]),
    ]
    names = dict.fromkeys(str(task.get("images")) for probe in probes for task in _entries(probe, "transfer"))
    for name in names:  # one table for each source of images
        scores = [
            [score for task in _entries(probe, "transfer") if str(task.get("images")) == name
             for score in _entries(task, "scores")]
            for probe in probes
        ]  # fmt: skip
        found.append(_table(f"Transfer to {name}, accuracy in %", LABELED, scores))
    return [table for table in found if table.heads]


def chosen(probe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings of the probes of each representation, which held-out training images chose, in words."""
    lines = list[tuple[str, str]]()
    for score in _entries(probe, "scores"):
        words = list[str]()
        if score.get("k"):
            tried = score.get("knn_held_out")
            by_k = [f"{k}: {100 * a:.1f}" for k, a in tried.items() if _is_number(a)] if isinstance(tried, dict) else []
            words.append(f"k = {score['k']}" + (f" (held-out accuracy by k: {', '.join(by_k)})" if by_k else ""))
        if _is_number(score.get("C")):
            words.append(f"C = {score['C']:g}")
        if _is_number(score.get("sgd_lr")):
            words.append(f"SGD with learning rate {score['sgd_lr']:g} and batches of {score.get('sgd_batch_size')}")
        fine_tuned = score.get("fine_tuned")
        found = list(fine_tuned.values()) if isinstance(fine_tuned, dict) else []
        recipes = dict.fromkeys(str(one["recipe"]) for one in found if isinstance(one, dict) and "recipe" in one)
        words += [f"fine-tuning by {recipe}" for recipe in recipes]
        if words:
            lines.append((str(score.get("name", "?")), "; ".join(words)))
    return lines


def accuracies(probe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values in % of the pretrained encoder's accuracies that stand at the top of the page."""
    return [
        (f"{column.name} accuracy", cell.text)
        for score in _entries(probe, "scores")
        if score.get("name") == "pretrained encoder"
        for column in LABELED
        if column.name in ("kNN", "linear")
        for cell in column.cells(score).values()
    ]


def _entries(probe: Mapping[str, Any], key: str) -> list[Score]:
    entries = probe.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _table(title: str, columns: Sequence[Column], scores: Sequence[Sequence[Score]]) -> Table:
    rows = [(number, score) for number, of_run in enumerate(scores) for score in of_run]
    used = [column for column in columns if any(column.cells(score) for _, score in rows)]
    cells = [{head: cell for column in used for head, cell in column.cells(score).items()} for _, score in rows]
    heads = {head: None for column in used for _, score in rows for head in column.cells(score)}
    names = [(number, str(score.get("name", "?"))) for number, score in rows]
    return Table(title, used, list(heads), [(*name, found) for name, found in zip(names, cells, strict=True)])


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _percent(key: str, head: str) -> Callable[[Score], dict[str, Cell]]:
    def cells(score: Score) -> dict[str, Cell]:
        value = score.get(key)
        return {head: Cell(f"{100 * value:.1f}", round(100 * value, 1))} if _is_number(value) else {}

    return cells


def _spreads(key: str, head: Callable[[str], str]) -> Callable[[Score], dict[str, Cell]]:
    """Return a function that gives one cell for each amount of labels: {"5": {"mean": 0.71, "std": 0.02}}, or 0.71."""

    def cells(score: Score) -> dict[str, Cell]:
        found, values = dict[str, Cell](), score.get(key)
        for amount, value in values.items() if isinstance(values, dict) else ():
            mean, std = (value.get("mean"), value.get("std")) if isinstance(value, dict) else (value, None)
            if _is_number(mean):
                text = f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if _is_number(std) else "")
                found[head(str(amount))] = Cell(text, round(100 * mean, 1))
        return found

    return cells


def _number(key: str, head: str, pattern: str, *, largest_is_best: bool = False) -> Callable[[Score], dict[str, Cell]]:
    def cells(score: Score) -> dict[str, Cell]:
        value = score.get(key)
        if not _is_number(value):
            return {}
        return {head: Cell(pattern.format(value), float(value) if largest_is_best else math.nan)}

    return cells


def _fraction(text: str) -> str:
    """Return the head of a column for a fraction of the labels, such as "1 % of labels"."""
    try:
        return "all labels" if float(text) == 1 else f"{100 * float(text):g} % of labels"
    except ValueError:
        return f"{text} of labels"


LABELED = (
    Column("kNN", "a vote of the k nearest training images, weighted by similarity",
           "arXiv 1805.01978, with k as in arXiv 2104.14294", _percent("knn", "kNN")),
    Column("linear", "logistic regression on the frozen features by L-BFGS", "equals scikit-learn's",
           _percent("linear", "linear")),
    Column("SGD", "the same by SGD, 100 epochs with momentum and a cosine schedule",
           "arXiv 1911.05722, arXiv 2104.14294", _percent("sgd", "SGD")),
    Column("fine-tuned", "the whole encoder, trained further on a fraction of the labels", "named below",
           _spreads("fine_tuned", lambda text: f"fine\u2011tuned, {_fraction(text)}")),
    Column("% of labels", "logistic regression on a fraction of each class, mean ± standard deviation of random draws",
           "arXiv 2002.05709", _spreads("fractions", _fraction)),
    Column("labels per class", "the same on a few images of each class", "arXiv 2204.07141",
           _spreads("low_shot", lambda text: f"{plural(int(text), 'label') if text.isdecimal() else text} per class")),
)  # fmt: skip
LABEL_FREE = (
    Column("rank", "RankMe, the number of directions that the features use; higher is better", "arXiv 2210.02885",
           _number("rank", "rank", "{:.1f}", largest_is_best=True)),
    Column("LiDAR", "the number of directions that tell images apart and not views of an image; higher is better",
           "arXiv 2312.04000", _number("lidar", "LiDAR", "{:.1f}", largest_is_best=True)),
    Column("alpha", "alpha-ReQ, how fast the variances of the directions decay; near 1 is best", "arXiv 2202.05808",
           _number("alpha", "alpha", "{:.2f}")),
    Column("std", "how far apart the features point; near 0 is a collapse", "", _number("std", "std", "{:.2f}")),
    Column("alignment", "squared distance between two augmented views of an image; lower is better, if std is high",
           "arXiv 2005.10242", _number("alignment", "alignment", "{:.2f}")),
    Column("uniformity", "how evenly the features cover the sphere; lower is better", "arXiv 2005.10242",
           _number("uniformity", "uniformity", "{:.2f}")),
    Column("retrieval", "augmented views whose nearest image is their own, in %; higher is better", "",
           _percent("retrieval", "retrieval, %")),
)  # fmt: skip
