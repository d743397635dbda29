"""``sslx neighbors``: the images of a source whose features are most similar to those of given images."""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from sslx import config, data, distributed, plot
from sslx.config import NeighborsConfig
from sslx.console.bars import Bars, say_to
from sslx.console.words import plural, shown
from sslx.data import pictures, sources
from sslx.data.sources import Source
from sslx.encoders.modes import evaluation_mode
from sslx.errors import ConfigError, DataError, MissingInput, StorageError
from sslx.machine import cores, devices, files
from sslx.trained import Trained, load

MAX_SHOWN = 16
"""Maximum number of given images in the picture; all of them are printed."""
_SIDE_PX = 160


@dataclass(frozen=True)
class Near:
    """The neighbors of one image, nearest first.  index: (K,) their places in the source.  similarity: (K,)."""

    index: list[int]
    similarity: list[float]


def main(argv: Sequence[str], path: Path, part: str | None = None, *, quiet: bool = False) -> int:
    """Run ``sslx neighbors CHECKPOINT IMAGE...``: print the neighbors, draw them, and return the exit code.

    path, part: the checkpoint that argv names, and the part of a file.  quiet: do not print anything about wrong flags.
    """
    trained = load(path, part=part)
    options = config.load_neighbors(argv, trained.settings if trained.is_run else None, quiet=quiet)
    output = options.output or trained.folder_for_results() / "nearest.png"
    if output.suffix not in (".png", ".svg"):
        raise ConfigError(f"--output {shown(output)} must end in .png or .svg")
    for image in options.images:
        if not image.exists():
            raise MissingInput(f"image {shown(image)} does not exist")
    if options.data.eval_size not in (None, trained.view.size):
        trained = trained.with_view_size(options.data.eval_size)
    options = replace(options, data=trained.reading(options.data))
    ranks = distributed.init(options.device)
    trained = trained.to(ranks.device)
    console = Console()
    say = say_to(console, ranks.is_main)
    queries = trained.embed(options.images, device=ranks.device, progress=False)
    source = sources.build(options.source, options.split, options.data, say=say)
    for line in (*trained.notes, source.describe(), *source.notes):
        say(line)
    batches = data.evaluation(
        options.data, source, trained.view, batch_size=options.batch_size, ranks=ranks, dtype=torch.float32, say=say
    )
    bars = Bars(console, ranks.is_main)
    bars.stage = "neighbors"
    with bars.display:
        found = search(trained, batches, queries, options.num_neighbors + 1, bars)
    found = [
        _others(source, image, near, options.num_neighbors) for image, near in zip(options.images, found, strict=True)
    ]
    if ranks.is_main:
        sys.stdout.write("".join(_lines(source, options.images, found)))
        try:
            _draw(trained, options, source, found, output)
        except OSError as error:
            raise StorageError(f"cannot write {shown(output)}: {files.reason(error)}") from error
        say(f"wrote {shown(output)}")
    distributed.shutdown()
    return 0


def search(trained: Trained, batches: data.Loader, queries: Tensor, k: int, bars: Bars) -> list[Near]:
    """Return the k images of a source that are most similar to each of the queries, on all ranks.

    batches: this rank's share of the source.  queries: features (Q, D).  Of equal similarities the lower index counts
    as nearer.  Only the similarities of one batch and the best ones so far are in memory.  Images that cannot be read
    or whose features are not finite are left out.
    """
    device, num_images = trained.device, len(batches.source)
    world_size, num_done = distributed.world_size(), 0
    autocast = devices.autocast(device)
    unit = F.normalize(queries.to(device), dim=1)
    best = torch.empty(len(queries), 0, device=device), torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    with evaluation_mode(trained.encoder):
        for batch in batches:
            view = batch.views[0]
            with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                features = trained.encoder(view).float()
            similarity = unit @ F.normalize(features, dim=1).T
            unreadable = np.isin(batch.index.numpy(), list(batches.bad))
            left_out = torch.from_numpy(unreadable).to(device) | ~similarity.isfinite()
            similarity.masked_fill_(left_out, -torch.inf)
            index = batch.index.to(device).expand(len(queries), -1)
            best = _nearest((best[0], similarity), (best[1], index), k)
            num_done += len(batch)
            bars("images", min(num_done * world_size, num_images), num_images)
    parts = distributed.gather_objects(tuple(tensor.cpu().numpy() for tensor in best))
    similarities, indices = (np.concatenate(tensors, axis=1) for tensors in zip(*parts, strict=True))
    return [_near(*row, k) for row in zip(similarities, indices, strict=True)]


