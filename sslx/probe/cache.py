"""Features on disk: a folder of safetensors files by the digest of all that they depend on, of bounded size."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sslx.console.words import shown
from sslx.data.sources import Source
from sslx.machine import files
from sslx.probe.features import Features

FOLDER = "features"
_SUFFIX = ".safetensors"
_FACTS = "sslx"
"""The only entry of a file's metadata, whose order safetensors does not keep: JSON of key, digest and a description."""
_GB = 10**9


def digest(facts: Mapping[str, Any]) -> str:
    """Return a hex digest of plain values by name, in any order; tensors count by their dtype, shape and numbers."""
    checksum = hashlib.blake2b(digest_size=16)
    for name, value in sorted(facts.items()):
        if isinstance(value, Tensor):
            numbers = value.detach().cpu().contiguous()
            checksum.update(f"{name}: {numbers.dtype} {tuple(numbers.shape)}\n".encode())
            checksum.update(numbers.view(-1).view(torch.uint8).numpy().data)
        else:
            checksum.update(f"{name}: {value}\n".encode(errors="surrogateescape"))
    return checksum.hexdigest()


def weights_digest(encoder: nn.Module) -> str:
    """Return a hex digest of an encoder's parameters and buffers."""
    return digest(encoder.state_dict())


def images_digest(source: Source) -> str:
    """Return a hex digest of the identity of a source's images: their names, labels and some of their contents."""
    return digest({"name": source.name, **source.identity()})


class Cache:
    """The features that a run folder keeps.  One process uses it at a time.

    folder: created when features are first written.  max_gb: maximum size of its files together; the files that were
    unused for longest are removed first.  0 disables the cache.
    """

    def __init__(self, folder: Path, max_gb: float) -> None:
        self.folder, self._max_bytes = folder, round(max_gb * _GB)

    def read(self, key: str) -> Features | None:
        """Return the features that were written with this key; None if there are none, or if the file is damaged."""
        path = self._path(key)
        if not self._max_bytes or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {}).get(_FACTS, "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            if facts.get("key") != key or facts.get("digest") != digest(tensors):
                return None
            features = Features(tensors["x"], tensors.get("label"), tensors["index"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        with suppress(OSError):  # a folder that cannot be written
            os.utime(path)
        return features

    def write(self, key: str, features: Features, what: str) -> str:
        """Keep features, and return why they are not kept, or "".  what: what they are of, for whoever reads the file.

        A damaged file of the same key is replaced.
        """
        if not self._max_bytes:
            return ""
        tensors = {"x": features.x, "index": features.index}
        if features.label is not None:
            tensors["label"] = features.label
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes > self._max_bytes:
            return (
                f"{num_bytes / _GB:.1f} GB of features are not kept for the next probe, because that is above "
                f"--probe.cache-gb {self._max_bytes / _GB:g}"
            )
        facts = {"key": key, "digest": digest(tensors), "of": what}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.replace(self._path(key), safetensors.torch.save(tensors, {_FACTS: json.dumps(facts)}))
            self._shrink(self._path(key))
        except OSError as error:
            return f"features are not kept for the next probe: {shown(self.folder)}: {files.reason(error)}"
        return ""

    def _shrink(self, newest: Path) -> None:
        """Remove files, those unused for longest first, until all together are small enough."""
        by_age = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in by_age)
        for path in by_age:
            if total > self._max_bytes and path != newest:
                total -= path.stat().st_size
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def key(**facts: Any) -> str:
    """Return the key of features that depend on these facts, plain values that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
