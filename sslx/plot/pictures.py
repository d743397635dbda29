"""``sslx plot``: writes the pictures of a run into its folder."""

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

from sslx import by_name, config, data, distributed, plot
from sslx.config import PlotConfig
from sslx.console.bars import Bars, say_to
from sslx.console.words import plural, shown
from sslx.data import sources
from sslx.data.draws import Draws
from sslx.data.order import Repeated, Shuffled
from sslx.data.sources import Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import StorageError, UserError
from sslx.plot.embedding import Projection
from sslx.probe import confusion, held_out, images, knn
from sslx.probe.config import Config as ProbesConfig
from sslx.probe.features import Features
from sslx.probe.images import Splits
from sslx.runs import trackers
from sslx.trained import Trained, load

NUM_QUERIES, NUM_NEIGHBORS = 8, 6
NUM_VIEWED, MIN_VIEWS = 6, 4
"""Number of images whose views are shown, and the minimum number of views of each, over several epochs if necessary."""
NUM_METHOD_IMAGES = 8
MAPS: dict[Projection, str] = {"t-SNE": "tsne.png", "UMAP": "umap.png"}
_MAX_BANK = 50_000
"""Maximum number of training images for the kNN accuracy in the map's title.  ``sslx probe`` has no such limit."""
_THUMBNAIL_PX, _NEIGHBOR_PX = 96, 160


