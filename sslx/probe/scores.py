"""``sslx probe``: what a checkpoint's frozen features are worth, with labels and without."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sslx import config, data, distributed, probe
from sslx.config import ProbeConfig
from sslx.config.presets import FEW_EPOCHS, FEW_STEPS
from sslx.console.bars import Bars, say_to
from sslx.console.words import shown
from sslx.data.order import Sequential
from sslx.data.sources import Source, SourceConfig
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, StorageError
from sslx.machine import files
from sslx.probe import Score, features, held_out, images, label_free
from sslx.probe.features import Features
from sslx.probe.images import Splits
from sslx.trained import Trained, load

LABELS_NOTE = (
    "With labels, sslx probe gives kNN, linear and few-label accuracy: --source.root FOLDER with one subfolder a "
    "class, and a test split of the same classes in --source.test-root FOLDER."
)
PRETRAINED, UNTRAINED, PIXELS = "pretrained encoder", "untrained encoder", "raw pixels"


def main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """``sslx probe CHECKPOINT``: print the table, and write it to ``probe.json`` in the run folder.

    path: the checkpoint that argv names.  quiet: say nothing on wrong flags.
    """
    trained = load(path)
    options = config.load_probe(argv, trained.settings, quiet=quiet)
    settings, ours = options.data, trained.settings.data
    if settings.size != ours.size:
        raise ConfigError(f"--data.size {settings.size} is of training views; the probes' is --data.eval-size")
    if settings.eval_size != ours.eval_size and settings.eval_size is not None:
        trained = trained.with_view_size(settings.eval_size)
    ranks = distributed.init(options.device)
    trained = trained.to(ranks.device)
    console = Console()
    say = say_to(console, ranks.is_main)
    splits = images.splits(trained, options, say)
    if name := trained.settings.method.exported_name:
        say(f"the pretrained encoder is {name}")
    bars = Bars(console, ranks.is_main)
    without_labels = images.unlearnable(splits.all_train)
    if not without_labels and splits.test.facts.labels is None:
        without_labels = images.unlearnable(splits.test)
    record: dict[str, Any] = {
        "step": trained.step,
        "source": options.source.name,
        "view_px": trained.view.size,
        "split": splits.name,
        "num_images": len(splits.test),
        "scores": [],
    }
    if without_labels:
        say(f"scores without labels: {without_labels}")
        found = label_free_scores(trained, options, splits.test, ranks, bars)
        record |= {"num_images": min(len(splits.test), label_free.MOST), "label_free": label_free.as_json(found)}
        if ranks.is_main:
            _show_label_free(trained, splits, found, console, say)
            _say_few_steps(
                trained, splits, options.source, {row.name: row.retrieval for row in found}, "retrieval", say
            )
            say(LABELS_NOTE)
    else:
        scores = labeled_scores(trained, options, splits, ranks, bars, say)
        record["scores"] = probe.as_json(scores)
        if ranks.is_main:
            _show_labeled(trained, splits, options.source, scores, console, say)
    if ranks.is_main:
        _write(trained, record)
        say(f"wrote {shown(trained.folder / 'probe.json')}")
    distributed.shutdown()
    return 0


def labeled_scores(
    trained: Trained,
    options: ProbeConfig,
    splits: Splits,
    ranks: Ranks,
    bars: Bars,
    say: Callable[[str], None],
) -> list[Score]:
    """Probe the pretrained encoder and, if asked, raw pixels and the untrained encoder, on the same splits."""
    train, test = splits.train, splits.test
    assert train.facts.labels is not None
    probes, lines = probe.possible(options.probe, torch.from_numpy(train.facts.labels), train.facts.classes or ())
    for line in lines:
        say(line)
    found: list[Score] = []
    with bars.display:
        for name in [*[PIXELS, UNTRAINED] * options.baselines, PRETRAINED]:
            bars.stage = name
            made: list[Features] = []
            for split in (train, test):
                batches = images.loader(options.data, split, trained.view, options.batch_size, ranks, torch.float32)
                made.append(_represent(trained, name, batches, len(split), ranks, bars))
            if ranks.is_main:
                classes = len(train.facts.classes or ())
                found.append(
                    probe.evaluate(probes, made[0], made[1], name, classes, device=ranks.device, progress=bars)
                )
            distributed.wait_for_main()
    return found


def label_free_scores(
    trained: Trained, options: ProbeConfig, source: Source, ranks: Ranks, bars: Bars
) -> list[label_free.Score]:
    """Scores without labels, of at most 2,000 images, of the encoder and, if asked, of what it is compared with."""
    if len(source) < 2:
        raise DataError(
            f"expected 2 or more images to tell apart, got {len(source)} ({source.name}): give a folder of more images "
            "with --source.root"
        )
    if len(source) > label_free.MOST:
        source = source.take(held_out.rows(len(source), None, label_free.MOST))
    first = trained.views[0]
    second = next((view for view in trained.views[1:] if view.size == first.size), first)
    order = Sequential(
        num_samples=len(source), per_rank=options.batch_size, rank=ranks.rank, world_size=ranks.world_size
    )
    found: list[label_free.Score] = []
    with bars.display:
        for name in [*[PIXELS, UNTRAINED] * options.baselines, PRETRAINED]:
            bars.stage = name
            batches = images.loader(options.data, source, trained.view, options.batch_size, ranks, torch.float32)
            plain = _represent(trained, name, batches, len(source), ranks, bars).x
            batches = data.in_order(
                options.data,
                source,
                [first, second],
                order,
                seed=trained.settings.seed,
                ranks=ranks,
                dtype=torch.float32,
            )
            x, y = _represent(trained, name, batches, len(source), ranks, bars, num_views=2).x.chunk(2, 1)
            if ranks.is_main:
                found.append(label_free.score(name, plain, x, y, with_rank=name != PIXELS))
            distributed.wait_for_main()
    return found


def _represent(
    trained: Trained,
    name: str,
    batches: data.Loader,
    num_samples: int,
    ranks: Ranks,
    bars: Bars,
    num_views: int = 1,
) -> Features:
    """The pixels, or the features of the untrained or the pretrained encoder."""
    if name == PIXELS:
        side = min(features.PIXEL_SIDE, trained.size, trained.view.size)
        return features.pixels(batches, num_samples=num_samples, num_views=num_views, side=side, progress=bars)
    encoder = trained.encoder if name == PRETRAINED else trained.untrained_encoder()
    autocast = images.autocast(ranks.device)
    return features.extract(
        encoder, batches, autocast=autocast, num_samples=num_samples, num_views=num_views, progress=bars
    )


def _show_labeled(
    trained: Trained,
    splits: Splits,
    source: SourceConfig,
    scores: Sequence[Score],
    console: Console,
    say: Callable[[str], None],
) -> None:
    what = f"accuracy in % on {len(splits.test):,} {splits.name} images of {splits.test.name}, {trained.view.size} px"
    say(f"{shown(trained.settings.name)}, step {trained.step:,}: {what}")
    console.print(probe.table(scores, ""))
    if source.score_note and len(scores) > 1:
        console.print(source.score_note, highlight=False)
    linear = {score.name: score.linear for score in scores if score.linear is not None}
    knn = {score.name: score.knn for score in scores if score.knn is not None}
    _say_few_steps(trained, splits, source, linear or knn, "linear" if linear else "kNN", say)


def _show_label_free(
    trained: Trained,
    splits: Splits,
    scores: Sequence[label_free.Score],
    console: Console,
    say: Callable[[str], None],
) -> None:
    num = scores[0].num_images
    which = f"{num:,} {splits.name} images" if num == len(splits.test) else f"{num:,} of {len(splits.test):,} images"
    name = shown(trained.settings.name)
    say(f"{name}, step {trained.step:,}: scores without labels on {which}, {trained.view.size} px")
    console.print(label_free.table(scores))
    for line in label_free.meanings(num):
        say(line)


def _say_few_steps(
    trained: Trained,
    splits: Splits,
    source: SourceConfig,
    shares: dict[str, float],
    kind: str,
    say: Callable[[str], None],
) -> bool:
    """Say that the run was short where its encoder is worse than raw pixels; whether that was said."""
    ours, pixels = shares.get(PRETRAINED), shares.get(PIXELS)
    if ours is None or pixels is None or ours >= pixels:
        return False
    steps, epochs = f"{trained.step:,} step{'s' * (trained.step != 1)}", float("inf")
    if images.has_seen(trained, source):
        epochs = trained.step / max(1, len(splits.all_train) // trained.settings.batch_size)
        steps += f" ({epochs:.1f} epochs)"
    if trained.step >= FEW_STEPS and epochs >= FEW_EPOCHS:
        return False
    say(
        f"The pretrained encoder is worse than raw pixels here ({kind}: {100 * ours:.1f} % against "
        f"{100 * pixels:.1f} %): it was trained for {steps} only; train for longer, with --epochs."
    )
    return True


def _write(trained: Trained, record: dict[str, Any]) -> None:
    path = trained.folder / "probe.json"
    try:
        files.replace(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: the table above is all there is") from error
