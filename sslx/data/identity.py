"""The identity of a run's images, small enough for every checkpoint, and how other images differ from it.

Sample i of a folder is the i-th path in sorted order, so images that were added, removed, renamed or moved to another
class shift the order, the crops and the labels of all others.  Paths are relative to the data root, which may move.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data.facts import Facts

_NUM_COMPARED = 64  # evenly spaced images, to notice other contents under the same names without reading all files
_READ_BYTES = 2**16
_MAX_FILES = 2**23  # largest number of files with a 4-byte checksum per path


def digest(facts: Facts, parts: Iterable[bytes]) -> str:
    """Return a hex digest of the number of images, their labels and captions, and further bytes that identify them."""
    checksum = hashlib.blake2b(f"{facts.num_samples}".encode(), digest_size=16)
    checksum.update(b"" if facts.labels is None else facts.labels.tobytes())
    for texts in facts.captions or ():
        checksum.update("\0".join(texts).encode(errors="replace") + b"\n")
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest()


def of_paths(facts: Facts, below_roots: Iterable[list[bytes]], path: Callable[[int], str]) -> dict[str, Any]:
    """Return the identity of files.

    below_roots: the paths of all files below the data root, some at a time.  path: returns the whole path of file i.

    digest: digest of all paths below the root and all labels.  paths: (N,) int32, a checksum of each path, missing
    above 8 million files.  contents: (K,) int64, checksums of the size and first bytes of K evenly spaced files, 0 for
    a file that cannot be read.
    """
    num = facts.num_samples
    checksums = np.empty(num if num <= _MAX_FILES else 0, dtype=np.uint32)
    identity: dict[str, Any] = {
        "digest": digest(facts, _joined(below_roots, checksums)),
        "contents": contents(num, path),
    }
    if num <= _MAX_FILES:
        identity["paths"] = torch.from_numpy(checksums.view(np.int32))
    return identity


def _joined(parts: Iterable[list[bytes]], checksums: npt.NDArray[np.uint32]) -> Iterator[bytes]:
    """Yield the parts of all paths joined by null bytes, and fill in a checksum of each, if there is room for them."""
    start = 0
    for part in parts:
        yield b"\0" * (start > 0) + b"\0".join(part)
        if len(checksums):
            checksums[start : start + len(part)] = list(map(zlib.crc32, part))
        start += len(part)


def paths_differ(
    before: Mapping[str, Any], now: Mapping[str, Any], num_samples: int, name: Callable[[int], str]
) -> str:
    """Describe how files differ from those of ``before``; "" if they do not.  name: returns the name of file i."""
    if before.get("digest") == now["digest"]:
        return contents_differ(before, now, num_samples, name)
    checksums: tuple[Tensor | None, Tensor | None] = before.get("paths"), now.get("paths")
    if checksums[0] is None or checksums[1] is None:
        return "other images, or other labels"
    old, new = checksums[0].numpy(), checksums[1].numpy()
    added, num_gone = np.flatnonzero(~np.isin(new, old)), int((~np.isin(old, new)).sum())
    if len(added):
        gone = f", {num_gone:,} gone" if num_gone else ""
        return f"{len(added):,} new{gone}, the first new one {name(int(added[0]))}"
    if num_gone:
        length = min(len(old), len(new))
        first = int(np.argmax(np.append(old[:length] != new[:length], True)))
        place = f"after {name(first - 1)}" if first else "before all others"
        return f"{num_gone:,} gone, the first one {place}"
    return "the same files have other labels"


def contents_differ(
    before: Mapping[str, Any], now: Mapping[str, Any], num_samples: int, name: Callable[[int], str]
) -> str:
    """Describe how many of the compared images have changed contents; "" if none has."""
    old: npt.NDArray[np.int64] = before["contents"].numpy()
    new: npt.NDArray[np.int64] = now["contents"].numpy()
    changed = np.flatnonzero((old != new) & (old != 0) & (new != 0))
    if not len(changed):
        return ""
    first = name(spread(num_samples)[changed[0]])
    return f"{len(changed):,} of {len(new):,} compared files have other contents, the first one {first}"


def spread(num_samples: int) -> list[int]:
    """Return up to 64 evenly spaced indices."""
    return np.unique(np.linspace(0, num_samples - 1, min(num_samples, _NUM_COMPARED)).astype(np.int64)).tolist()


def contents(num_samples: int, file: Callable[[int], str | bytes]) -> Tensor:
    """Return (K,) int64 checksums of the size and first bytes of K image files, 0 for a file that cannot be read."""
    return torch.tensor([_content(file, i) for i in spread(num_samples)])


def _content(file: Callable[[int], str | bytes], index: int) -> int:
    try:
        path = file(index)
        if isinstance(path, bytes):
            size, start = len(path), path[:_READ_BYTES]
        else:
            with open(path, "rb") as opened:
                size, start = os.fstat(opened.fileno()).st_size, opened.read(_READ_BYTES)
    except (OSError, RuntimeError):  # a source's reader raises Unreadable, which is a RuntimeError
        return 0
    checksum = hashlib.blake2b(start, digest_size=8, key=str(size).encode())
    return int.from_bytes(checksum.digest(), "little", signed=True) or 1
