"""Which images a run was trained on, small enough for every checkpoint, and how others differ from them.

Sample i of a folder is the i-th path in sorted order, so images that were added, removed, renamed or moved to another
class shift the order, the crops and the labels of all others.  Paths count relative to the data root, which may move.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data.facts import Facts

_LOOKED_INTO = 64  # images, spread evenly: others under the same names are found without reading them all
_READ_BYTES = 2**16
_MAX_FILES = 2**23  # of whose paths 4 bytes each are kept


def digest(facts: Facts, parts: Iterable[bytes]) -> str:
    """A hex digest of the number of images, their labels, and what else tells them from others."""
    whole = hashlib.blake2b(f"{facts.num_samples}".encode(), digest_size=16)
    whole.update(b"" if facts.labels is None else facts.labels.tobytes())
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def of_paths(facts: Facts, paths: Sequence[str], root: str) -> dict[str, Any]:
    """The identity of files.

    digest: of all paths below the root and all labels.  paths: (N,) int32, a checksum of each; absent for very many.
    contents: (K,) int64, of the size and first bytes of K files spread evenly, 0 for one that cannot be read.
    """
    below = [os.fsencode(path[len(root) :]) for path in paths]
    sums = np.fromiter(map(zlib.crc32, below), dtype=np.uint32, count=len(below))
    identity = {"digest": digest(facts, [b"\0".join(below)]), "contents": contents(len(paths), lambda i: paths[i])}
    return identity | ({"paths": torch.from_numpy(sums.view(np.int32))} if len(paths) <= _MAX_FILES else {})


def paths_differ(
    before: Mapping[str, Any], now: Mapping[str, Any], num_samples: int, name: Callable[[int], str]
) -> str:
    """How files differ from those of ``before``, in words; "" where they do not.  name: of one of them."""
    if before.get("digest") == now["digest"]:
        return contents_differ(before, now, num_samples, name)
    sums: tuple[Tensor | None, Tensor | None] = before.get("paths"), now.get("paths")
    if sums[0] is None or sums[1] is None:
        return "other images, or other labels"
    then, here = sums[0].numpy(), sums[1].numpy()
    added, num_gone = np.flatnonzero(~np.isin(here, then)), int((~np.isin(then, here)).sum())
    if len(added):
        gone = f", {num_gone:,} gone" if num_gone else ""
        return f"{len(added):,} new{gone}, the first new one {name(int(added[0]))}"
    if num_gone:
        same = min(len(then), len(here))
        first = int(np.argmax(np.append(then[:same] != here[:same], True)))
        place = f"after {name(first - 1)}" if first else "before all others"
        return f"{num_gone:,} gone, the first one {place}"
    return "the same files have other labels"


def contents_differ(
    before: Mapping[str, Any], now: Mapping[str, Any], num_samples: int, name: Callable[[int], str]
) -> str:
    """How many of the images that were looked into have changed, in words; "" where none has."""
    then: npt.NDArray[np.int64] = before["contents"].numpy()
    here: npt.NDArray[np.int64] = now["contents"].numpy()
    changed = np.flatnonzero((then != here) & (then != 0) & (here != 0))
    if not len(changed):
        return ""
    first = name(spread(num_samples)[changed[0]])
    return f"{len(changed):,} of {len(here):,} files that were compared have another content, the first one {first}"


def spread(num_samples: int) -> list[int]:
    """Up to 64 places, spread evenly."""
    return np.unique(np.linspace(0, num_samples - 1, min(num_samples, _LOOKED_INTO)).astype(np.int64)).tolist()


def contents(num_samples: int, file: Callable[[int], str | bytes]) -> Tensor:
    """(K,) int64: a checksum of the size and first bytes of K image files; 0 for one that cannot be read."""
    return torch.tensor([_content(file, i) for i in spread(num_samples)])


def _content(file: Callable[[int], str | bytes], index: int) -> int:
    try:
        path = file(index)
        if isinstance(path, bytes):
            size, start = len(path), path[:_READ_BYTES]
        else:
            with open(path, "rb") as opened:
                size, start = os.fstat(opened.fileno()).st_size, opened.read(_READ_BYTES)
    except (OSError, RuntimeError):  # RuntimeError: Unreadable, of a reader
        return 0
    checksum = hashlib.blake2b(start, digest_size=8, key=str(size).encode())
    return int.from_bytes(checksum.digest(), "little", signed=True) or 1
