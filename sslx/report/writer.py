"""``sslx report``: measures and draws what is missing, writes the page, and says where it is."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sslx.console.words import one_line, shown
from sslx.errors import ConfigError, StorageError, UserError
from sslx.machine import files
from sslx.report import facts
from sslx.report.page import page
from sslx.runs import records


def main(folders: Sequence[Path], output: Path | None, *, measure: bool, draw: bool) -> int:
    """Write the report of runs and return the exit code.

    output: the file; by default ``report.html`` in the first run's folder.  measure, draw: probe and draw first the
    runs whose scores or pictures are missing or older than their newest checkpoint.
    Raises MissingInput for a folder without a run, and StorageError if the file cannot be written.
    """
    if not folders:
        raise ConfigError("sslx report needs the folder of a run, as in: sslx report runs/simclr_digits")
    for folder in folders:
        facts.read(folder)  # raises an error before anything is measured or drawn
    for folder in folders:
        if measure and _is_older(folder / "probe.json", folder):
            _measure(folder)
        if draw:
            _draw(folder)
    path = output or folders[0] / "report.html"
    text = page([facts.read(folder) for folder in folders], time.strftime("%Y-%m-%d"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text.encode())
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: name another file by --output") from error
    sys.stdout.write(f"wrote {shown(path)} ({len(text) / 2**20:.1f} MiB); open it in a browser\n")
    return 0


def _is_older(file: Path, folder: Path) -> bool:
    """Return whether a file is missing or older than the newest checkpoint of its run, if that has one."""
    step = records.newest_step(folder)
    if not step:
        return False
    checkpoint = folder / "checkpoints" / f"step_{step}"
    return not file.is_file() or file.stat().st_mtime < checkpoint.stat().st_mtime


def _measure(folder: Path) -> None:
    """Probe a run as ``sslx probe`` does, and say why it cannot be probed."""
    from sslx.probe import scores  # imports torch, which takes seconds

    try:
        scores.main([str(folder)], [folder])
    except UserError as error:
        sys.stdout.write(f"without new scores of {shown(folder)}: {one_line(error)}\n")


def _needs_confusion(folder: Path) -> bool:
    """Return whether the picture of the confusions is missing or older than the probe that counted them."""
    picture, counted = folder / "confusion.png", folder / "confusion.json"
    return counted.is_file() and not (picture.is_file() and picture.stat().st_mtime >= counted.stat().st_mtime)


def _draw(folder: Path) -> None:
    """Draw what is missing or old, and say what cannot be drawn."""
    needs_all = _is_older(folder / "tsne.png", folder)
    if not needs_all and not _needs_confusion(folder):
        return
    from sslx.plot import pictures  # imports torch, which takes seconds

    try:
        if needs_all:
            pictures.main([str(folder)], folder)
        else:
            pictures.draw_confusion(folder, folder / "confusion.png")
    except UserError as error:
        sys.stdout.write(f"without new pictures of {shown(folder)}: {one_line(error)}\n")
    except OSError as error:
        sys.stdout.write(f"without new pictures of {shown(folder)}: {error.strerror}\n")
