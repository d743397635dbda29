"""``sslx probe`` and ``sslx plot``: a checkpoint's encoder, and what its frozen features are worth and look like."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslx import checkpoint, config, data, distributed, encoders, files, methods, plot, probe, rng
from sslx.config import PlotConfig, PretrainConfig, ProbeConfig
from sslx.data import sources
from sslx.data.listing import silent
from sslx.data.sources import Source
from sslx.data.views import ViewSpec, eval_view
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, MissingInput, StorageError, UserError
from sslx.group_norm import group_norm
from sslx.methods.base import Method
from sslx.probe import Score, features
from sslx.probe.features import Features
from sslx.state import VIEW
from sslx.words import one_line, shown

DIGITS_NOTE = (
    "Raw pixels do well here because the digits are 8x8 pixels, centred and of one size: two images of a digit "
    "overlap pixel by pixel. On photographs they do not (README, CIFAR-10)."
)


@dataclass(frozen=True)
class Trained:
    """A checkpoint: its config, its views' size, the probes' view, the method's weights, and its run folder."""

    settings: PretrainConfig
    size: int
    view: ViewSpec
    weights: dict[str, Any]
    step: int
    folder: Path

    def encoder(self, *, trained: bool, device: torch.device) -> encoders.Encoder:
        """The encoder, with the checkpoint's weights or as it was initialised at the start of the run."""
        rng.seed_torch(self.settings.seed)
        norm = "group" if self.settings.batch_norm == "group" else "batch"
        trunk = replace(self.settings.encoder, weights=None)
        encoder = encoders.build(trunk, self.size, self.view.size, norm=norm)
        if trained:
            weights = {k.removeprefix("encoder."): v for k, v in self.weights.items() if k.startswith("encoder.")}
            checkpoint.load_weights(encoder, weights, f"checkpoint in {self.folder}")
        return encoder.to(device)

    def method(self, device: torch.device) -> Method:
        """The method, with the checkpoint's weights, in evaluation mode."""
        encoder = self.encoder(trained=False, device=torch.device("cpu"))
        method: Method = methods.module(self.settings.method.name).Method(self.settings.method, encoder)
        if self.settings.batch_norm == "group":
            group_norm(method)
        checkpoint.load_weights(method, self.weights, f"checkpoint in {self.folder}")
        return method.to(device).eval()


def load(path: Path) -> Trained:
    """Read a run folder, a checkpoint directory or a state.pt."""
    state = checkpoint.load(path, needs=VIEW)
    try:
        view = ViewSpec(**state["eval_view"])
    except (TypeError, ValueError) as error:
        raise DataError(f"checkpoint {path} is not one that sslx wrote: its 'eval_view': {one_line(error)}") from error
    folder = path.parent if path.name == "state.pt" else path
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    size = state.get("size", view.size)  # of the training views: the encoder's stem depends on it
    return Trained(config.loads(state["config"]), size, view, state["method"], state["step"], folder)


