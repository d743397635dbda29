"""Probes: what frozen features are worth, by kNN, a linear classifier and a few labels per class."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sslx.console.words import shown
from sslx.errors import DataError
from sslx.probe import knn, linear, low_shot
from sslx.probe.config import Config
from sslx.probe.features import Features, Progress, silent


def possible(config: Config, label: Tensor, classes: Sequence[str]) -> tuple[Config, list[str]]:
    """The probes that training labels (N,) allow, and a line for each that is left out or changed.

    classes: the names of the labels.  A class without a training sample counts for nothing.
    """
    counts = {c: n for c, n in enumerate(label.bincount().tolist()) if n}
    if len(counts) < 2:
        return config, []  # evaluate says so
    lines: list[str] = []
    rarest = min(counts, key=lambda c: counts[c])
    name = shown(classes[rarest]) if rarest < len(classes) else str(rarest)
    few = tuple(shots for shots in config.shots if shots > counts[rarest])
    for shots in few:
        number = f"{counts[rarest]} training image{'s' * (counts[rarest] > 1)}"
        lines.append(f"no probe by {shots} labels per class: class {name} has {number}")
    if config.linear and max(counts.values()) < 2:
        lines.append("no linear probe: no class has the 2 training images that it takes to choose its regularization")
    if config.k and (k := knn.neighbors(label, config.k)) < config.k:
        lines.append(f"kNN by the {k} nearest, not {config.k}: as many as a class has training images on average")
    linear = config.linear and max(counts.values()) > 1
    shots = tuple(shots for shots in config.shots if shots not in few)
    return dataclasses.replace(config, shots=shots, linear=linear), lines


@dataclass(frozen=True)
class Score:
    """What the probes make of one representation of ``dim`` dimensions.

    Accuracies on the test split, in [0, 1]; None for a probe left out.  low_shot: labels per class -> (mean,
    standard deviation) over the draws.  C: the regularisation of the linear probe.
    k: neighbors that voted, 0: none.
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
    progress: Progress = silent,
) -> Score:
    """Run the probes on a representation of both splits.  Raises DataError if the labels cannot be used."""
    _check_labels(train, test, num_classes)
    nearest = score = c = None
    if config.k:
        nearest = knn.accuracy(train, test, num_classes, config.k, config.temperature, device=device, progress=progress)
    if config.linear:
        score, c = linear.accuracy(train, test, num_classes, seed=config.seed, device=device, progress=progress)
    few = {
        shots: low_shot.accuracy(
            train, test, shots, num_classes, config.num_draws, config.seed, device=device, progress=progress
        )
        for shots in config.shots
    }
    assert train.label is not None
    k = knn.neighbors(train.label, config.k) if config.k else 0
    return Score(name, train.x.shape[1], nearest, score, c, few, k)


def table(scores: Sequence[Score], title: str, note: str = "") -> Table:
    """A table of the scores in per cent, one row a representation, the best of each column in bold."""
    shots = sorted({shots for score in scores for shots in score.low_shot})
    columns = [("kNN", [_cell(s.knn) for s in scores]), ("linear", [_cell(s.linear) for s in scores])]
    columns += [
        (f"{n} label{'s' * (n > 1)} per class", [_cell(*s.low_shot.get(n, (None,))) for s in scores]) for n in shots
    ]
    columns = [(head, cells) for head, cells in columns if any(text for _, text in cells)]
    drawn = Table(
        title=Text(shown(title)) if title else None,
        caption=Text(shown(note)) if note else None,
        caption_justify="left",
        title_justify="left",
    )
    drawn.add_column("representation")
    for head, _ in columns:
        drawn.add_column(head, justify="right")
    best = [max(value for value, _ in cells) for _, cells in columns]
    for row, score in enumerate(scores):
        texts = [
            f"[bold]{text}[/bold]" if len(scores) > 1 and value == top else text
            for (value, text), top in zip((cells[row] for _, cells in columns), best, strict=True)
        ]
        drawn.add_row(Text(shown(score.name)), *texts)
    return drawn


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores as JSON can hold them; low_shot: {"5": {"mean": 0.71, "std": 0.02}}."""
    return [
        dataclasses.asdict(score)
        | {"low_shot": {str(n): {"mean": m, "std": s} for n, (m, s) in score.low_shot.items()}}
        for score in scores
    ]


def _cell(value: float | None, std: float | None = None) -> tuple[float, str]:
    """(the percentage as printed, to find the best by; its text)."""
    if value is None:
        return -1.0, ""
    text = f"{100 * value:.1f}"
    return float(text), text if std is None else f"{text} ± {100 * std:.1f}"


def _check_labels(train: Features, test: Features, num_classes: int) -> None:
    if train.label is None or test.label is None:
        raise DataError(
            "kNN, linear and low-shot probes need labels, and this source has none; "
            "probe on a labelled one, such as a folder with one subfolder a class"
        )
    for split, label in (("training", train.label), ("test", test.label)):
        bad = label[(label < 0) | (label >= num_classes)]
        if len(bad):
            raise DataError(
                f"expected labels from 0 to {num_classes - 1} in the {split} split, got {int(bad[0])}; "
                "leave samples without a label out of the splits to probe on"
            )
    known, asked = set(train.label.unique().tolist()), set(test.label.unique().tolist())
    if len(known) < 2:
        raise DataError(
            f"expected 2 or more classes to tell apart, but all training samples have label "
            f"{', '.join(map(str, known))}; probe on a source of more classes"
        )
    if missing := sorted(asked - known):
        raise DataError(
            f"expected training samples of every class of the test split, but {len(missing)} of {len(asked)} "
            f"have none (label {missing[0]} first); check that both splits have the same classes"
        )
