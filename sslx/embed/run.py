"""``sslx embed``: computes the features of a source's images over all ranks and writes them to a file."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from sslx import config, data, distributed
from sslx.config import EmbedConfig
from sslx.console.bars import Bars, say_to
from sslx.console.words import plural, shown
from sslx.data import sources
from sslx.data.batch import Batch
from sslx.data.order import Pieces
from sslx.data.sources import Source
from sslx.distributed import Ranks
from sslx.embed import parts as parts_of_a_file
from sslx.embed import tables
from sslx.embed.parts import Parts
from sslx.embed.tables import Rows
from sslx.encoders.modes import evaluation_mode
from sslx.errors import ConfigError, NonFiniteError, StorageError, UserError
from sslx.machine import devices, files, memory
from sslx.runs.lock import Lock
from sslx.trained import Trained, load

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The work of all ranks: what is embedded, and the parts in which it is written."""

    trained: Trained
    options: EmbedConfig
    source: Source
    ranks: Ranks
    parts: Parts
    say: Callable[[str], None]

    @property
    def file(self) -> Path:
        return self.options.output

    @property
    def autocast(self) -> torch.dtype | None:
        return devices.autocast(self.ranks.device, self.options.precision)


def main(argv: Sequence[str], path: Path, part: str | None = None, *, quiet: bool = False) -> int:
    """Run ``sslx embed CHECKPOINT -o FILE`` and return the exit code.

    path, part: the checkpoint that argv names, and the part of a file.  quiet: do not print anything about wrong flags.
    """
    trained = load(path, part=part)
    options = config.load_embed(argv, trained.settings if trained.is_run else None, quiet=quiet)
    tables.check(options.output)
    if options.data.eval_size not in (None, trained.view.size):
        trained = trained.with_view_size(options.data.eval_size)
    options = replace(options, data=trained.reading(options.data))
    ranks = distributed.init(options.device)
    write(trained.to(ranks.device), options, ranks)
    distributed.shutdown()
    return 0


def write(trained: Trained, options: EmbedConfig, ranks: Ranks) -> None:
    """Compute the features of the source that the options name on all ranks, and write the file.

    Raises a UserError on all ranks if one of them cannot go on.
    """
    console = Console()
    say = say_to(console, ranks.is_main)
    source = sources.build(options.source, options.split, options.data, say=say)
    for line in (*trained.notes, source.describe(), *source.notes):
        say(line)
    parts = Parts(parts_of_a_file.folder_of(options.output), len(source))
    job = Job(trained, options, source, ranks, parts, say)
    owner: list[Lock] = []
    try:
        missing = _on_main(ranks, lambda: _begin(job, owner))
        if len(missing) < len(parts):
            say(f"continues: {len(parts) - len(missing):,} of {plural(len(parts), 'part')} are written already")
        start = time.monotonic()
        bars = Bars(console, ranks.is_main)
        with bars.display:
            num_rows = _compute(job, missing, bars)
            seconds = time.monotonic() - start
            num_rows_in_file = _on_main(ranks, lambda: _finish(job, owner[0], bars))
    finally:
        for lock in owner:
            lock.release()
    say(f"wrote {', '.join(map(shown, tables.files_of(job.file)))}: {plural(num_rows_in_file, 'row')} of {trained.dim}")
    if num_rows:
        say(f"{num_rows / seconds:,.1f} rows/s ({plural(num_rows, 'row')} in {seconds:,.1f} s)")


def _on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """Return the result of a function that rank 0 calls, or raise its error, on all ranks."""
    result: Any = None
    problem: UserError | None = None
    if ranks.is_main:
        try:
            result = function()
        except UserError as error:
            problem = error
        except OSError as error:
            problem = StorageError(f"cannot write the file of features: {files.reason(error)}")
    distributed.wait_for_main()
    result, problem = distributed.broadcast_object((result, problem))
    if problem is not None:
        raise problem
    return result


def _begin(job: Job, owner: list[Lock]) -> list[int]:
    """Claim the parts and return the numbers of those that are missing."""
    key = parts_of_a_file.key_of(job.trained, job.source, job.options.dtype, job.autocast)
    existing = [path for path in tables.files_of(job.file) if path.exists()]
    if existing and not job.parts.folder.exists():
        raise ConfigError(f"{shown(existing[-1])} exists: remove it, or name another file by --output")
    parts, lock = parts_of_a_file.claim(job.file, key, len(job.source))
    owner.append(lock)
    return parts.missing()


