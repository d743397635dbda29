"""``sslx probe``: scores of a checkpoint's frozen features, with labels or without."""

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
from sslx.console.words import plural, shown
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
    "With labels, sslx probe reports kNN, linear and few-label accuracy: use --source.root FOLDER with one subfolder "
    "per class, and --source.test-root FOLDER with a test split of the same classes."
)
PRETRAINED, UNTRAINED, PIXELS = "pretrained encoder", "untrained encoder", "raw pixels"


def main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """Run ``sslx probe CHECKPOINT``: print a table of scores and write them to ``probe.json`` in the run folder.

    path: the checkpoint that argv names.  quiet: do not print anything about wrong flags.
    """
    trained = load(path)
    options = config.load_probe(argv, trained.settings, quiet=quiet)
    settings, run_settings = options.data, trained.settings.data
    if settings.size != run_settings.size:
        raise ConfigError(
            f"--data.size {settings.size} sets the size of training views: use --data.eval-size for probes"
        )
    if settings.eval_size != run_settings.eval_size and settings.eval_size is not None:
        trained = trained.with_view_size(settings.eval_size)
    ranks = distributed.init(options.device)
    trained = trained.to(ranks.device)
    console = Console()
    say = say_to(console, ranks.is_main)
    splits = images.splits(trained, options, say)
    if name := trained.settings.method.exported_name:
        say(f"the pretrained encoder is {name}")
    bars = Bars(console, ranks.is_main)
    unlearnable_reason = images.unlearnable_reason(splits.all_train)
    if not unlearnable_reason and splits.test.facts.labels is None:
        unlearnable_reason = images.unlearnable_reason(splits.test)
    record: dict[str, Any] = {
        "step": trained.step,
        "source": options.source.name,
        "view_px": trained.view.size,
        "split": splits.name,
        "num_images": len(splits.test),
        "scores": [],
    }
    if unlearnable_reason:
        say(f"scores without labels: {unlearnable_reason}")
        scores = label_free_scores(trained, options, splits.test, ranks, bars)
        record |= {"num_images": min(len(splits.test), label_free.MAX_IMAGES)}
        record |= {"label_free": label_free.as_json(scores)}
        if ranks.is_main:
            _show_label_free(trained, splits, scores, console, say)
            retrievals = {row.name: row.retrieval for row in scores}
            _warn_few_steps(trained, splits, options.source, retrievals, "retrieval", say)
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
    """Probe the pretrained encoder and, with --baselines, raw pixels and the untrained encoder, on the same splits.

    Returns the scores on rank 0 and an empty list on other ranks.
    """
    train, test = splits.train, splits.test
    assert train.facts.labels is not None
    classes = train.facts.classes or ()
    probes, lines = probe.feasible_probes(options.probe, torch.from_numpy(train.facts.labels), classes)
    for line in lines:
        say(line)
    scores: list[Score] = []
    with bars.display:
        for name in _representations(options):
            bars.stage = name
            train_features, test_features = (
                _represent(
                    trained,
                    name,
                    images.loader(options.data, split, trained.view, options.batch_size, ranks, torch.float32),
                    len(split),
                    ranks,
                    bars,
                )
                for split in (train, test)
            )
            if ranks.is_main:
                scores.append(
                    probe.evaluate(
                        probes, train_features, test_features, name, len(classes), device=ranks.device, progress=bars
                    )
                )
            distributed.wait_for_main()
    return scores


def label_free_scores(
    trained: Trained, options: ProbeConfig, source: Source, ranks: Ranks, bars: Bars
) -> list[label_free.Score]:
    """Score representations without labels, on at most 2,000 images.

    These are the pretrained encoder and, with --baselines, raw pixels and the untrained encoder.
    Returns the scores on rank 0 and an empty list on other ranks.
    """
    if len(source) < 2:
        raise DataError(
            f"expected 2 or more images to tell apart, got {len(source)} ({source.name}): use --source.root with a "
            "folder of more images"
        )
    if len(source) > label_free.MAX_IMAGES:
        source = source.take(held_out.rows(len(source), None, label_free.MAX_IMAGES))
    first = trained.views[0]
    second = next((view for view in trained.views[1:] if view.size == first.size), first)
    order = Sequential(
        num_samples=len(source), per_rank=options.batch_size, rank=ranks.rank, world_size=ranks.world_size
    )
    scores: list[label_free.Score] = []
    with bars.display:
        for name in _representations(options):
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
                scores.append(label_free.score(name, plain, x, y, with_rank=name != PIXELS))
            distributed.wait_for_main()
    return scores


def _representations(options: ProbeConfig) -> tuple[str, ...]:
    """Return the names of the representations to score, with baselines only if they are enabled."""
    return (PIXELS, UNTRAINED, PRETRAINED) if options.baselines else (PRETRAINED,)


def _represent(
    trained: Trained,
    name: str,
    batches: data.Loader,
    num_samples: int,
    ranks: Ranks,
    bars: Bars,
    num_views: int = 1,
) -> Features:
    """Return the features of the representation with this name: raw pixels or an encoder's features."""
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
    title = f"accuracy in % on {len(splits.test):,} {splits.name} images of {splits.test.name}, {trained.view.size} px"
    say(f"{shown(trained.settings.name)}, step {trained.step:,}: {title}")
    console.print(probe.table(scores, ""))
    if source.score_note and len(scores) > 1:
        console.print(source.score_note, highlight=False)
    linear = {score.name: score.linear for score in scores if score.linear is not None}
    knn = {score.name: score.knn for score in scores if score.knn is not None}
    _warn_few_steps(trained, splits, source, linear or knn, "linear" if linear else "kNN", say)


def _show_label_free(
    trained: Trained,
    splits: Splits,
    scores: Sequence[label_free.Score],
    console: Console,
    say: Callable[[str], None],
) -> None:
    num_images = scores[0].num_images
    subset = f"{num_images:,} {splits.name} images"
    if num_images < len(splits.test):
        subset = f"{num_images:,} of {len(splits.test):,} images"
    name = shown(trained.settings.name)
    say(f"{name}, step {trained.step:,}: scores without labels on {subset}, {trained.view.size} px")
    console.print(label_free.table(scores))
    for line in label_free.legend(num_images):
        say(line)


def _warn_few_steps(
    trained: Trained,
    splits: Splits,
    source: SourceConfig,
    scores: dict[str, float],
    kind: str,
    say: Callable[[str], None],
) -> bool:
    """Say that the run was short if its encoder is worse than raw pixels; return whether this was said.

    scores: accuracies in [0, 1], by the names of the representations.  kind: of the accuracy, in words.
    """
    pretrained, pixels = scores.get(PRETRAINED), scores.get(PIXELS)
    if pretrained is None or pixels is None or pretrained >= pixels:
        return False
    duration, num_epochs = plural(trained.step, "step"), float("inf")
    if images.was_trained_on(trained, source):
        num_epochs = trained.step / max(1, len(splits.all_train) // trained.settings.batch_size)
        duration += f" ({num_epochs:.1f} epochs)"
    if trained.step >= FEW_STEPS and num_epochs >= FEW_EPOCHS:
        return False
    say(
        f"The pretrained encoder is worse than raw pixels here ({kind}: {100 * pretrained:.1f} % against "
        f"{100 * pixels:.1f} %): it was trained for only {duration}; train longer with --epochs."
    )
    return True


def _write(trained: Trained, record: dict[str, Any]) -> None:
    path = trained.folder / "probe.json"
    try:
        files.replace(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(
            f"cannot write {shown(path)}: {error.strerror}; the scores are only in the table above"
        ) from error