def _nearest(similarities: Iterable[Tensor], indices: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of all similarities (Q, ...) in each row, and their indices; earlier ones win ties."""
    values, order = torch.cat(tuple(similarities), 1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], torch.cat(tuple(indices), 1).gather(1, order[:, :k])


def _near(similarity: npt.NDArray[np.float32], index: npt.NDArray[np.int64], k: int) -> Near:
    """Return the k best of the candidates of all ranks."""
    order = np.lexsort((index, -similarity))[:k]
    order = order[np.isfinite(similarity[order])]
    if not len(order):
        raise DataError("no image could be compared: their features are not finite, or no file can be read")
    return Near(index[order].tolist(), similarity[order].tolist())


def _others(source: Source, image: Path, near: Near, k: int) -> Near:
    """Return the k nearest images other than the image itself, which may be one of the source's."""
    kept = [place for place, index in enumerate(near.index) if not _is_same_file(source.path(index), image)][:k]
    return Near([near.index[place] for place in kept], [near.similarity[place] for place in kept])


def _is_same_file(path: str, other: Path) -> bool:
    with suppress(OSError, ValueError):
        return os.path.samefile(path, other)
    return False


def _class(source: Source, index: int) -> str:
    facts = source.facts
    return "" if facts.labels is None or not facts.classes else facts.classes[facts.labels[index]]


def _lines(source: Source, images: Sequence[Path], found: Sequence[Near]) -> Iterable[str]:
    for image, near in zip(images, found, strict=True):
        yield f"{shown(image)}\n"
        for index, similarity in zip(near.index, near.similarity, strict=True):
            yield f"  {similarity:6.3f}  {shown(source.path(index))}  {shown(_class(source, index))}".rstrip() + "\n"


def _draw(trained: Trained, options: NeighborsConfig, source: Source, found: Sequence[Near], output: Path) -> None:
    """Draw each image with its neighbors to the right."""
    images, found = options.images[:MAX_SHOWN], found[:MAX_SHOWN]
    view = replace(trained.view, size=min(_SIDE_PX, max(trained.view.size, 32)))

    def pixels(of: pictures.Pictures) -> npt.NDArray[np.float32]:
        batches = list(pictures.batches(of, view, 16, cores.allowed()))
        if batches[0].dtype != torch.uint8:
            return plot.rgb(pictures.normalized(torch.cat(batches), view, torch.device("cpu")), view)
        return torch.cat(batches).numpy().astype(np.float32) / np.float32(255)

    given = pixels(pictures.pictures_of(images, view.channels))
    rows: list[tuple[npt.NDArray[np.float32], list[str]]] = []
    for image, own, near in zip(images, given, found, strict=True):
        lines = [image.name]
        for index, similarity in zip(near.index, near.similarity, strict=True):
            name = _class(source, index) or os.path.basename(source.path(index))
            lines.append(f"{similarity:.2f} {shown(name, 12)}")
        neighbors = pixels(pictures.pictures_of(source.take(np.array(near.index)), view.channels))
        rows.append((np.concatenate([own[None], neighbors]), lines))
    some = plural(len(images), "given image")
    if len(images) < len(options.images):
        some = f"{len(images)} of the {len(options.images):,} given images"
    plot.neighbor_sheet(
        rows,
        output,
        f"{trained.name}: nearest neighbors by features",
        f"{some} (framed), and the nearest of {len(source):,} images with the cosine similarity"
        f"{plot.drawn_channels(view)}",
    )
