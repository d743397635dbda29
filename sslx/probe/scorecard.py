"""The scorecard in words: the tables that ``sslx probe`` prints, and what they mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from sslx.config.presets import FEW_EPOCHS, FEW_STEPS
from sslx.console.words import plural, shown
from sslx.data.sources import SourceConfig
from sslx.probe import Score, fine_tune, images, label_free, probes, tables
from sslx.probe.images import Splits
from sslx.probe.represent import AVERAGED, PIXELS, PRETRAINED, UNTRAINED
from sslx.trained import Trained

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """The scores of one representation: with labels, or None without them; and those that need none."""

    name: str
    labeled: Score | None
    label_free: label_free.Score | None


def titles(runs: Sequence[Trained]) -> list[str]:
    """Return a name for each checkpoint: its run's, with the step or the folder where that is needed to tell them."""
    names = [trained.name or trained.folder.name for trained in runs]
    folders = [trained.folder for trained in runs]
    if len(set(names)) < len(set(folders)):
        names = [str(folder) for folder in folders]
    if len(set(folders)) < len(runs):
        names = [f"{name}, step {trained.step:,}" for name, trained in zip(names, runs, strict=True)]
    return [shown(name) for name in names]


def show(
    runs: Sequence[Trained],
    splits: Splits,
    source: SourceConfig,
    cards: Sequence[Sequence[Row]],
    console: Console,
    say: Say,
) -> None:
    """Print the tables of all rows, each once, and what they mean."""
    show_labeled(runs, splits, source, cards, console, say)
    rows = _distinct(runs, cards)
    free = [row.label_free for row in rows.values()]
    if any(free):
        head, place = _head(runs)
        num_images = max(score.num_images for score in free if score)
        some = f"{num_images:,} of {len(splits.test):,}" if num_images < len(splits.test) else f"{num_images:,}"
        kind = "" if num_images < len(splits.test) else f"{splits.name} "
        say(f"{head}: scores without labels on {some} {kind}images, {place}")
        for table in tables.fitting(list(rows), label_free.columns(free), console):
            console.print(table)
        for line in label_free.legend(num_images):
            say(line)
    for title, trained, card in zip(titles(runs), runs, cards, strict=True):
        scores, kind = _accuracies(card)
        of = f" of {title}" if len(runs) > 1 else ""
        warn_few_steps(trained, splits, source, scores, kind, say, of)


def show_labeled(
    runs: Sequence[Trained],
    splits: Splits,
    source: SourceConfig,
    cards: Sequence[Sequence[Row]],
    console: Console,
    say: Say,
) -> None:
    """Print the table of the accuracies, if there are any."""
    rows = _distinct(runs, cards)
    labeled = [row.labeled for row in rows.values() if row.labeled]
    if not labeled:
        return
    head, place = _head(runs)
    say(f"{head}: accuracy in % on {len(splits.test):,} {splits.name} images of {splits.test.name}, {place}")
    for table in tables.fitting(list(rows), probes.columns(labeled), console):
        console.print(table)
    for line in fine_tune.legend([score for row in labeled for score in row.fine_tuned.values()]):
        say(line)
    if source.score_note and len(labeled) > 1:
        console.print(source.score_note, highlight=False)


def _head(runs: Sequence[Trained]) -> tuple[str, str]:
    """Return what was probed and the sides of its views, for the line above a table."""
    sizes = sorted({trained.view.size for trained in runs})
    head = plural(len(runs), "checkpoint")
    if len(runs) == 1:
        head = f"{titles(runs)[0]}, step {runs[0].step:,}" if runs[0].is_run else titles(runs)[0]
    return head, f"{' and '.join(map(str, sizes))} px"


def _distinct(runs: Sequence[Trained], cards: Sequence[Sequence[Row]]) -> dict[str, Row]:
    """Return all rows by their names in the table; a baseline that several checkpoints share is one row."""
    if len(runs) == 1:
        return {row.name: row for row in cards[0]}
    by_name, seen = dict[str, Row](), set[int]()
    several_sizes = len({trained.view.size for trained in runs}) > 1
    for title, trained, card in zip(titles(runs), runs, cards, strict=True):
        pixels = f"{PIXELS}, {trained.view.size} px" if several_sizes else PIXELS
        names = {PRETRAINED: title, AVERAGED: f"{title}, average", UNTRAINED: f"{UNTRAINED} of {title}", PIXELS: pixels}
        for row in card:
            if id(row) not in seen:
                by_name[names[row.name]] = row
            seen.add(id(row))
    order = {PIXELS: 0, UNTRAINED: 1}  # an average stays beside its encoder
    return dict(sorted(by_name.items(), key=lambda item: order.get(item[1].name, 2)))


def _accuracies(card: Sequence[Row]) -> tuple[dict[str, float], str]:
    """Return one accuracy in [0, 1] for each representation, by name, and its kind in words."""
    labeled = {row.name: row.labeled for row in card if row.labeled}
    linear = {name: score.linear for name, score in labeled.items() if score.linear is not None}
    knn = {name: score.knn for name, score in labeled.items() if score.knn is not None}
    if labeled:
        return (linear, "linear") if linear else (knn, "kNN")
    return {row.name: row.label_free.retrieval for row in card if row.label_free}, "retrieval"


def warn_few_steps(
    trained: Trained,
    splits: Splits,
    source: SourceConfig,
    scores: dict[str, float],
    kind: str,
    say: Say,
    of: str = "",
) -> bool:
    """Say that the run was short if its encoder is worse than raw pixels; return whether this was said.

    scores: accuracies in [0, 1], by the names of the representations.  kind: of the accuracy, in words.
    of: words that say which run it is, if there are several.
    """
    pretrained, pixels = scores.get(PRETRAINED), scores.get(PIXELS)
    if not trained.is_run or pretrained is None or pixels is None or pretrained >= pixels:
        return False
    duration, num_epochs = plural(trained.step, "step"), float("inf")
    if images.was_trained_on(trained, source):
        num_epochs = trained.step / max(1, len(splits.all_train) // trained.settings.batch_size)
        duration += f" ({num_epochs:.1f} epochs)"
    if trained.step >= FEW_STEPS and num_epochs >= FEW_EPOCHS:
        return False
    say(
        f"The pretrained encoder{of} is worse than raw pixels here ({kind}: {100 * pretrained:.1f} % against "
        f"{100 * pixels:.1f} %): it was trained for only {duration}; train longer with --epochs."
    )
    return True
