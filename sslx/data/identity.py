"""Which images a run was trained on, small enough for every checkpoint, and how others differ from them.

Sample i is the i-th path in sorted order, so images that were added, removed, renamed or moved to another class shift
the order, the crops and the labels of all others.  Paths count relative to the data root: the root may move.
"""

import hashlib
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslx.console.words import shown
from sslx.data.sources import Source

_LOOKED_INTO = 64  # images, spread evenly: others under the same names are found without reading them all
_READ_BYTES = 2**16
_MAX_FILES = 2**23  # of whose paths 4 bytes each are kept


def of(source: Source) -> dict[str, Any]:
    """The identity of a source, as a checkpoint holds it.

    digest: hex, of all relative paths and labels, or, of images in memory, of the labels and 64 of the images.  paths:
    (N,) int32, a checksum of each path; contents: (K,) int64, of the size and first bytes of K images spread evenly,
    0 for one that cannot be read.  Both are absent for images in memory.
    """
    digest = hashlib.blake2b(f"{len(source)}".encode(), digest_size=16)
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    if source.paths is None:
        digest.update(source.name.encode())
        if source.name != "synthetic":  # whose sines may round otherwise on another CPU
            assert source.pixels is not None
            for i in _spread(len(source)):
                digest.update(np.ascontiguousarray(source.pixels[i]).tobytes())
        return {"digest": digest.hexdigest()}
    start = len(source.root)
    paths = [os.fsencode(path[start:]) for path in source.paths]
    digest.update(b"\0".join(paths))
    sums = np.fromiter(map(zlib.crc32, paths), dtype=np.uint32, count=len(paths))
    contents = [_content(source.paths[i]) for i in _spread(len(source))]
    identity: dict[str, Any] = {"digest": digest.hexdigest(), "contents": torch.tensor(contents)}
    return identity | ({"paths": torch.from_numpy(sums.view(np.int32))} if len(paths) <= _MAX_FILES else {})


def difference(before: Mapping[str, Any], source: Source, now: Mapping[str, Any]) -> str:
    """How the source, whose identity is ``now``, differs from the one of ``before``, in words; "" where it does not."""
    if before.get("digest") != now["digest"]:
        paths: tuple[Tensor | None, Tensor | None] = before.get("paths"), now.get("paths")
        if source.paths is None or paths[0] is None or paths[1] is None:
            return "other images, or other labels"
        return _of_paths(paths[0].numpy(), paths[1].numpy(), source)
    if "contents" not in now:
        return ""
    then, here = before["contents"].numpy(), now["contents"].numpy()
    changed = np.flatnonzero((then != here) & (then != 0) & (here != 0))
    if not len(changed):
        return ""
    first = _name(source, int(_spread(len(source))[changed[0]]))
    return f"{len(changed):,} of {len(here):,} files that were compared have another content, the first one {first}"


def _of_paths(before: Any, now: Any, source: Source) -> str:
    added, num_gone = np.flatnonzero(~np.isin(now, before)), int((~np.isin(before, now)).sum())
    if len(added):
        gone = f", {num_gone:,} gone" if num_gone else ""
        return f"{len(added):,} new{gone}, the first new one {_name(source, int(added[0]))}"
    if num_gone:
        same = min(len(before), len(now))
        first = int(np.argmax(np.append(before[:same] != now[:same], True)))
        place = f"after {_name(source, first - 1)}" if first else "before all others"
        return f"{num_gone:,} gone, the first one {place}"
    return "the same files have other labels"


def _name(source: Source, i: int) -> str:
    assert source.paths is not None
    return shown(source.paths[i][len(source.root) :])


def _spread(count: int) -> list[int]:
    """Up to 64 places, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, _LOOKED_INTO)).astype(np.int64)).tolist()


def _content(path: str) -> int:
    """A checksum of the file's size and first bytes; 0 where it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(file.read(_READ_BYTES), digest_size=8, key=str(size).encode())
    except OSError:
        return 0
    return int.from_bytes(digest.digest(), "little", signed=True) or 1
