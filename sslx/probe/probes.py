"""Runs the kNN, linear and few-label probes on a representation, and presents their scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sslx.console.words import plural, shown
from sslx.errors import DataError
from sslx.probe import fine_tune, knn, linear, low_shot, sgd
from sslx.probe.config import Config
from sslx.probe.confusion import Confusion
from sslx.probe.features import Features, Progress, no_progress
from sslx.probe.tables import Column, percent


def feasible_probes(config: Config, label: Tensor, classes: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the probes that the training labels (N,) allow, and a line for each that is left out or changed.

    classes: the names of the labels.  Classes without training samples are ignored.
    """
    counts = {c: n for c, n in enumerate(label.bincount().tolist()) if n}
    if len(counts) < 2:
        return config, []  # evaluate raises an error
    lines: list[str] = []
    rarest = min(counts, key=lambda c: counts[c])
    for shots in config.shots:
        if shots > counts[rarest]:
            available = plural(counts[rarest], "training image")
            lines.append(f"no probe with {shots} labels per class: class {_name(rarest, classes)} has {available}")
    for name, fractions in (("probe with", config.fractions), ("fine-tuning on", config.fine_tune)):
        for fraction in fractions:
            if fraction * len(label) < len(counts):
                part = f"{fraction * len(label):.2g} of {plural(len(label), 'label')}"
                lines.append(f"no {name} {low_shot.words(fraction)}: {part} is less than one of each class")
    has_pairs = max(counts.values()) > 1
    if (config.linear or config.sgd) and not has_pairs:
        lines.append("no linear probe: choosing its regularization needs 2 training images of a class")
    largest = knn.num_neighbors(label, max(config.k, default=1))
    if too_large := [k for k in config.k if k > largest]:
        few = plural(largest, "neighbor")
        few = few if len(too_large) == len(config.k) else f"at most {few}"
        images = plural(largest, "training image")
        lines.append(f"kNN with {few}, not {', '.join(map(str, too_large))}: a class has {images} on average")
    return dataclasses.replace(
        config,
        shots=tuple(shots for shots in config.shots if shots <= counts[rarest]),
        fractions=tuple(part for part in config.fractions if part * len(label) >= len(counts)),
        fine_tune=tuple(part for part in config.fine_tune if part * len(label) >= len(counts)),
        linear=config.linear and has_pairs,
        sgd=config.sgd and has_pairs,
    ), lines


def missing_classes(train: Tensor, test: Tensor, classes: Sequence[str]) -> str:
    """Return one line about the classes that the training labels have and the test labels lack; "" if there are none.

    train, test: labels, (N,) each.  The scores say nothing of these classes.
    """
    trained = train.unique().tolist()
    missing = [c for c in trained if c not in set(test.unique().tolist())]
    if not missing:
        return ""
    some = f"{len(missing)} of {len(trained)} classes, the first of which is {_name(missing[0], classes)}"
    return f"the test split has no image of {some}: the scores say nothing of them"


def _name(label: int, classes: Sequence[str]) -> str:
    return shown(classes[label]) if label < len(classes) else str(label)


