"""``sslx probe``: a scorecard of frozen features, of one checkpoint or of several side by side."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sslx import config, distributed, probe
from sslx.config import ProbeConfig
from sslx.console.bars import Bars, say_to
from sslx.console.words import shown
from sslx.data.config import Config as DataConfig
from sslx.data.sources import Source, SourceConfig
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, StorageError
from sslx.machine import files
from sslx.probe import fine_tune, held_out, images, label_free, probes, results, scorecard, transfer
from sslx.probe.features import Features
from sslx.probe.images import Splits
from sslx.probe.represent import PIXELS, PRETRAINED, Representations, augmented_views
from sslx.probe.scorecard import Row, Say
from sslx.trained import Trained, load

LABELS_NOTE = (
    "With labels, sslx probe reports kNN, linear and few-label accuracy: use --source.root FOLDER with one subfolder "
    "per class, and --source.test-root FOLDER with a test split of the same classes."
)


def main(argv: Sequence[str], paths: Sequence[Path], part: str | None = None, *, quiet: bool = False) -> int:
    """Run ``sslx probe CHECKPOINT...`` as ``score`` does, leave the other ranks, and return the exit code."""
    score(argv, paths, part, quiet=quiet)
    distributed.shutdown()
    return 0


def score(argv: Sequence[str], paths: Sequence[Path], part: str | None = None, *, quiet: bool = False) -> None:
    """Print tables of scores and write each run's to ``probe.json`` in its folder, together with all ranks.

    paths, part: the checkpoints that argv names, and the part of a file.  quiet: print nothing about wrong flags.
    All checkpoints are probed on the images of the first one's run, unless argv names others.
    """
    runs = [load(path, part=part) for path in paths]
    options = config.load_probe(argv, runs[0].settings if runs[0].is_run else None, quiet=quiet)
    folders = _folders(runs, options.output)
    runs = [_with_view(trained, options, runs[0]) for trained in runs]
    options = replace(options, data=runs[0].reading(options.data))
    ranks = distributed.init(options.device)
    runs = [trained.to(ranks.device) for trained in runs]
    console = Console()
    say = say_to(console, ranks.is_main)
    splits = images.splits(runs[0], options, say)
    for trained, title in zip(runs, scorecard.titles(runs), strict=True):
        of = f" of {title}" if len(runs) > 1 else ""
        for note in trained.notes:
            say(f"{title}: {note}" if of else note)
        if trained.is_run and (name := trained.settings.method.exported_name):
            say(f"the pretrained encoder{of} is {name}")
    unlearnable_reason = images.unlearnable_reason(splits.all_train)
    if not unlearnable_reason and splits.test.facts.labels is None:
        unlearnable_reason = images.unlearnable_reason(splits.test)
    if unlearnable_reason:
        say(f"scores without labels: {unlearnable_reason}")
    else:
        options = _feasible(options, splits, say)
    further = [
        replace(task, options=_feasible(task.options, task.splits, say))
        for task in transfer.tasks(runs[0], options, say)
    ]
    cards, bars = list[list[Row]](), Bars(console, ranks.is_main)
    known, known_further = dict[str, Row](), [dict[str, Row]() for _ in further]
    further_cards = [list[list[Row]]() for _ in further]
    for trained, folder in zip(runs, folders, strict=True):
        representations = Representations(trained, folder, augmented_views(trained, runs[0]), options, ranks, bars)
        with bars.display:
            cards.append(_score(representations, options, splits, not unlearnable_reason, ranks, bars, known))
            for task, of_runs, found in zip(further, further_cards, known_further, strict=True):
                of_runs.append(_score(representations, task.options, task.splits, True, ranks, bars, found))
        for line in representations.report():
            say(line)
    if ranks.is_main:
        scorecard.show(runs, splits, options.source, cards, console, say)
        if unlearnable_reason:
            say(LABELS_NOTE)
        for task, of_runs in zip(further, further_cards, strict=True):
            scorecard.show_labeled(runs, task.splits, task.options.source, of_runs, console, say)
        for number, (trained, folder, rows) in enumerate(zip(runs, folders, cards, strict=True)):
            if folder is None:
                continue
            record = _record(trained, options.source, splits, rows, runs[0])
            _write(folder, record | {"transfer": _transferred(further, [of_runs[number] for of_runs in further_cards])})
            say(f"wrote {shown(folder / 'probe.json')}")
            labeled = {row.name: row.labeled for row in rows if row.labeled}
            results.write_confusion(trained, folder, splits, labeled.get(PRETRAINED))
            if trained.is_run:
                results.track(trained, options, labeled, {row.name: row.label_free for row in rows}, say)


def _with_view(trained: Trained, options: ProbeConfig, first: Trained) -> Trained:
    """Return the checkpoint with the view that the flags ask for.  first: the checkpoint whose settings they change."""
    settings, run_settings = options.data, first.settings.data if first.is_run else DataConfig()
    if settings.size != run_settings.size:
        raise ConfigError(
            f"--data.size {settings.size} sets the size of training views: use --data.eval-size for probes"
        )
    if settings.eval_size != run_settings.eval_size and settings.eval_size is not None:
        return trained.with_view_size(settings.eval_size)
    return trained


def _feasible(options: ProbeConfig, splits: Splits, say: Say) -> ProbeConfig:
    """Return the options with the probes that the labels allow, and say what is left out."""
    train, test = splits.train.facts, splits.test.facts
    assert train.labels is not None
    label, classes = torch.from_numpy(train.labels), train.classes or ()
    feasible, lines = probe.feasible_probes(options.probe, label, classes)
    if test.labels is not None:
        lines.append(probes.missing_classes(label, torch.from_numpy(test.labels), classes))
    for line in filter(None, lines):
        say(line)
    return replace(options, probe=feasible)


def _score(
    representations: Representations,
    options: ProbeConfig,
    splits: Splits,
    with_labels: bool,
    ranks: Ranks,
    bars: Bars,
    known: dict[str, Row],
) -> list[Row]:
    """Score the encoder, its average if there is one, and the baselines if they are enabled, on the same images.

    known: the rows of representations that earlier checkpoints had as well, to which this adds.
    Returns the rows on rank 0 and an empty list on other ranks.
    """
    rows = list[Row]()
    for name in representations.names:
        bars.stage = name
        identity = representations.identity(name)
        if identity not in known:
            row = _row(representations, name, options, splits, with_labels, ranks, bars)
            known[identity] = row
        rows.append(known[identity])
        distributed.wait_for_main()
    return rows if ranks.is_main else []


def _row(
    representations: Representations,
    name: str,
    options: ProbeConfig,
    splits: Splits,
    with_labels: bool,
    ranks: Ranks,
    bars: Bars,
) -> Row:
    """Return the scores of one representation; on ranks other than 0, a row without scores."""
    labeled, test = None, None
    if with_labels:
        train = representations.plain(name, splits.train)
        test = representations.plain(name, splits.test)
        if train and test and ranks.is_main:
            num_classes = len(splits.train.facts.classes or ())
            labeled = probe.evaluate(options.probe, train, test, name, num_classes, device=ranks.device, progress=bars)
        distributed.wait_for_main()
        if name != PIXELS and options.probe.fine_tune:
            fine_tuned = _fine_tuned(representations, name, options, splits, bars)
            labeled = replace(labeled, fine_tuned=fine_tuned) if labeled else None
    if with_labels and (not options.probe.label_free or len(splits.test) < 2):
        return Row(name, labeled, None)
    return Row(name, labeled, _label_free(representations, name, splits.test, test, ranks))


def _fine_tuned(
    representations: Representations, name: str, options: ProbeConfig, splits: Splits, bars: Bars
) -> dict[float, fine_tune.Score]:
    """Return the scores of fine-tuning an encoder, by the fraction of the labels.  All ranks take part."""
    encoder, settings = representations.encoder(name), options.probe
    recipe, task = fine_tune.recipe_of(encoder, settings), representations.task(splits.train, splits.test)
    return {
        amount: fine_tune.accuracy(
            encoder, task, amount, recipe,
            num_draws=settings.num_fine_tune_draws, seed=settings.seed, progress=bars,
        )
        for amount in settings.fine_tune
    }  # fmt: skip


def _label_free(
    representations: Representations, name: str, source: Source, known: Features | None, ranks: Ranks
) -> label_free.Score | None:
    """Return the scores without labels, on at most 2,000 images; on ranks other than 0, None.

    known: the features of all of the source's images with the probes' view, if they have been computed.
    """
    if len(source) < 2:
        raise DataError(
            f"expected 2 or more images to tell apart, got {len(source)} ({source.name}): use --source.root with a "
            "folder of more images"
        )
    rows = held_out.rows(len(source), None, min(len(source), label_free.MAX_IMAGES))
    chosen = source if len(rows) == len(source) else source.take(rows)
    if distributed.broadcast_object(known is not None):
        plain = known.x[torch.from_numpy(rows)] if known is not None else None
    else:
        own = representations.plain(name, chosen)
        plain = own.x if own is not None else None
    views = representations.augmented(name, chosen)
    if plain is None or views is None or not ranks.is_main:
        return None
    return label_free.score(name, plain, views.x.view(len(plain), -1, plain.shape[1]), with_ranks=name != PIXELS)


def _record(
    trained: Trained, source: SourceConfig, splits: Splits, rows: Sequence[Row], augmented_as: Trained
) -> dict[str, Any]:
    """Return what ``probe.json`` says of a checkpoint; README.md beside this file describes it."""
    labeled = [row.labeled for row in rows if row.labeled]
    free = [row.label_free for row in rows if row.label_free]
    record = {
        "step": trained.step,
        "source": source.name,
        "view_px": trained.view.size,
        "split": splits.name,
        "num_images": len(splits.test) if labeled else free[0].num_images,
        "scores": probe.as_json(labeled),
    }
    if free:
        record |= {"label_free": label_free.as_json(free), "augmented_as": str(augmented_as.folder)}
    return record


def _transferred(tasks: Sequence[transfer.Task], cards: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Return what ``probe.json`` says of a checkpoint on further images, of which ``cards`` has the rows."""
    return [
        {
            "images": task.splits.test.name,
            "split": task.splits.name,
            "num_images": len(task.splits.test),
            "scores": probe.as_json([row.labeled for row in rows if row.labeled]),
        }
        for task, rows in zip(tasks, cards, strict=True)
    ]


def _folders(runs: Sequence[Trained], output: Path | None) -> list[Path | None]:
    """Return where the scores of each checkpoint go: its run folder, or one in ``output`` for other weights.

    Raises ConfigError if ``output`` has no use, or the same one for two checkpoints.
    """
    names = [trained.name for trained in runs if not trained.is_run]
    if output is not None and (not names or len({*names}) < len(names)):
        reason = "no two of them by the same name" if names else "runs have folders of their own"
        raise ConfigError(f"--output {shown(output)} is for weights that sslx did not train: {reason}")
    own = [trained.folder if trained.is_run else None for trained in runs]
    return [folder or (output / trained.name if output else None) for folder, trained in zip(own, runs, strict=True)]


def _write(folder: Path, record: dict[str, Any]) -> None:
    path = folder / "probe.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(
            f"cannot write {shown(path)}: {error.strerror}; the scores are only in the table above"
        ) from error