@dataclass(frozen=True)
class Scene:
    """Everything that the pictures are drawn from: a checkpoint, the options, the images and a device."""

    trained: Trained
    options: PlotConfig
    splits: Splits
    device: torch.device

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def name(self) -> str:
        return self.trained.settings.name

    @property
    def labels(self) -> Tensor | None:
        """Labels (N,) of the images to draw, or None."""
        labels = self.splits.test.facts.labels
        return None if labels is None else torch.from_numpy(labels)

    @property
    def has_classes(self) -> bool:
        """Return whether the images to draw have several classes, which training images teach to tell apart."""
        labels = self.labels
        return labels is not None and len(labels.unique()) > 1 and not images.unlearnable_reason(self.splits.all_train)

    def loader(self, source: Source, view: ViewSpec) -> data.Loader:
        """Return a loader of a whole source in batches of 64."""
        return images.loader(self.options.data, source, view, 64, Ranks(device=self.device), torch.float32)

    def pixels(self, rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
        """Return the images of the given rows (n, S, S, 3) in [0, 1], with the probes' view at most ``size`` pixels."""
        view = replace(self.trained.view, size=min(size, self.trained.view.size))
        batches = self.loader(self.splits.test.take(rows), view)
        return np.concatenate([plot.rgb(batch.views[0], view) for batch in batches])


def main(argv: Sequence[str], path: Path, *, quiet: bool = False) -> int:
    """Run ``sslx plot CHECKPOINT``: write pictures into the run folder.

    They are loss.png, tsne.png, umap.png where umap-learn is installed, confusion.png after ``sslx probe`` with labels,
    neighbors.png, views.png and, if the method has a picture, method.png.  They also go to the run in wandb, if it or a
    flag asks for that.  A picture that cannot be drawn is left out with a line.  An error is raised if none can be
    drawn or written.
    path: the checkpoint that argv names.  quiet: do not print anything about wrong flags.
    """
    trained = load(path)
    options = config.load_plot(argv, trained.settings, quiet=quiet)
    options = replace(options, data=trained.reading(options.data))
    ranks = distributed.init(options.device)
    console = Console()
    say = say_to(console, ranks.is_main)
    trained = trained.to(ranks.device)
    if name := trained.settings.method.exported_name:
        say(f"features are those of {name}")
    album = Album(trained.folder)
    if ranks.is_main:
        album.attempt("loss.png", partial(_loss, trained))
        album.attempt("confusion.png", partial(draw_confusion, trained.folder))
        if "UMAP" not in plot.projections():
            say("no map by UMAP, which needs a package: pip install umap-learn")
    try:
        splits = images.splits(trained, options, say, min_images=held_out.MIN_IMAGES_TO_SHOW)
        scene = Scene(trained, options, splits, ranks.device)
    except UserError as error:
        album.problems.append(error)
    else:
        _draw(album, scene, options, ranks, console)
    distributed.shutdown()
    if album.written:
        say(f"wrote {', '.join(map(shown, album.written))}")
    storage_problems = [problem for problem in album.problems if isinstance(problem, StorageError)]
    if ranks.is_main and (storage_problems or not album.written):
        raise (*storage_problems, *album.problems)[0]
    for problem in album.problems:
        say(f"left out: {problem}")
    if ranks.is_main and album.written:
        drawn = {f"pictures/{path.stem}": path for path in album.written}
        results = trackers.Results(step=trained.step, pictures=drawn)
        trackers.add_results(options.log_of(trained.settings.log), trained.folder, results, say)
    return 0


class Album:
    """The pictures that were written, and the reasons why others were not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self.problems: list[UserError] = []

    def attempt(self, file: str, draw: Callable[[Path], bool]) -> None:
        """Draw a picture and record the outcome; ``draw`` returns whether it wrote the file."""
        path = self.folder / file
        try:
            if draw(path):
                self.written.append(path)
        except UserError as error:
            self.problems.append(type(error)(f"{file}: {error}"))
        except OSError as error:
            self.problems.append(StorageError(f"cannot write {shown(path)}: {error.strerror}"))


def _draw(album: Album, scene: Scene, options: PlotConfig, ranks: Ranks, console: Console) -> None:
    """Draw all pictures of images.  Every rank must call this, because all of them compute features."""
    try:
        bank, features = _features(scene, ranks, console)
    except UserError as error:
        album.problems.append(error)
    else:
        if ranks.is_main:
            accuracy = _accuracy(scene, bank, features)
            for by in plot.projections():
                with console.status(f"{by} ..."):
                    draw = partial(_map, scene, options.num_points, by, accuracy, features)
                    album.attempt(MAPS[by], draw)
            album.attempt("neighbors.png", partial(_neighbors, scene, features.x))
    if ranks.is_main:
        with console.status("views ..."):
            album.attempt("views.png", partial(_views, scene))
            album.attempt("method.png", partial(_method, scene))


def draw_confusion(folder: Path, path: Path) -> bool:
    """Draw the confusion matrix that ``sslx probe`` counted; return False if it counted none."""
    counted = folder / confusion.FILE
    if counted.is_file():
        plot.confusion_matrix(confusion.read(counted), path, folder.name)
    return counted.is_file()


def _loss(trained: Trained, path: Path) -> bool:
    plot.loss_curve(trained.folder / "metrics.jsonl", path, title=f"{trained.settings.name}: pretraining loss")
    return True


def _features(scene: Scene, ranks: Ranks, console: Console) -> tuple[Features | None, Features]:
    """Return the training features for the kNN accuracy, if it can be computed, and the features to draw."""
    train, test = scene.splits.train, scene.splits.test
    has_labels = train.facts.labels is not None and test.facts.labels is not None
    needs_bank = has_labels and len(test) <= len(train) <= _MAX_BANK
    bars = Bars(console, ranks.is_main)
    with bars.display:
        bars.stage = "picture"
        encoder = scene.trained.encoder
        bank = images.extract(scene.trained, encoder, scene.options.data, train, ranks, bars) if needs_bank else None
        return bank, images.extract(scene.trained, encoder, scene.options.data, test, ranks, bars)


def _accuracy(scene: Scene, bank: Features | None, features: Features) -> float | None:
    """Return the kNN accuracy in [0, 1], as ``sslx probe`` measures it, for titles of maps; None without one."""
    classes, settings = scene.splits.train.facts.classes, ProbesConfig()
    if bank is None or not scene.has_classes or not classes:
        return None
    k, _ = knn.choose_k(bank, len(classes), settings.k, settings.temperature, seed=settings.seed)
    return knn.accuracy(bank, features, len(classes), k, settings.temperature)


def _map(scene: Scene, max_points: int, by: Projection, accuracy: float | None, features: Features, path: Path) -> bool:
    """Draw a map of the features.  Without a legend of classes, it shows some of the images."""
    splits, labels = scene.splits, scene.labels if scene.has_classes else None
    has_legend = labels is not None and len(labels.unique()) <= plot.MAX_NAMED_CLASSES
    title = f"{scene.name}: features of {len(features.x):,} {splits.name} images"
    if accuracy is not None:
        title += f", kNN accuracy {100 * accuracy:.1f} %"
    plot.feature_map(
        features.x,
        labels,
        splits.test.facts.classes,
        path,
        title,
        thumbnails=None if has_legend else partial(scene.pixels, size=_THUMBNAIL_PX),
        by=by,
        max_points=max_points,
        seed=scene.seed,
    )
    return True


def _neighbors(scene: Scene, x: Tensor, path: Path) -> bool:
    """Draw some images, each with the images whose features are nearest to its own.  x: features (N, D)."""
    facts = scene.splits.test.facts
    queries, neighbors, similarities = plot.neighbors(x, NUM_QUERIES, NUM_NEIGHBORS, scene.seed)
    rows = np.concatenate([queries[:, None], neighbors], axis=1)
    unique_rows, inverse = np.unique(rows, return_inverse=True)
    pixels = scene.pixels(unique_rows, _NEIGHBOR_PX)[inverse.reshape(rows.shape)]

    def with_class(row: int, text: str) -> str:
        if facts.labels is None or facts.classes is None:
            return text
        return f"{text} {shown(facts.classes[facts.labels[row]], 12)}".strip()

    query_text = "query" if facts.labels is None else ""
    lines: list[list[str]] = []
    for query, near, similar in zip(queries.tolist(), neighbors.tolist(), similarities.tolist(), strict=True):
        line = [with_class(query, query_text)]
        line += [with_class(row, f"{similarity:.2f}") for row, similarity in zip(near, similar, strict=True)]
        lines.append(line)
    plot.neighbor_sheet(
        list(zip(pixels, lines, strict=True)),
        path,
        f"{scene.name}: nearest neighbors by features",
        f"{len(queries)} of {len(x):,} {scene.splits.name} images (framed), and their nearest neighbors with the "
        f"cosine similarity{plot.drawn_channels(scene.trained.view)}",
    )
    return True


def training_views(scene: Scene) -> tuple[npt.NDArray[np.int64], list[tuple[Tensor, ...]], Source]:
    """Return the rows of the run's first training images, their views in each of the first epochs, and the source.

    The views are exactly those that the training loader of a single rank makes.
    """
    settings = scene.trained.settings
    source = scene.splits.all_train
    if scene.options.source.has_unlabeled:
        source = sources.build(scene.options.source, "pretrain", scene.options.data, training=source)
    num_images = min(NUM_VIEWED, len(source))
    blocks = source.facts.blocks
    index = Shuffled(num_samples=len(source), batch_size=num_images, seed=settings.seed, blocks=blocks).batch(0)
    specs = scene.trained.views
    order = Repeated(index=index, num_epochs=-(-MIN_VIEWS // len(specs)))
    batches = data.in_order(
        scene.options.data,
        source,
        specs,
        order,
        seed=settings.seed,
        ranks=Ranks(device=scene.device),
        dtype=torch.float32,
    )
    return index, [tuple(view.cpu().clone() for view in batch.views) for batch in batches], source


def _views(scene: Scene, path: Path) -> bool:
    """Draw some training images and the views of them that the method was trained on."""
    trained = scene.trained
    index, epochs, source = training_views(scene)
    plain = next(scene.loader(source.take(index), trained.view)).views[0]
    rows = [(f"evaluation view, {trained.view.size} px", plain)]
    for epoch, views in enumerate(epochs, 1):
        prefix = f"epoch {epoch}, " if len(epochs) > 1 else ""
        rows += [(f"{prefix}{name}", view) for name, view in rows_of_views(views, trained.view)]
    num_views = plural(len(trained.views), "augmented view")
    plot.images(
        rows,
        trained.view,
        path,
        f"{scene.name}: training views of {by_name.label(trained.settings.method.name)}",
        f"{plural(len(index), 'training image')} and, below each, its {num_views} per epoch"
        f"{plot.drawn_channels(trained.view)}",
    )
    return True


def rows_of_views(views: Sequence[Tensor], view: ViewSpec) -> list[tuple[str, Tensor]]:
    """Return named rows of one epoch's views, in which small views of the same size stand side by side."""
    width = max(images.shape[3] for images in views)
    rows: list[tuple[str, Tensor]] = []
    first = 1
    for size, group in groupby(views, key=lambda images: int(images.shape[3])):
        same_size = list(group)
        num_per_row = max(1, width // (size + 1))
        for start in range(0, len(same_size), num_per_row):
            row = same_size[start : start + num_per_row]
            last = first + len(row) - 1
            name = f"view {first}"
            if len(row) > 1:
                name = f"views {first} {'and' if len(row) == 2 else 'to'} {last}"
            images = plot.side_by_side(row, view, width) if size < width else row[0]
            rows.append((f"{name}, {size} px", images))
            first = last + 1
    return rows


def _method(scene: Scene, path: Path) -> bool:
    """Draw the method's picture of 8 images (evaluation crop, training size); return False if it has none."""
    trained, test = scene.trained, scene.splits.test
    method, settings = trained.method(), trained.settings
    chosen = plot.subsample(len(test), scene.labels, NUM_METHOD_IMAGES, scene.seed)
    view = replace(trained.view, size=trained.size)
    batch = next(scene.loader(test.take(chosen), view))
    draws = method.draw(Draws(seed=scene.seed, epoch=0, batch=0, index=chosen))
    rows = method.picture(replace(batch, draws=tuple(torch.from_numpy(array).to(scene.device) for array in draws)))
    if rows:
        title = f"{settings.name}: {by_name.label(settings.method.name)} on {scene.splits.name} images"
        plot.images(rows, view, path, title, f"step {trained.step:,}, {trained.size} px{plot.drawn_channels(view)}")
    return bool(rows)
