"""``sslx plot``: the pictures of a run, in its folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from sslx import config, data, distributed, plot, rng
from sslx.config import PlotConfig
from sslx.console.bars import Bars, say_to
from sslx.console.words import shown
from sslx.data import sources
from sslx.data.order import Repeated, Shuffled
from sslx.data.sources import Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import StorageError, UserError
from sslx.plot.embedding import Projection
from sslx.probe import held_out, images, knn
from sslx.probe.features import Features
from sslx.probe.images import Splits
from sslx.trained import Trained, load

QUERIES, NEIGHBORS = 8, 6
VIEWED, FEWEST_VIEWS = 6, 4
"""Images whose views are shown, and of each at least so many, of several epochs if need be."""
METHOD_IMAGES = 8
_BANK = 50_000
"""Training images, at most, to compute the kNN accuracy of the title with; of more, only ``sslx probe`` does."""
_THUMBNAIL_PX, _NEIGHBOR_PX = 96, 160


@dataclass(frozen=True)
class Scene:
    """What is drawn: a checkpoint, the settings of the images and the images, the seed, and where it is computed."""

    trained: Trained
    settings: data.Config
    splits: Splits
    seed: int
    device: torch.device

    @property
    def name(self) -> str:
        return self.trained.settings.name

    @property
    def labels(self) -> Tensor | None:
        """(N,) of the images to draw."""
        labels = self.splits.test.labels
        return None if labels is None else torch.from_numpy(labels)

    def loader(self, source: Source, view: ViewSpec) -> data.Loader:
        """Of all of a source, in batches of 64."""
        return images.loader(self.settings, source, view, 64, Ranks(device=self.device), torch.float32)

    def pixels(self, rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
        """The images of these rows as probes see them, of ``size`` pixels or fewer: (n, S, S, 3) in [0, 1]."""
        view = replace(self.trained.view, size=min(size, self.trained.view.size))
        batches = self.loader(self.splits.test.subset(rows), view)
        return np.concatenate([plot.rgb(batch.views[0], view) for batch in batches])


def main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """``sslx plot CHECKPOINT``: write pictures into the run folder.

    They are loss.png, tsne.png or umap.png, neighbors.png, views.png and, where the method shows something, method.png.
    What cannot be drawn is left out with a line; the first such error is raised where nothing can, or none is written.
    path: the checkpoint that argv names.  quiet: say nothing on wrong flags.
    """
    trained = load(path)
    options = config.load_plot(argv, trained.settings.data, quiet=quiet)
    ranks = distributed.init(options.device)
    console = Console()
    say = say_to(console, ranks.is_main)
    trained = trained.to(ranks.device)
    album = Album(trained.folder)
    if ranks.is_main:
        album.attempt("loss.png", partial(_loss, trained))
    try:
        splits = images.splits(trained, options.data, say, min_images=held_out.MIN_IMAGES_TO_SHOW)
        scene = Scene(trained, options.data, splits, options.seed, ranks.device)
    except UserError as error:
        album.problems.append(error)
    else:
        _draw(album, scene, options, ranks, console)
    distributed.shutdown()
    if album.written:
        say(f"wrote {', '.join(map(shown, album.written))}")
    storage = [problem for problem in album.problems if isinstance(problem, StorageError)]
    if ranks.is_main and (storage or not album.written):
        raise (*storage, *album.problems)[0]
    for problem in album.problems:
        say(f"left out: {problem}")
    return 0


class Album:
    """The pictures that were written, and why others were not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self.problems: list[UserError] = []

    def attempt(self, file: str, draw: Callable[[Path], bool]) -> None:
        """Draw a picture; ``draw`` says whether there was something to see."""
        path = self.folder / file
        try:
            self.written.extend([path] * draw(path))
        except UserError as error:
            self.problems.append(type(error)(f"{file}: {error}"))
        except OSError as error:
            self.problems.append(StorageError(f"cannot write {shown(path)}: {error.strerror}"))


def _draw(album: Album, scene: Scene, options: PlotConfig, ranks: Ranks, console: Console) -> None:
    """All pictures of images; every rank must call it, as all compute features."""
    try:
        bank, found = _features(scene, ranks, console)
    except UserError as error:
        album.problems.append(error)
    else:
        if ranks.is_main:
            by = plot.projection()
            with console.status(f"{by} ..."):
                file = {"UMAP": "umap.png", "t-SNE": "tsne.png"}[by]
                album.attempt(file, partial(_map, scene, options.points, by, bank, found))
                album.attempt("neighbors.png", partial(_neighbors, scene, found.x))
    if ranks.is_main:
        with console.status("views ..."):
            album.attempt("views.png", partial(_views, scene))
            album.attempt("method.png", partial(_method, scene))


def _loss(trained: Trained, path: Path) -> bool:
    plot.loss_curve(trained.folder / "metrics.jsonl", path, title=f"{trained.settings.name}: pretraining loss")
    return True


def _features(scene: Scene, ranks: Ranks, console: Console) -> tuple[Features | None, Features]:
    """Of the images to draw, and of those that their classes are found by, where there are some, but not too many."""
    train, test = scene.splits.train, scene.splits.test
    known = train.labels is not None and test.labels is not None and len(test) <= len(train) <= _BANK
    bars = Bars(console, ranks.is_main)
    with bars.display:
        bars.stage = "picture"
        encoder = scene.trained.encoder
        bank = images.extract(scene.trained, encoder, scene.settings, train, ranks, bars) if known else None
        return bank, images.extract(scene.trained, encoder, scene.settings, test, ranks, bars)