class _Bars:
    """One progress bar for each stage that reports, on rank 0 and a terminal only."""

    def __init__(self, console: Console, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.display = Progress(*columns, console=console, transient=True, disable=not enabled)
        self._tasks: dict[str, Any] = {}
        self.stage = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        name = f"{self.stage}: {what}"
        if name not in self._tasks:
            self._tasks[name] = self.display.add_task(name, total=total)
        self.display.update(self._tasks[name], completed=done, total=total)


def _splits(settings: data.Config, say: Callable[[str], None]) -> tuple[Source, Source]:
    """Both splits to probe on, told of to ``say`` as ``sslx pretrain`` tells of its images."""
    train = sources.build(settings, "train", say=say)
    test = sources.build(settings, "test", say=say, classes=train.classes, levels=train.levels)
    _describe(train, "training", say)
    _describe(test, "test", say)
    return train, test


def _describe(source: Source, split: str, say: Callable[[str], None]) -> None:
    for line in (f"{split} split: {source.describe()}", *source.notes):
        say(line)


def _check_labels(train: Source, test: Source) -> None:
    bare = next((source for source in (train, test) if source.labels is None), None)
    if bare is not None:
        raise DataError(
            f"probes need labels, and {bare.name} has none ({bare.unlabeled}): give class folders with "
            "--data.source folder --data.root TRAIN --data.test-root TEST, or another labeled source"
        )


def _say(console: Console, ranks: Ranks) -> Callable[[str], None]:
    """Prints a line on rank 0, as it is."""
    return partial(console.print, markup=False, highlight=False, soft_wrap=True) if ranks.is_main else silent


def _loader(
    settings: data.Config, source: Source, view: ViewSpec, batch_size: int, ranks: Ranks, dtype: torch.dtype
) -> data.Loader:
    return data.evaluation(
        settings,
        source,
        view,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=distributed.local_world_size(),
        device=ranks.device,
        dtype=dtype,
    )


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None


def scores(
    trained: Trained, settings: data.Config, options: ProbeConfig, ranks: Ranks, console: Console
) -> list[Score]:
    """Probe the pretrained encoder and, if asked, raw pixels and the untrained encoder, on the same splits."""
    train, test = _splits(settings, _say(console, ranks))
    _check_labels(train, test)
    assert train.labels is not None
    probes, lines = probe.possible(options.probe, torch.from_numpy(train.labels), train.classes or ())
    for line in lines:
        _say(console, ranks)(line)
    device, autocast = ranks.device, _autocast(ranks.device)
    found: list[Score] = []
    bars = _Bars(console, ranks.is_main)
    with bars.display:
        wanted = ["raw pixels", "untrained encoder"] if options.baselines else []
        for name in [*wanted, "pretrained encoder"]:
            bars.stage = name
            made: list[Features] = []
            for split in (train, test):
                batches = _loader(settings, split, trained.view, options.batch_size, ranks, torch.float32)
                if name == "raw pixels":
                    made.append(features.pixels(batches, num_samples=len(split), progress=bars))
                else:
                    encoder = trained.encoder(trained=name == "pretrained encoder", device=device)
                    made.append(
                        features.extract(encoder, batches, autocast=autocast, num_samples=len(split), progress=bars)
                    )
            if ranks.is_main:
                classes = len(train.classes or ())
                found.append(probe.evaluate(probes, made[0], made[1], name, classes, device=device, progress=bars))
            distributed.barrier()
    return found


def probe_main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """``sslx probe CHECKPOINT``: print the table, and write it to ``probe.json`` in the run folder.

    path: the checkpoint that argv names.  quiet: say nothing on wrong flags.
    """
    trained = load(path)
    options = config.load_probe(argv, trained.settings.data, quiet=quiet)
    settings, ours = options.data, trained.settings.data
    if settings.size != ours.size:
        raise ConfigError(f"--data.size {settings.size} is of training views; the probes' is --data.eval-size")
    if settings.eval_size != ours.eval_size and settings.eval_size is not None:
        trained = replace(trained, view=eval_view(settings.eval_size, trained.view.mean, trained.view.std))
    ranks = distributed.init(options.device)
    console = Console()
    found = scores(trained, settings, options, ranks, console)
    if ranks.is_main:
        note = DIGITS_NOTE if settings.source == "digits" and options.baselines else ""
        what = f"test accuracy in % on {settings.source}, {trained.view.size} px"
        name = shown(trained.settings.name)
        console.print(f"{name}, step {trained.step:,}: {what}", markup=False, highlight=False)
        console.print(probe.table(found, ""))
        if note:
            console.print(note, highlight=False)
        record = {
            "step": trained.step,
            "source": settings.source,
            "view_px": trained.view.size,
            "scores": probe.as_json(found),
        }
        _write(trained.folder / "probe.json", record)
    distributed.shutdown()
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        files.replace(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: the table above is all there is") from error


def _picture(trained: Trained, test: Source, name: str, seed: int, device: torch.device, path: Path) -> bool:
    """Draw what the method shows of 8 images, cut as for probes, of the training views' size; False: nothing."""
    method, settings = trained.method(device), trained.settings
    chosen = plot.subsample(len(test), None if test.labels is None else torch.from_numpy(test.labels), 8, seed)
    view = replace(trained.view, size=trained.size)
    alone = Ranks(0, 1, 0, device)
    batch = next(_loader(settings.data, test.subset(chosen), view, len(chosen), alone, torch.float32))
    drawn = torch.from_numpy(rng.uniform(seed, "picture", chosen, num=method.num_draws)).float()
    rows = method.picture(replace(batch, draws=drawn.clamp_(max=1 - 2.0**-24).to(device)))
    if rows:
        title = f"{settings.name}: {settings.method.name} on {name} images"
        plot.images(rows, view, path, title, f"step {trained.step:,}, {trained.size} px")
    return bool(rows)


def plot_main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """``sslx plot CHECKPOINT``: ``loss.png``, ``tsne.png`` and, where the method shows something, ``method.png``.

    All in the run folder.  What cannot be drawn is left out with a line; the first such error, where nothing can.
    path: the checkpoint that argv names.  quiet: say nothing on wrong flags.
    """
    trained = load(path)
    options = config.load_plot(argv, trained.settings.data, quiet=quiet)
    ranks = distributed.init(options.device)
    trained = replace(trained, settings=replace(trained.settings, data=options.data))
    console = Console()
    say = _say(console, ranks)
    written, problems = list[Path](), list[UserError]()

    def attempt(file: str, draw: Callable[[Path], bool]) -> None:
        try:
            written.extend([trained.folder / file] * draw(trained.folder / file))
        except UserError as error:
            problems.append(error)
        except OSError as error:
            problems.append(StorageError(f"cannot write {shown(trained.folder / file)}: {error.strerror}"))

    if ranks.is_main:
        attempt("loss.png", partial(_loss_curve, trained.folder / "metrics.jsonl"))
    try:
        train, source, name = _splits_to_draw(options.data, say)
    except UserError as error:
        problems.append(error)
    else:
        attempt("tsne.png", partial(_tsne, trained, options, train, source, name, ranks, console))
        if ranks.is_main:
            attempt("method.png", partial(_picture, trained, source, name, options.seed, ranks.device))
    distributed.shutdown()
    if written:
        say(f"wrote {', '.join(map(shown, written))}")
    storage = [problem for problem in problems if isinstance(problem, StorageError)]
    if ranks.is_main and (storage or not written):
        raise (*storage, *problems)[0]
    for problem in problems:
        say(f"left out: {problem}")
    return 0


def _splits_to_draw(settings: data.Config, say: Callable[[str], None]) -> tuple[Source, Source, str]:
    """The training split, and what to draw, the test split or, where there is none, the training split; its name."""
    train = sources.build(settings, "train", say=say)
    _describe(train, "training", say)
    try:
        test = sources.build(settings, "test", say=say, classes=train.classes, levels=train.levels)
    except (MissingInput, DataError) as error:
        say(f"drawing training images, for want of a test split: {error}")
        return train, train, "training"
    _describe(test, "test", say)
    return train, test, "test"


def _loss_curve(metrics: Path, path: Path) -> bool:
    plot.loss_curve(metrics, path)
    return True


def _tsne(
    trained: Trained,
    options: PlotConfig,
    train: Source,
    source: Source,
    name: str,
    ranks: Ranks,
    console: Console,
    path: Path,
) -> bool:
    """Draw the features of ``source``, with its kNN accuracy where it is another than the training split."""
    bars = _Bars(console, ranks.is_main)
    made: list[Features] = []
    with bars.display:
        bars.stage = "picture"
        encoder = trained.encoder(trained=True, device=ranks.device)
        autocast = _autocast(ranks.device)
        labeled = source is not train and train.labels is not None and source.labels is not None
        for split in (train, source) if labeled else (source,):
            batches = _loader(options.data, split, trained.view, 256, ranks, torch.float32)
            made.append(features.extract(encoder, batches, autocast=autocast, num_samples=len(split), progress=bars))
    if not ranks.is_main:
        return False
    title = f"{trained.settings.name}: features of {len(source):,} {name} images"
    if labeled and train.classes:
        title += f", kNN accuracy {100 * probe.knn.accuracy(made[0], made[1], len(train.classes)):.1f} %"
    with console.status("t-SNE ..."):
        x, label = made[-1].x, made[-1].label
        plot.tsne(x, label, train.classes, path, title, max_points=options.points, seed=options.seed)
    return True
