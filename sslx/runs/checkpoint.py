"""Checkpoints: written beside and renamed, verified by SHA-256, loaded as plain data, newest good one first.

A checkpoint is a directory ``RUN/checkpoints/step_N`` with one file for each part of the state (``parts``) and, written
last, ``manifest.json`` with the format, the step and each file's size and SHA-256.  A part is read, and verified, when
it is needed: features need neither the optimizer nor the heads.  Everything here is file logic for one process; on
many ranks the main one calls it and broadcasts the result.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from sslx.errors import DataError, MissingInput, StorageError
from sslx.runs import manifest, parts
from sslx.runs import state as states

_FILES = (*parts.NAMES, manifest.NAME)
_TEMP = re.compile(r"\.step_\d+(\.old)?\.tmp-\d+")


def save(folder: Path, step: int, state: dict[str, object], keep: int) -> Path:
    """Write ``folder/checkpoints/step_N``, verify it, then delete all but the newest ``keep``.

    folder: the run folder; made if it is not there.
    state: tensors, numbers, strings, None, and dicts, lists and tuples of them: what can be loaded safely.
    Returns the checkpoint's directory: ``step_N.old`` where a folder that sslx did not write has the name.
    A kill at any moment leaves the newest good checkpoint in place.  Only what sslx wrote is deleted or renamed.
    StorageError where the disk does not take it: nothing of the failed checkpoint stays, older ones do.
    """
    assert keep >= 1
    writers = parts.writers(state)
    place = folder / "checkpoints"
    target, temp = place / f"step_{step}", place / f".step_{step}.tmp-{os.getpid()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        _clean(place)
        temp.mkdir()
        manifest.write(temp, step, writers)
        manifest.verify(temp)
        old = place / f"{target.name}.old"
        if manifest.is_ours(target):
            target.rename(old)  # newest() knows the name: a kill between the two renames loses nothing
        elif os.path.lexists(target):
            _discard(old)
            target = old
        temp.rename(target)
        manifest.synchronize(place)
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
            f"{_free_bytes(folder)} bytes free: free some space or a quota, or keep fewer checkpoints"
        ) from error
    # Newer ones were left by a damaged or abandoned continuation: they neither count nor are ours to delete.
    for path in [path for number, path in _found(place) if number <= step and manifest.is_ours(path)][keep:]:
        _discard(path)
    return target


def load(path: Path, map_location: str | torch.device = "cpu", needs: Sequence[str] = ()) -> dict[str, Any]:
    """The state of a checkpoint, verified and loaded without running anything in it.

    path: a checkpoint directory, a file in it, or a run folder (its newest good checkpoint; each one that is skipped
      goes to the log ``sslx.runs.checkpoint`` as a warning).
    needs: parts that the state must have, each of the kind that sslx writes, such as ``state.RESUME``: only the files
      that hold them are read.  Default: everything.
    MissingInput where there is no checkpoint, DataError where it is damaged, lacks a part or holds more than plain
    data.
    """
    folder = folder_of(path)
    is_run = not manifest.FOLDER.fullmatch(folder.name) and not any((folder / name).exists() for name in _FILES)
    if is_run and folder.is_dir():
        good, skipped = newest(folder, needs)
        for line in skipped:
            logging.getLogger(__name__).warning(line)
        folder = good or folder / "checkpoints"
    if not folder.is_dir() or folder.name == "checkpoints":
        raise MissingInput(f"no checkpoint at {path}: give a run folder or a step_N directory in it")
    return _loaded(folder, map_location, needs)


def folder_of(path: Path) -> Path:
    """The checkpoint directory of a path that names a file in it; any other path as it is."""
    return path.parent if path.name in _FILES else path


def _loaded(folder: Path, map_location: str | torch.device, needs: Sequence[str]) -> dict[str, Any]:
    what = f"checkpoint {folder}"
    with ExitStack() as stack:
        state = parts.read(manifest.opened(folder, stack, parts.needed(needs)), map_location, needs, what)
    checked = states.check(state, needs, what)
    named = manifest.FOLDER.fullmatch(folder.name)
    if named and "step" in needs and checked["step"] != int(named[1]):
        raise DataError(f"checkpoint {folder} is not one that sslx wrote: its state is of step {checked['step']:,}")
    return checked


def newest(run: Path, needs: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a run folder, by step number, and a line for each one skipped.

    needs: as for ``load``; what has them is good only where all its numbers are finite, too.
    (None, []) where the run has none yet; DataError where it has some and none is good, since starting afresh
    would silently throw the run away.  A folder of such a name with nothing in it that sslx writes is skipped, too.
    """
    place = run / "checkpoints"
    problems: list[str] = []
    damaged = False
    for _, path in _found(place):
        try:
            _check_good(path, needs)
            return path, [f"{problem}: using {path.name}" for problem in problems]
        except DataError as error:
            problems.append(str(error))
            damaged |= any(os.path.lexists(path / name) for name in _FILES)
    if damaged:
        raise DataError(f"no good checkpoint in {place}: {'; '.join(problems)}: restore one, or start another run")
    return None, [f"{problem}: sslx did not write it" for problem in problems]


