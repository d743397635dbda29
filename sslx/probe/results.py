"""What a probe leaves besides its table and ``probe.json``: confusions, and scores in the run's trackers."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from sslx.config import ProbeConfig
from sslx.console.words import shown
from sslx.errors import StorageError
from sslx.machine import files
from sslx.probe import confusion, label_free, probes
from sslx.probe.images import Splits
from sslx.probe.represent import PRETRAINED
from sslx.runs import trackers
from sslx.trained import Trained


def write_confusion(trained: Trained, folder: Path, splits: Splits, score: probes.Score | None) -> None:
    """Write ``confusion.json`` of a score to a folder; without a classifier, remove that of an earlier probe."""
    path = folder / confusion.FILE
    try:
        if score and score.confusion:
            facts = {"step": trained.step, "source": splits.test.name, "split": splits.name}
            files.replace(path, score.confusion.to_json(splits.train.facts.classes or (), **facts))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}") from error


def track(
    trained: Trained,
    options: ProbeConfig,
    labeled: Mapping[str, probes.Score],
    free: Mapping[str, label_free.Score | None],
    say: Callable[[str], None],
) -> None:
    """Add the scorecard to the run in wandb, if it or a flag asks for that, and each score of the pretrained encoder.

    labeled, free: scores by the names of the representations.
    """
    groups = [*probes.columns(list(labeled.values())), *label_free.columns(list(free.values()))]
    columns = [
        (head.replace("\n", " "), [text for _, text in cells])
        for group in groups
        for head, cells in group
        if any(text for _, text in cells)
    ]
    rows = [[name, *(texts[row] for _, texts in columns)] for row, name in enumerate(free)]
    values = dict[str, float]()
    for score in (labeled.get(PRETRAINED), free.get(PRETRAINED)):
        numbers = dataclasses.asdict(score) if score else {}
        values |= {f"probe/{name}": value for name, value in numbers.items() if isinstance(value, float)}
    scorecard = ["representation", *(head for head, _ in columns)], rows
    results = trackers.Results(step=trained.step, values=values, tables={"scorecard": scorecard})
    trackers.add_results(options.log_of(trained.settings.log), trained.folder, results, say)
