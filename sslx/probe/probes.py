"""Runs the kNN, linear and few-label probes on a representation, and presents their scores."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sslx.console.words import plural, shown
from sslx.errors import DataError
from sslx.probe import knn, linear, low_shot
from sslx.probe.config import Config
from sslx.probe.features import Features, Progress, no_progress


def feasible_probes(config: Config, label: Tensor, classes: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the probes that the training labels (N,) allow, and a line for each that is left out or changed.

    classes: the names of the labels.  Classes without training samples are ignored.
    """
    counts = {c: n for c, n in enumerate(label.bincount().tolist()) if n}
    if len(counts) < 2:
        return config, []  # evaluate raises an error
    lines: list[str] = []
    rarest = min(counts, key=lambda c: counts[c])
    name = shown(classes[rarest]) if rarest < len(classes) else str(rarest)
    for shots in config.shots:
        if shots > counts[rarest]:
            available = plural(counts[rarest], "training image")
            lines.append(f"no probe with {shots} labels per class: class {name} has {available}")
    if config.linear and max(counts.values()) < 2:
        lines.append("no linear probe: choosing its regularization needs 2 training images of a class")
    if config.k and (k := knn.num_neighbors(label, config.k)) < config.k:
        lines.append(f"kNN with {k} neighbors, not {config.k}: a class has {k} training images on average")
    linear = config.linear and max(counts.values()) > 1
    shots = tuple(shots for shots in config.shots if shots <= counts[rarest])
    return dataclasses.replace(config, shots=shots, linear=linear), lines


@dataclass(frozen=True)
class Score:
    """The scores of one representation with ``dim`` dimensions.

    knn, linear: accuracies on the test split, in [0, 1], or None for a probe that did not run.
    C: the regularization that the linear probe chose.
    low_shot: mean and standard deviation of the accuracy over the draws, by the number of labels per class.
    k: number of neighbors that voted, or 0 without the kNN probe.
    """

    name: str
    dim: int
    knn: float | None
    linear: float | None
    C: float | None
    low_shot: dict[int, tuple[float, float]]
    k: int = 0


def evaluate(
    config: Config,
    train: Features,
    test: Features,
    name: str,
    num_classes: int,
    *,
    device: torch.device | None = None,
    progress: Progress = no_progress,
) -> Score:
    """Run the probes on a representation of both splits.  Raises DataError if the labels cannot be used."""
    _check_labels(train, test, num_classes)
    knn_accuracy = linear_accuracy = c = None
    if config.k:
        knn_accuracy = knn.accuracy(
            train, test, num_classes, config.k, config.temperature, device=device, progress=progress
        )
    if config.linear:
        linear_accuracy, c = linear.accuracy(
            train, test, num_classes, seed=config.seed, device=device, progress=progress
        )
    low_shot_accuracies = {
        shots: low_shot.accuracy(
            train, test, shots, num_classes, config.num_draws, config.seed, device=device, progress=progress
        )
        for shots in config.shots
    }
    assert train.label is not None
    k = knn.num_neighbors(train.label, config.k) if config.k else 0
    return Score(name, train.x.shape[1], knn_accuracy, linear_accuracy, c, low_shot_accuracies, k)


def table(scores: Sequence[Score], title: str, note: str = "") -> Table:
    """Return a table of the scores in percent, one row per representation, with the best of each column in bold."""
    shots = sorted({shots for score in scores for shots in score.low_shot})
    columns = [("kNN", [_cell(s.knn) for s in scores]), ("linear", [_cell(s.linear) for s in scores])]
    columns += [
        (f"{plural(n, 'label')} per class", [_cell(*s.low_shot.get(n, (None,))) for s in scores]) for n in shots
    ]
    columns = [(head, cells) for head, cells in columns if any(text for _, text in cells)]
    rich_table = Table(
        title=Text(shown(title)) if title else None,
        caption=Text(shown(note)) if note else None,
        caption_justify="left",
        title_justify="left",
    )
    rich_table.add_column("representation")
    for head, _ in columns:
        rich_table.add_column(head, justify="right")
    best = [max(value for value, _ in cells) for _, cells in columns]
    for row, score in enumerate(scores):
        texts = [
            f"[bold]{text}[/bold]" if len(scores) > 1 and value == top else text
            for (value, text), top in zip((cells[row] for _, cells in columns), best, strict=True)
        ]
        rich_table.add_row(Text(shown(score.name)), *texts)
    return rich_table


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as values that JSON can hold, with low_shot like {"5": {"mean": 0.71, "std": 0.02}}."""
    return [
        dataclasses.asdict(score)
        | {"low_shot": {str(n): {"mean": m, "std": s} for n, (m, s) in score.low_shot.items()}}
        for score in scores
    ]


def _cell(value: float | None, std: float | None = None) -> tuple[float, str]:
    """Return a percentage rounded as it is printed, by which cells are compared, and its text."""
    if value is None:
        return -1.0, ""
    text = f"{100 * value:.1f}"
    return float(text), text if std is None else f"{text} ± {100 * std:.1f}"


def _check_labels(train: Features, test: Features, num_classes: int) -> None:
    if train.label is None or test.label is None:
        raise DataError(
            "kNN, linear and low-shot probes need labels, and this source has none: "
            "use a labeled one, such as a folder with one subfolder per class"
        )
    for split, label in (("training", train.label), ("test", test.label)):
        bad = label[(label < 0) | (label >= num_classes)]
        if len(bad):
            raise DataError(
                f"expected labels from 0 to {num_classes - 1} in the {split} split, got {int(bad[0])}: "
                "remove samples without a label from the splits"
            )
    train_classes, test_classes = set(train.label.unique().tolist()), set(test.label.unique().tolist())
    if len(train_classes) < 2:
        raise DataError(
            f"expected 2 or more classes to tell apart, but all training samples have label "
            f"{', '.join(map(str, train_classes))}: use a source with more classes"
        )
    if missing := sorted(test_classes - train_classes):
        raise DataError(
            f"expected training samples of every class of the test split, but {len(missing)} of {len(test_classes)} "
            f"classes have none (the first is label {missing[0]}): check that both splits have the same classes"
        )
