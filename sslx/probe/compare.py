"""``sslx compare``: runs ranked by scores that need no labels, and how well the rankings agree with accuracies."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import scipy.stats
from rich.console import Console

from sslx.console.bars import say_to
from sslx.console.words import shown
from sslx.errors import ConfigError, DataError, MissingInput, StorageError
from sslx.machine import files
from sslx.probe import tables
from sslx.probe.tables import Column

MEASURES = {
    "rank": ("RankMe", "higher", "2210.02885"),
    "lidar": ("LiDAR", "higher", "2312.04000"),
    "alpha": ("alpha-ReQ", "nearer 1", "2202.05808"),
    "alignment": ("alignment", "lower", "2005.10242"),
    "uniformity": ("uniformity", "lower", "2005.10242"),
}
"""Scores without labels by their keys in ``probe.json``: name, which values are better, and the arXiv id."""
MEAN_RANK = "mean_rank"
ACCURACIES = {"knn": "kNN", "linear": "linear"}
INTERVAL = "95 % by Fisher's z with the standard error of Bonett and Wright (2000), sqrt((1 + rho^2 / 2) / (n - 3))"
_NAME = "pretrained encoder"  # of the row in probe.json
_MIN_RUNS = 4  # of the interval
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What ``probe.json`` says of a run's encoder.  scores, accuracies: by their keys, nan for what is missing."""

    folder: Path
    step: int
    images: tuple[Any, ...]
    setting: Mapping[str, Any]
    scores: Mapping[str, float]
    accuracies: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho of two rankings of ``num_runs`` runs, and its 95 % interval or None if there is none."""

    rho: float
    low: float | None
    high: float | None
    num_runs: int


@dataclass(frozen=True)
class Comparison:
    """Runs, the best first.

    ranks: of each run, by score, from 1 for the best, nan without one; ``mean_rank`` is their mean over scores.
    agreement: by score and accuracy, of those that can be compared.
    """

    runs: Sequence[Run]
    ranks: Mapping[str, Array]
    agreement: Mapping[str, Mapping[str, Agreement]]


def main(folders: Sequence[Path], output: Path | None) -> int:
    """Print the tables, write them as JSON to ``output`` if it is given, and return the exit code."""
    comparison = compare(read_all(folders))
    console = Console()
    say = say_to(console, True)
    for line in notes(comparison.runs):
        say(line)
    for table in tables.fitting(_names(comparison.runs), _columns(comparison), console, "run"):
        console.print(table)
    say("In parentheses: the rank by each score.  mean rank: over all of them, by which the runs are sorted.")
    if comparison.agreement:
        for table in tables.fitting(*_agreement_columns(comparison), console, "score"):
            console.print(table)
        say(f"rho: Spearman's, of the rankings by a score and by an accuracy; 1 if they agree.  Interval: {INTERVAL}")
    else:
        say("No rho with accuracies: it needs three or more runs that sslx probe has scored on images with labels.")
    say(f"Scores (arXiv): {', '.join(f'{name} {paper}' for name, _, paper in MEASURES.values())}")
    if output:
        try:
            files.replace(output, (json.dumps(as_json(comparison), indent=1) + "\n").encode())
        except OSError as error:
            raise StorageError(f"cannot write {shown(output)}: {files.reason(error)}") from error
        say(f"wrote {shown(output)}")
    return 0


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Read the scores of two or more runs.

    Raises ConfigError for fewer, MissingInput for folders without a run or without scores, all named at once, and
    DataError if the scores are of different images or a file is damaged.
    """
    if len(folders) < 2 or len({folder.resolve() for folder in folders}) < len(folders):
        got = _listed(folders) or "none"
        raise ConfigError(f"expected two or more different run folders, got {got}: sslx compare runs/A runs/B")
    if missing := [folder for folder in folders if not (folder / "config.json").is_file()]:
        raise MissingInput(f"expected the folders of runs, but these have no config.json: {_listed(missing)}")
    read = {folder: _read(folder) for folder in folders}
    if missing := [folder for folder, run in read.items() if run is None]:
        names = " ".join(shown(folder) for folder in missing)
        raise MissingInput(f"not probed yet, or only with labels: run sslx probe {names}")
    runs = [run for run in read.values() if run is not None]
    for run in runs:
        if run.images != runs[0].images:
            first, other = (" ".join(map(str, each.images)) for each in (runs[0], run))
            raise DataError(
                f"expected scores of the same images, but {shown(runs[0].folder)} was probed on {shown(first)} and "
                f"{shown(run.folder)} on {shown(other)}: probe them together, sslx probe RUN RUN"
            )
    return runs


def compare(runs: Sequence[Run]) -> Comparison:
    """Rank the runs by each score and by the mean of these ranks, and compare the rankings with the accuracies.

    The mean is over the scores that every run has.  A run without a score, such as the alpha of few dimensions, has no
    rank by it and does not count in its agreement.
    """
    ranks = dict[str, Array]()
    for key in MEASURES:
        goodness = np.array([_goodness(key, run.scores[key]) for run in runs])
        if np.isfinite(goodness).any():
            ranks[key] = scipy.stats.rankdata(-goodness, nan_policy="omit")
    common = [of_score for of_score in ranks.values() if np.isfinite(of_score).all()]
    ranks[MEAN_RANK] = np.mean(common, axis=0) if common else np.full(len(runs), np.nan)
    order = np.argsort(ranks[MEAN_RANK], kind="stable")
    runs, ranks = [runs[i] for i in order], {key: of_score[order] for key, of_score in ranks.items()}
    agreement = dict[str, dict[str, Agreement]]()
    for key, accuracy in itertools.product(ranks, ACCURACIES):
        found = spearman(-ranks[key], np.array([run.accuracies[accuracy] for run in runs]))
        if found:
            agreement.setdefault(key, {})[accuracy] = found
    return Comparison(runs, ranks, agreement)


