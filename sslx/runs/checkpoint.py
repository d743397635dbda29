"""Checkpoints: written to a temporary folder and renamed, verified by SHA-256, and loaded as plain data.

A checkpoint is a directory ``RUN/checkpoints/step_N`` with one file for each part of the state (``parts``) and
``manifest.json``, written last, with the format, the step and each file's size and SHA-256.  A part is read and
verified only when it is needed: features need neither the optimizer nor the heads.  These functions handle files in
one process; with many ranks, the main rank calls them and broadcasts the result.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sslx.console.words import plural
from sslx.errors import DataError, MissingInput, StorageError
from sslx.runs import checkpoint_files, manifest
from sslx.runs import state as states

_FILES = (*checkpoint_files.NAMES, manifest.NAME)
_TEMP = re.compile(r"\.step_\d+(\.old)?\.tmp-\d+")


def save(folder: Path, step: int, state: dict[str, object], keep: int) -> Path:
    """Write ``folder/checkpoints/step_N``, verify it, then delete all but the newest ``keep`` checkpoints.

    folder: the run folder, created if it does not exist.
    state: tensors, numbers, strings, None, and dicts, lists and tuples of them, which can be loaded safely.
    Return the checkpoint's directory, which is ``step_N.old`` if a folder that sslx did not write has the name.
    A kill at any moment leaves the newest good checkpoint in place.  Only what sslx wrote is deleted or renamed.
    Raise StorageError if the disk fails: nothing of the failed checkpoint remains, and older ones do.
    """
    assert keep >= 1
    writers = checkpoint_files.writers(state)
    checkpoints = folder / "checkpoints"
    target, temp = checkpoints / f"step_{step}", checkpoints / f".step_{step}.tmp-{os.getpid()}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _clean(checkpoints)
        temp.mkdir()
        manifest.write(temp, step, writers)
        manifest.verify(temp)
        old = checkpoints / f"{target.name}.old"
        if manifest.is_ours(target):
            target.rename(old)  # newest() recognizes this name: a kill between the two renames loses nothing
        elif os.path.lexists(target):
            _discard(old)
            target = old
        temp.rename(target)
        manifest.synchronize(checkpoints)
        if target != old:
            _discard(old)
    except BaseException as error:
        _delete(temp)
        cause = _os_error(error)
        if cause is None and not isinstance(error, DataError):
            raise
        reason = cause.strerror if cause else error
        raise StorageError(
            f"cannot write {target}: {reason}; {_num_bytes(state):,} bytes needed, "
            f"{_free_bytes(folder)} bytes free: free some space, raise the quota, or keep fewer checkpoints"
        ) from error
    # Newer checkpoints come from a damaged or abandoned continuation: they do not count and are kept.
    for path in [path for number, path in _list(checkpoints) if number <= step and manifest.is_ours(path)][keep:]:
        _discard(path)
    return target


def load(path: Path, map_location: str | torch.device = "cpu", needs: Sequence[str] = ()) -> dict[str, Any]:
    """Return the state of a checkpoint, verified and loaded without running any code in it.

    path: a checkpoint directory, a file in it, or a run folder.  For a run folder, the newest good checkpoint is
      loaded, and each skipped one is logged to ``sslx.runs.checkpoint`` as a warning.
    needs: parts that the state must have, each of the kind that sslx writes, such as ``state.RESUME``.  Only the files
      with these parts are read; the default is everything.
    Raise MissingInput if there is no checkpoint, and DataError if it is damaged, lacks a part or holds more than plain
    data.
    """
    return _load_folder(find(path, needs), map_location, needs)


def find(path: Path, needs: Sequence[str] = ()) -> Path:
    """Return the checkpoint directory for a path: itself, that of a file in it, or the newest good one of a run folder.

    needs: as for ``load``.  Raise MissingInput if there is none.
    """
    folder = folder_of(path)
    is_run = not manifest.FOLDER.fullmatch(folder.name) and not any((folder / name).exists() for name in _FILES)
    if is_run and folder.is_dir():
        good, skipped = newest(folder, needs)
        for line in skipped:
            logging.getLogger(__name__).warning(line)
        folder = good or folder / "checkpoints"
    if not folder.is_dir() or folder.name == "checkpoints":
        raise MissingInput(f"no checkpoint at {path}: pass a run folder or a step_N directory in it")
    return folder


def folder_of(path: Path) -> Path:
    """Return the checkpoint directory of a path that names a file in it, or any other path unchanged."""
    return path.parent if path.name in _FILES else path


def _load_folder(folder: Path, map_location: str | torch.device, needs: Sequence[str]) -> dict[str, Any]:
    title = f"checkpoint {folder}"
    with ExitStack() as stack:
        state = checkpoint_files.read(
            manifest.open_verified(folder, stack, checkpoint_files.file_filter(needs)), map_location, needs, title
        )
    checked = states.check(state, needs, title)
    named = manifest.FOLDER.fullmatch(folder.name)
    if named and "step" in needs and checked["step"] != int(named[1]):
        raise DataError(f"{title} was not written by sslx: its state is of step {checked['step']:,}")
    return checked


def newest(run: Path, needs: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """Return the newest good checkpoint of a run folder, by step number, and a line for each skipped one.

    needs: as for ``load``; with it, a good checkpoint also has only finite numbers in these parts.
    Return (None, []) if the run has none yet.  Raise DataError if it has some and none is good, since a fresh start
    would silently discard the run.  A folder with such a name but without files that sslx writes is skipped, too.
    """
    checkpoints = run / "checkpoints"
    problems: list[str] = []
    damaged = False
    for _, path in _list(checkpoints):
        try:
            _check_good(path, needs)
            return path, [f"{problem}: using {path.name}" for problem in problems]
        except DataError as error:
            problems.append(str(error))
            damaged |= any(os.path.lexists(path / name) for name in _FILES)
    if damaged:
        raise DataError(
            f"no good checkpoint in {checkpoints}: {'; '.join(problems)}: restore one, or start another run"
        )
    return None, [f"{problem}: sslx did not write it" for problem in problems]


def _check_good(folder: Path, needs: Sequence[str]) -> None:
    """Raise DataError if a checkpoint is damaged or does not have what ``needs`` names."""
    if not needs:
        manifest.verify(folder)
    elif bad := states.not_finite(
        {name: part for name, part in _load_folder(folder, "cpu", needs).items() if name in needs}
    ):
        raise DataError(
            f"checkpoint {folder} holds non-finite numbers in {plural(len(bad), 'tensor')}, such as {bad[0]}"
        )


def _list(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of all folders named like checkpoints, newest first; ``.old`` follows its successor.

    Raise DataError if the folder exists but cannot be listed, because that must not become a fresh start.
    """
    try:
        named = [(match, path) for path in checkpoints.iterdir() if (match := manifest.FOLDER.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot list the checkpoints in {checkpoints}: {error.strerror}") from error
    named.sort(key=lambda entry: (int(entry[0][1]), entry[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in named if path.is_dir()]


def _clean(checkpoints: Path) -> None:
    """Remove or complete what a killed save left behind."""
    for stale in checkpoints.glob(".step_*.tmp-*"):
        if _TEMP.fullmatch(stale.name):
            _delete(stale)
    for old in checkpoints.glob("step_*.old"):
        target = old.with_suffix("")
        if manifest.is_ours(old) and not os.path.lexists(target):
            old.rename(target)
        elif manifest.is_ours(target):
            _discard(old)


def _discard(folder: Path) -> None:
    """Delete a checkpoint that sslx wrote.  It is renamed first, so that a kill midway does not leave a damaged one."""
    doomed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        if manifest.is_ours(folder):
            folder.rename(doomed)
            _delete(doomed)


def _delete(folder: Path) -> None:
    """Delete a temporary folder, unless it holds a file that sslx does not write."""
    with suppress(OSError):
        if not folder.is_symlink() and {path.name for path in folder.iterdir()} <= set(_FILES):
            shutil.rmtree(folder)


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_num_bytes, cast(dict[object, object], value).values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, cast(list[object], value)))
    return 0


def _free_bytes(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        return f"{shutil.disk_usage(existing).free:,}"
    except OSError:
        return "an unknown number of"


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind an exception, because torch.save wraps it in RuntimeErrors."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
