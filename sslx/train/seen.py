"""``sslx seen``: every step, view and crop of a run in which an image took part, of which nothing was stored."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from sslx import data
from sslx.console.progress import reporting
from sslx.console.words import plural, shown
from sslx.data import exclusion, sources, statistics
from sslx.data.codecs.headers import Unreadable
from sslx.data.lineage import Appearance, Training
from sslx.data.order import Sequential, Shuffled
from sslx.data.quarantine import Quarantine
from sslx.data.sources import Source
from sslx.distributed import Ranks
from sslx.errors import DataError
from sslx.machine import files
from sslx.runs import records
from sslx.trained import Trained, load

Indices = npt.NDArray[np.int64]
_MAX_SHOWN = 20


def main(run: Path, image: str, output: Path | None) -> int:
    """Print in which steps, epochs, views and crops of a run an image took part, and return the exit code.

    output: a JSON file that gets all of them, with all parameters of their augmentation.
    """
    trained = load(run)
    source = sources.build(trained.settings.source, "pretrain", trained.settings.data, say=_say)
    index = find(source, image)
    found = appearances(trained, source, index, say=_say)
    sys.stdout.write(f"{shown(source.path(index))}: {_summary(trained, found)}\n")
    if found:
        Console().print(_table(found))
    if len(found) > _MAX_SHOWN and not output:
        sys.stdout.write(f"{len(found) - _MAX_SHOWN:,} more: --output FILE.json writes all\n")
    if output:
        files.replace(output, (json.dumps([one.as_json() for one in found], indent=1) + "\n").encode())
        sys.stdout.write(f"wrote {shown(output)}\n")
    return 0


def find(source: Source, image: str) -> int:
    """Return the index of an image: its index itself, its path in any spelling, or its name in messages.

    Raises DataError if the source does not have it, or has several files of this name.
    """
    if image.isdecimal() and int(image) < len(source):
        return int(image)
    names = [source.path(i) for i in range(len(source))]
    for spelling in (image, os.path.abspath(image), *(os.path.join(root, image) for root in source.roots)):
        with suppress(ValueError):
            return names.index(spelling)
    with suppress(OSError):
        real = os.path.realpath(image, strict=True)
        with suppress(ValueError):
            return [os.path.realpath(name) for name in names].index(real)
    ends = [i for i, name in enumerate(names) if name.endswith(f"/{image}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise DataError(f"{plural(len(ends), 'image')} of {source.name} end in {shown(image)}: give more of its path")
    raise DataError(
        f"{shown(image)} is not among the {plural(len(source), 'image')} of {source.name}: give a path such as "
        f"{shown(names[0])}, or an index"
    )


def appearances(
    trained: Trained, source: Source, index: int, *, say: Callable[[str], None] = lambda _: None
) -> list[Appearance]:
    """Return each view of an image that a checkpoint was trained on, in the order of training.

    source: the images that the run was trained on.  index: that of the image.
    """
    settings = trained.settings
    order = Shuffled(
        num_samples=len(source),
        batch_size=settings.batch_size,
        accumulate=settings.batches_per_step,
        seed=settings.seed,
        blocks=source.facts.blocks,
        shares=source.facts.shares,
    )
    training = Training(order=order, num_steps=trained.step, specs=trained.views, seed=settings.seed)
    stand_ins = _stand_ins(trained, source, say)
    samples = np.flatnonzero(stand_ins == index).tolist()
    return list(training.appearances(samples, *_size(source, index))) if samples else []


def _stand_ins(trained: Trained, source: Source, say: Callable[[str], None]) -> Indices:
    """Return the image that is read for each sample: (N,).  All images are read again if some were unreadable."""
    settings, every = trained.settings.data, np.arange(len(source))
    excluded = exclusion.excluded(settings.exclude, source)[0] if settings.exclude else every[:0]
    order = Sequential(num_samples=len(source), per_rank=64)
    ranks = Ranks(device=torch.device("cpu"))
    loader = data.in_order(settings, source, trained.views, order, seed=0, ranks=ranks, dtype=torch.float32)
    quarantine = Quarantine(source, loader.backend, 1.0, lambda _: None, excluded)
    if any(line.get("unreadable_images") for line in records.read_metrics(trained.folder / "metrics.jsonl")):
        say("some images could not be read in training: looks for them again")
        with reporting(None, "images") as report:
            for start in range(0, len(source), 256):
                part = np.setdiff1d(every[start : start + 256], excluded)
                quarantine.set_aside(loader.backend.unreadable(part))
                report(start + len(part), len(source))
    loader.close()
    return quarantine.substitute(every)


def _size(source: Source, index: int) -> tuple[int, int]:
    """Return the height and width of an image as it is cropped."""
    try:
        height, width = statistics.pixels(source, index).shape[:2]
    except Unreadable as error:
        raise DataError(f"{source.where(index)} cannot be read: {error}") from error
    return height, width


def _summary(trained: Trained, found: Sequence[Appearance]) -> str:
    num_epochs = len({one.epoch for one in found})
    of_run = f"the {plural(trained.step, 'step')} of {shown(trained.folder)}"
    if not found:
        return f"in none of {of_run}"
    return f"{plural(len(found), 'view')} in {plural(num_epochs, 'epoch')} of {of_run}"


def _table(found: Sequence[Appearance]) -> Table:
    """Return the first appearances.

    Whose place the image took is only shown if it was not always its own, and rotations if the recipe has them.
    """
    replaced = len({one.sample for one in found}) > 1
    turned = any(one.draws.keys() & {"quarter_turns", "angle"} for one in found)
    headers = ["step", "epoch", "view", "top", "left", "bottom", "right", "flipped"]
    headers += ["rotated"] * turned + ["in place of"] * replaced
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[:7]:
        column.justify = "right"
    for one in found[:_MAX_SHOWN]:
        numbers = (f"{number:,}" for number in (one.step, one.epoch, one.view, *one.box))
        rotation = [_rotation(one)] if turned else []
        place = [f"image {one.sample}"] if replaced else []
        table.add_row(*numbers, _flip(one), *rotation, *place)
    return table


def _flip(one: Appearance) -> str:
    if one.draws.get("vertical_flip"):
        return "both ways" if one.draws.get("flip") else "vertically"
    return "yes" if one.draws.get("flip") else "no"


def _rotation(one: Appearance) -> str:
    """Return the angle counterclockwise, above -180 and at most 180 degrees."""
    quarters, angle = (one.draws.get(name, 0.0) for name in ("quarter_turns", "angle"))
    assert isinstance(quarters, float)
    assert isinstance(angle, float)
    degrees = 180 - (180 - 90 * quarters - angle) % 360
    return f"{degrees:.1f}°" if degrees else "no"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