def spearman(x: Array, y: Array) -> Agreement | None:
    """Return Spearman's rho of the finite pairs of x and y, both (N,), with its 95 % interval.

    The interval is tanh(atanh(rho) ± 1.96 se) with se² = (1 + rho² / 2) / (n - 3) (Bonett and Wright, Psychometrika 65,
    2000, equation 3).  It needs four pairs, and there is none at a rho of 1 or -1.
    Returns None for fewer than three pairs, or if all values of x or of y are equal.
    """
    both = np.isfinite(x) & np.isfinite(y)
    x, y, num = x[both], y[both], int(both.sum())
    if num < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    rho = float(cast(Any, scipy.stats.spearmanr(x, y)).statistic)
    if num < _MIN_RUNS or abs(rho) > 1 - 1e-9:
        return Agreement(rho, None, None, num)
    width = float(scipy.stats.norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / (num - 3))
    return Agreement(rho, math.tanh(math.atanh(rho) - width), math.tanh(math.atanh(rho) + width), num)


def notes(runs: Sequence[Run]) -> list[str]:
    """Return lines on differences between the runs that make their scores hard to compare."""
    words = {
        "view_px": "the size of views",
        "dim": "the number of dimensions, which bounds RankMe and LiDAR",
        "num_views": "the number of augmented views",
        "augmented_as": "the augmentation of the views, on which LiDAR, alignment and uniformity depend; "
        "to have the same one, probe them together",
    }
    differing = [text for key, text in words.items() if len({str(run.setting.get(key)) for run in runs}) > 1]
    return [f"note: the runs differ in {text}" for text in differing]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as values that JSON can hold, null for what is missing."""

    def plain(values: Mapping[str, float]) -> dict[str, float | None]:
        return {key: value if math.isfinite(value) else None for key, value in values.items()}

    return {
        "runs": [
            {"folder": str(run.folder), "step": run.step, **plain(run.scores), **plain(run.accuracies)}
            | {"ranks": plain({key: float(ranks[i]) for key, ranks in comparison.ranks.items()})}
            for i, run in enumerate(comparison.runs)
        ],
        "agreement": {
            key: {accuracy: asdict(found) for accuracy, found in by_accuracy.items()}
            for key, by_accuracy in comparison.agreement.items()
        },
        "interval": INTERVAL,
    }


def _read(folder: Path) -> Run | None:
    """Return what probe.json says of the pretrained encoder; None if it has no scores without labels."""
    path = folder / "probe.json"
    try:
        record = files.parse_json(files.read_bytes(path))
        free = _row(record.get("label_free", ()))
        labeled = _row(record["scores"])
        if free is None:
            return None
        return Run(
            folder=folder,
            step=int(record["step"]),
            images=(free["num_images"], "of", record["num_images"], record["split"], "images of", record["source"]),
            setting={**record, **free},
            scores={key: _number(free.get(key)) for key in MEASURES},
            accuracies={key: _number((labeled or {}).get(key)) for key in ACCURACIES},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{shown(path)} was not written by sslx probe ({files.reason(error)}): probe again") from error


def _row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["name"] == _NAME), None)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _goodness(key: str, value: float) -> float:
    """Return a number that is higher for a better value of a score."""
    better = MEASURES[key][1]
    return value if better == "higher" else -value if better == "lower" else -abs(value - 1)


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(shown(folder) for folder in folders)


def _columns(comparison: Comparison) -> list[list[Column]]:
    """Return groups of columns with the scores and ranks of the runs, and with their accuracies in percent."""

    def score(key: str) -> Column:
        pairs = zip([run.scores[key] for run in comparison.runs], comparison.ranks[key], strict=True)
        return MEASURES[key][0], [_cell(-rank, f"{value:.2f} ({rank:g})") for value, rank in pairs]

    keys = [key for key in MEASURES if key in comparison.ranks]
    accuracies = [
        (
            f"{name}\n%",
            [_cell(value, f"{100 * value:.1f}") for value in (run.accuracies[key] for run in comparison.runs)],
        )
        for key, name in ACCURACIES.items()
    ]
    mean = ("mean\nrank", [_cell(-rank, f"{rank:.1f}") for rank in comparison.ranks[MEAN_RANK]])
    return [[score(key)] for key in keys] + [[mean, *accuracies]]


def _cell(value: float, text: str) -> tuple[float | None, str]:
    return (value, text) if math.isfinite(value) else (None, "")


def _agreement_columns(comparison: Comparison) -> tuple[list[str], list[list[Column]]]:
    """Return the names of the scores, and groups of columns with Spearman's rho of each."""
    found = comparison.agreement
    measures = [MEASURES.get(key, ("mean rank", "lower", "")) for key in found]
    rho: list[list[Column]] = [
        [(f"rho with\n{name}", [(None, _words(row[key]) if key in row else "") for row in found.values()])]
        for key, name in ACCURACIES.items()
    ]
    counts = [sorted({each.num_runs for each in row.values()}) for row in found.values()]
    better: list[Column] = [("better", [(None, better) for _, better, _ in measures])]
    num_runs: list[Column] = [("runs", [(None, "/".join(map(str, each))) for each in counts])]
    return [name for name, _, _ in measures], [better, *rho, num_runs]


def _words(found: Agreement) -> str:
    if found.low is None:
        return f"{found.rho:.2f}"
    return f"{found.rho:.2f} [{found.low:.2f}, {found.high:.2f}]"