def _map(scene: Scene, points: int, by: Projection, bank: Features | None, found: Features, path: Path) -> bool:
    """The map of the features; without classes, or with more than a legend names, with some of the images on it."""
    splits, labels = scene.splits, scene.labels
    num_classes = 0 if labels is None else len(labels.unique())
    several = num_classes > 1 and not images.unlearnable_reason(splits.all_train)
    named = several and num_classes <= plot.MOST_NAMED
    title = f"{scene.name}: features of {len(found.x):,} {splits.name} images"
    if bank is not None and several and splits.train.classes:
        title += f", kNN accuracy {100 * knn.accuracy(bank, found, len(splits.train.classes)):.1f} %"
    plot.feature_map(
        found.x,
        labels if several else None,
        splits.test.classes,
        path,
        title,
        thumbnails=None if named else partial(scene.pixels, size=_THUMBNAIL_PX),
        by=by,
        max_points=points,
        seed=scene.seed,
    )
    return True


def _neighbors(scene: Scene, x: Tensor, path: Path) -> bool:
    """Some images, each with those whose features are nearest to its own."""
    source = scene.splits.test
    queries, columns, values = plot.neighbors(x, QUERIES, NEIGHBORS, scene.seed)
    rows = np.concatenate([queries[:, None], columns], axis=1)
    unique, where = np.unique(rows, return_inverse=True)
    pixels = scene.pixels(unique, _NEIGHBOR_PX)[where.reshape(rows.shape)]

    def named(row: int, text: str) -> str:
        if source.labels is None or source.classes is None:
            return text
        return f"{text} {shown(source.classes[source.labels[row]], 12)}".strip()

    lines = [
        [named(query, "" if source.labels is not None else "query")]
        + [named(row, f"{value:.2f}") for row, value in zip(near, similar, strict=True)]
        for query, near, similar in zip(queries.tolist(), columns.tolist(), values.tolist(), strict=True)
    ]
    plot.neighbor_sheet(
        list(zip(pixels, lines, strict=True)),
        path,
        f"{scene.name}: nearest neighbors by features",
        f"{len(queries)} of {len(x):,} {scene.splits.name} images (framed), and the nearest of the others with their "
        "cosine similarity",
    )
    return True


def training_views(scene: Scene) -> tuple[npt.NDArray[np.int64], list[tuple[Tensor, ...]], Source]:
    """Rows of the first images that the run was trained on, their views in the first epochs, and the source.

    Exactly as the training loader of one rank makes them.
    """
    settings = scene.trained.settings
    source = scene.splits.all_train
    if sources.pretrains_on_more(scene.settings):
        source = sources.build(scene.settings, "pretrain", levels=source.levels)
    num = min(VIEWED, len(source))
    index = Shuffled(num_samples=len(source), batch_size=num, seed=settings.seed).batch(0)
    specs = scene.trained.views
    order = Repeated(index=index, num_epochs=-(-FEWEST_VIEWS // len(specs)))
    batches = data.in_order(
        scene.settings, source, specs, order, seed=settings.seed, device=scene.device, dtype=torch.float32
    )
    return index, [tuple(view.cpu().clone() for view in batch.views) for batch in batches], source


def _views(scene: Scene, path: Path) -> bool:
    """Some images, and what the method was given in their place."""
    trained = scene.trained
    index, epochs, source = training_views(scene)
    plain = next(scene.loader(source.subset(index), trained.view)).views[0]
    rows = [(f"as probes see it, {trained.view.size} px", plain)]
    for epoch, views in enumerate(epochs, 1):
        when = f"epoch {epoch}, " * (len(epochs) > 1)
        rows += [(f"{when}{name}", view) for name, view in _rows_of_views(views, trained.view)]
    views_of_epoch = f"{len(trained.views)} augmented view{'s' * (len(trained.views) > 1)}"
    plot.images(
        rows,
        trained.view,
        path,
        f"{scene.name}: what {trained.settings.method.name} is trained on",
        f"{len(index)} training images, and below them the {views_of_epoch} an epoch that the method gets of them",
    )
    return True


def _rows_of_views(views: Sequence[Tensor], view: ViewSpec) -> list[tuple[str, Tensor]]:
    """Named rows of the views of an epoch; small ones of one size side by side, as many as a large one is wide."""
    width = max(each.shape[3] for each in views)
    rows: list[tuple[str, Tensor]] = []
    number = 1
    for size, same in groupby(views, key=lambda each: int(each.shape[3])):
        left = list(same)
        while left:
            together, left = left[: max(1, width // (size + 1))], left[max(1, width // (size + 1)) :]
            last = number + len(together) - 1
            name = (
                f"view {number}" if last == number else f"views {number} {'and' if last == number + 1 else 'to'} {last}"
            )
            rows.append(
                (f"{name}, {size} px", plot.side_by_side(together, view, width) if size < width else together[0])
            )
            number = last + 1
    return rows


def _method(scene: Scene, path: Path) -> bool:
    """What the method shows of 8 images, cut as for probes, of the training views' size; False: nothing."""
    trained, test = scene.trained, scene.splits.test
    method, settings = trained.method(), trained.settings
    chosen = plot.subsample(len(test), scene.labels, METHOD_IMAGES, scene.seed)
    view = replace(trained.view, size=trained.size)
    batch = next(scene.loader(test.subset(chosen), view))
    drawn = torch.from_numpy(rng.uniform(scene.seed, "picture", chosen, num=method.num_draws)).float()
    rows = method.picture(replace(batch, draws=drawn.clamp_(max=1 - 2.0**-24).to(scene.device)))
    if rows:
        title = f"{settings.name}: {settings.method.name} on {scene.splits.name} images"
        plot.images(rows, view, path, title, f"step {trained.step:,}, {trained.size} px")
    return bool(rows)