@dataclass(frozen=True)
class Score:
    """The scores of one representation with ``dim`` dimensions.

    knn, linear, sgd: accuracies on the test split, in [0, 1], or None for a probe that did not run.
    C: the regularization that the linear probe chose.
    low_shot: mean and standard deviation of the accuracy over the draws, by the number of labels per class.
    k: number of neighbors that voted, or 0 without the kNN probe.
    knn_held_out: accuracies on held-out training images, by the number of neighbors; empty if there was no choice.
    fractions: mean and standard deviation of the accuracy over the draws, by the fraction of the labels.
    sgd_lr, sgd_batch_size: the settings that the linear probe by SGD chose.
    fine_tuned: scores of fine-tuning, by the fraction of the labels.
    confusion: of the linear probe by L-BFGS or, without it, of the kNN probe; None without both.
    """

    name: str
    dim: int
    knn: float | None
    linear: float | None
    C: float | None
    low_shot: dict[int, tuple[float, float]]
    k: int = 0
    knn_held_out: dict[int, float] = field(default_factory=dict[int, float])
    fractions: dict[float, tuple[float, float]] = field(default_factory=dict[float, tuple[float, float]])
    sgd: float | None = None
    sgd_lr: float | None = None
    sgd_batch_size: int | None = None
    fine_tuned: dict[float, fine_tune.Score] = field(default_factory=dict[float, fine_tune.Score])
    confusion: Confusion | None = field(default=None, compare=False, repr=False)


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
    """Run the probes on a representation of both splits.  Raises DataError if the labels cannot be used.

    Each probe reads the test split once, after held-out training images have chosen its settings.
    """
    _check_labels(train, test, num_classes)
    assert test.label is not None
    knn_accuracy = linear_accuracy = c = by_sgd = confusion = None
    k, held_out = 0, dict[int, float]()
    if config.k:
        k, held_out = knn.choose_k(
            train, num_classes, config.k, config.temperature, seed=config.seed, device=device, progress=progress
        )
        predicted = knn.predictions(
            train, test, num_classes, (k,), config.temperature, device=device, progress=progress
        )[k]
        confusion = Confusion.of("kNN", test.label, predicted)
        knn_accuracy = confusion.accuracy
    if config.linear:
        predicted, c = linear.predictions(train, test, num_classes, seed=config.seed, device=device, progress=progress)
        confusion = Confusion.of("linear", test.label, predicted)
        linear_accuracy = confusion.accuracy
    if config.sgd:
        by_sgd = sgd.score(train, test, num_classes, seed=config.seed, device=device, progress=progress)

    def few_labels(amount: int | float, num_draws: int) -> tuple[float, float]:
        return low_shot.accuracy(
            train, test, amount, num_classes, num_draws, config.seed, device=device, progress=progress
        )

    return Score(
        name,
        train.x.shape[1],
        knn_accuracy,
        linear_accuracy,
        c,
        {shots: few_labels(shots, config.num_draws) for shots in config.shots},
        k,
        held_out,
        {fraction: few_labels(fraction, config.num_fraction_draws) for fraction in config.fractions},
        by_sgd.accuracy if by_sgd else None,
        by_sgd.lr if by_sgd else None,
        by_sgd.batch_size if by_sgd else None,
        confusion=confusion,
    )


def columns(scores: Sequence[Score]) -> list[list[Column]]:
    """Return groups of columns with the scores in percent, one cell for each: with all labels, few, or fine-tuned."""
    shots = sorted({shots for score in scores for shots in score.low_shot})
    fractions = sorted({fraction for score in scores for fraction in score.fractions})
    fine_tuned = sorted({fraction for score in scores for fraction in score.fine_tuned})

    def after_fine_tuning(score: Score, part: float) -> tuple[float | None, str]:
        result = score.fine_tuned.get(part)
        return percent(result.mean, result.std if result.num_draws > 1 else None) if result else percent(None)

    return [
        [
            ("kNN", [percent(s.knn) for s in scores]),
            ("linear", [percent(s.linear) for s in scores]),
            ("SGD", [percent(s.sgd) for s in scores]),
        ],
        [
            (f"{100 * part:g} % of\nlabels", [percent(*s.fractions.get(part, (None,))) for s in scores])
            for part in fractions
        ],
        [
            (
                f"fine-tuned on\n{f'{100 * part:g} % of' if part < 1 else 'all'} labels",
                [after_fine_tuning(s, part) for s in scores],
            )
            for part in fine_tuned
        ],
        [(f"{plural(n, 'label')}\nper class", [percent(*s.low_shot.get(n, (None,))) for s in scores]) for n in shots],
    ]


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as values that JSON can hold, with low_shot like {"5": {"mean": 0.71, "std": 0.02}}.

    The confusions are left out; they have their own file.
    """

    def spreads(values: Mapping[Any, tuple[float, float]]) -> dict[str, dict[str, float]]:
        return {str(amount): {"mean": mean, "std": std} for amount, (mean, std) in values.items()}

    return [
        {name: value for name, value in dataclasses.asdict(score).items() if name != "confusion"}
        | {"low_shot": spreads(score.low_shot), "fractions": spreads(score.fractions)}
        | {"knn_held_out": {str(k): accuracy for k, accuracy in score.knn_held_out.items()}}
        | {"fine_tuned": {str(part): dataclasses.asdict(found) for part, found in score.fine_tuned.items()}}
        for score in scores
    ]


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
