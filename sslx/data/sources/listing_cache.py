"""What large folders hold, kept below ~/.cache/sslx/listings from one start to the next, so as not to list them again.

A kept listing is used as long as none of its folders has changed: of each one, the inode and the times of modification
and of change are compared.  So every file or folder that was added, removed, renamed or replaced by another is noticed,
and so are folders that another one took the place of.  Not noticed is what changes no folder: a file that is rewritten
in place, whose name stays in the list, and a link whose target becomes a file or a folder of another kind.

A damaged listing, or one of another version, counts as none.  Only the listings used last are kept.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sslx.data.sources import listing
from sslx.data.sources.listing import Stamp
from sslx.data.sources.packed import Packed
from sslx.machine import files

MIN_ENTRIES = 10_000
"""Folders with fewer entries are listed faster than their listing is worth keeping."""
_VERSION = 1
_SUFFIX = ".sslx-listing"
_MAX_KEPT, _MAX_BYTES = 16, 1 << 30
_SETTLED_NS = 2_000_000_000
"""A folder that changed less than this before it was listed may change again without another time: some file systems
count in steps of two seconds."""
_NOTHING = Packed.of(())


def load(kind: str, place: str, options: Sequence[str] = ()) -> tuple[Any, Packed] | None:
    """Return what was kept for a place, ``about`` and ``names``, if none of its folders has changed since, or None.

    kind: what was listed.  place: the path of the root.  options: whatever else the listing depends on.
    """
    with suppress(Exception):  # none, damaged, of another version, or without a home directory
        path = _path(kind, place, options)
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}  # their checksums are verified here
        folders, names = (Packed(arrays[name].tobytes(), arrays[f"{name} lengths"]) for name in ("folders", "names"))
        stamps = map(tuple, arrays["stamps"].tolist())
        if arrays["version"] == _VERSION and all(
            listing.stamp_of(os.fsdecode(folder or b"")) == stamp for folder, stamp in zip(folders, stamps, strict=True)
        ):
            os.utime(path)  # it was used
            return json.loads(arrays["about"].tobytes()), names
    return None


def keep(
    kind: str,
    place: str,
    options: Sequence[str],
    stamps: Mapping[str, Stamp | None],
    began_ns: int,
    *,
    about: object = None,
    names: Packed = _NOTHING,
) -> None:
    """Keep a listing for ``load``, unless a folder could not be asked or may be changing just now.

    stamps: of each folder on which the listing depends, from before it was read.  began_ns: when the listing began.
    about: plain data that JSON can hold.
    """
    if any(stamp is None or max(stamp[1:]) > began_ns - _SETTLED_NS for stamp in stamps.values()):
        return
    folders = Packed.of(map(os.fsencode, stamps))
    arrays: dict[str, Any] = {
        "version": np.array(_VERSION),
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "folders": np.frombuffer(folders.data, np.uint8),
        "folders lengths": folders.lengths,
        "stamps": np.array([*stamps.values()], dtype=np.int64).reshape(-1, 3),
        "names": np.frombuffer(names.data, np.uint8),
        "names lengths": names.lengths,
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with suppress(Exception):  # no room, no permission or no home directory: it is listed again the next time
        path = _path(kind, place, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, buffer.getvalue())
        _remove_old(path.parent)


def _path(kind: str, place: str, options: Sequence[str]) -> Path:
    key = json.dumps([kind, os.path.realpath(place), *options])  # lone surrogates become escapes
    return files.cache("listings") / (hashlib.blake2b(key.encode(), digest_size=16).hexdigest() + _SUFFIX)


def _remove_old(folder: Path) -> None:
    """Remove the listings used longest ago, so that few enough are left, and what an interrupted start left behind."""
    used = {path: path.stat() for path in folder.iterdir()}
    num_bytes = 0
    newest_first = sorted(used, key=lambda path: used[path].st_mtime, reverse=True)
    for number, path in enumerate(path for path in newest_first if path.suffix == _SUFFIX):
        num_bytes += used[path].st_size
        if number >= _MAX_KEPT or (number and num_bytes > _MAX_BYTES):
            path.unlink(missing_ok=True)
    for path in newest_first:
        if path.suffix != _SUFFIX and used[path].st_mtime < time.time() - 86_400:
            path.unlink(missing_ok=True)