def _check_good(folder: Path, needs: Sequence[str]) -> None:
    """Raise DataError where a checkpoint is damaged or is not what ``needs`` asks for."""
    if not needs:
        manifest.verify(folder)
    elif bad := states.not_finite(
        {name: part for name, part in _loaded(folder, "cpu", needs).items() if name in needs}
    ):
        raise DataError(
            f"checkpoint {folder} holds numbers that are not finite, in {len(bad)} of its tensors, such as {bad[0]}"
        )


@runtime_checkable
class TakesOldNames(Protocol):
    """A module whose state had other names in an earlier version."""

    def take_old_names(self, state: dict[str, Any], prefix: str) -> None: ...


def load_weights(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    what: str,
    *,
    expected: str | None = None,
    found: str | None = None,
) -> None:
    """Load weights strictly, whether or not DDP or torch.compile wrapped either side.

    what: where the weights are from, for the message; expected, found: the two architectures where known.
    DataError, in one line, where keys or shapes differ; the module is then unchanged.
    """
    own = module.state_dict()
    name_of = {_unwrapped(key): key for key in own}
    given = {_unwrapped(key): value for key, value in state_dict.items()}
    for prefix, part in module.named_modules():
        if isinstance(part, TakesOldNames):
            part.take_old_names(given, f"{_unwrapped(prefix)}.")
    shapes = {
        key: f"{key} {tuple(own[name_of[key]].shape)}, not {tuple(given[key].shape)}"
        for key in name_of.keys() & given.keys()
        if isinstance(given[key], Tensor) and own[name_of[key]].shape != given[key].shape
    }
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, kind in (
            ([key for key in name_of if key not in given], "missing"),
            ([key for key in given if key not in name_of], "unexpected"),
            ([shapes[key] for key in name_of if key in shapes], "of another shape"),
        )
        if keys
    ]
    if problems:
        named = f"expected {expected or '?'}, found {found or '?'}; " if expected or found else ""
        raise DataError(
            f"{what} does not fit: {named}of {len(own)} keys {', '.join(problems)}: "
            "build the model as in the run's config.json, or give other weights"
        )
    module.load_state_dict({name_of[key]: value for key, value in given.items()}, strict=True)


def _unwrapped(key: str) -> str:
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _found(place: Path) -> list[tuple[int, Path]]:
    """(step, directory) of what is named like a checkpoint, newest first; one set aside after its successor.

    DataError where the folder is there but cannot be listed: that is no fresh start.
    """
    try:
        named = [(match, path) for path in place.iterdir() if (match := manifest.FOLDER.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot list the checkpoints in {place}: {error.strerror}") from error
    named.sort(key=lambda entry: (int(entry[0][1]), entry[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in named if path.is_dir()]


def _clean(place: Path) -> None:
    """Remove or finish what a killed save left behind."""
    for stale in place.glob(".step_*.tmp-*"):
        if _TEMP.fullmatch(stale.name):
            _delete(stale)
    for old in place.glob("step_*.old"):
        target = old.with_suffix("")
        if manifest.is_ours(old) and not os.path.lexists(target):
            old.rename(target)
        elif manifest.is_ours(target):
            _discard(old)


def _discard(folder: Path) -> None:
    """Delete a checkpoint of ours: under a temporary name, so that a kill halfway leaves no damaged one."""
    doomed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        if manifest.is_ours(folder):
            folder.rename(doomed)
            _delete(doomed)


def _delete(folder: Path) -> None:
    """Delete a temporary folder, unless it holds anything that sslx does not write."""
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
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        return f"{shutil.disk_usage(there).free:,}"
    except OSError:
        return "an unknown number of"


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch.save wraps it in RuntimeErrors of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