def _compute(job: Job, missing: Sequence[int], bars: Bars) -> int:
    """Compute and write the missing parts on all ranks; return the number of their rows."""
    options, ranks = job.options, job.ranks
    own = missing[ranks.rank :: ranks.world_size]
    order = Pieces(
        num_samples=len(job.source), per_rank=options.batch_size, length=parts_of_a_file.LENGTH, pieces=tuple(own)
    )
    # The ranks find unreadable files in parts of their own, so each of them says which.
    say = say_to(Console(), True)
    loader = data.in_order(options.data, job.source, [job.trained.view], order, seed=0, ranks=ranks,
                           dtype=torch.float32, say=say)  # fmt: skip
    encoder, num_rows, num_images = job.trained.encoder, 0, 0
    total = sum(len(order.samples(number)) for number in missing)
    bars.stage = "embed"
    with evaluation_mode(encoder):
        for turn in range(-(-len(missing) // ranks.world_size)):
            report: tuple[int, int, UserError | None] = (0, 0, None)
            try:
                if turn < len(own):
                    samples = order.samples(own[turn])
                    report = _write_part(job, own[turn], len(samples), loader), len(samples), None
            except (UserError, MemoryError, torch.OutOfMemoryError, OSError) as error:
                report = 0, 0, _as_user_error(error, job.file)
            reports = distributed.gather_objects(report)  # in every turn, so that no rank waits for long
            for _, _, problem in reports:
                if problem is not None:
                    raise problem
            num_rows += sum(rows for rows, _, _ in reports)
            num_images += sum(images for _, images, _ in reports)
            bars("images", num_images, total)
    loader.close()
    return num_rows


def _as_user_error(error: Exception, file: Path) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return StorageError(
            f"cannot write the parts of {shown(file)}: {files.reason(error)}; the same command continues"
        )
    return ConfigError("out of memory: use a smaller --batch-size; the same command continues")


def _write_part(job: Job, number: int, num_images: int, loader: data.Loader) -> int:
    """Compute the next part of a rank's loader, write it, and return the number of its rows."""
    vectors, index = list[Tensor](), list[Tensor]()
    while sum(map(len, index)) < num_images:
        batch = next(loader)
        vectors.append(_features(job, batch).cpu())
        memory.reuse_freed(job.ranks.device)
        index.append(batch.index)
    x, rows = torch.cat(vectors), torch.cat(index).numpy()
    readable = ~np.isin(rows, list(loader.bad))  # the others have the features of the images in their place
    x = x[torch.from_numpy(readable)]
    if job.options.dtype == "fp16":
        x = x.half()
    if not bool(x.isfinite().all()):
        hint = " (of 65,504 and more with --dtype fp16)" if job.options.dtype == "fp16" else ""
        raise NonFiniteError(
            f"expected finite features, but some of images {rows[0]:,} to {rows[-1]:,} are NaN or infinite{hint}: use "
            "--precision fp32 --dtype fp32, or an earlier checkpoint"
        )
    job.parts.write(number, rows[readable], x.numpy())
    return int(readable.sum())


def _features(job: Job, batch: Batch) -> Tensor:
    view, autocast = batch.views[0], job.autocast
    with torch.inference_mode(), torch.autocast(view.device.type, autocast, enabled=autocast is not None):
        return job.trained.encoder(view).float()


def _finish(job: Job, owner: Lock, bars: Bars) -> int:
    """Join the parts to the file, list the images that could not be read, and return the number of rows."""
    parts, unreadable, num_rows = job.parts, list[str](), 0
    for number in range(len(parts)):
        index = parts.index(number)
        num_rows += len(index)
        unreadable += [job.source.path(int(i)) for i in np.setdiff1d(parts.samples(number), index)]
    if unreadable:
        listed = job.file.with_name(f"{job.file.name}.unreadable.txt")
        text = "".join(f"{path}\n" for path in unreadable)
        files.replace(listed, text.encode("utf-8", "surrogateescape"))
        job.say(f"left out {plural(len(unreadable), 'image')} that cannot be read, listed in {shown(listed)}")
    dtype = np.float16 if job.options.dtype == "fp16" else np.float32
    tables.write(job.file, parts.folder, partial(_rows, job, bars), num_rows, job.trained.dim, dtype)
    parts_of_a_file.remove(parts, owner)
    return num_rows


def _rows(job: Job, bars: Bars) -> Iterator[Rows]:
    facts = job.source.facts
    for number in range(len(job.parts)):
        index = job.parts.index(number)
        labels: npt.NDArray[np.int64] | None = None if facts.labels is None else facts.labels[index]
        classes = None if labels is None or not facts.classes else [facts.classes[label] for label in labels.tolist()]
        yield Rows(
            index, [job.source.path(i) for i in index.tolist()], labels, classes, partial(job.parts.vectors, number)
        )
        bars("parts joined", number + 1, len(job.parts))
