"""The parts of a file of features: written one by one into a folder beside it, so that a killed run can continue.

The folder ``FILE.parts`` has ``key.json``, which says what the features are of, and a file for each 1,024 rows.  A part
appears only as a whole.  Ranks write different parts; which rank wrote which does not matter.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sslx.console.words import shown
from sslx.data.sources import Source
from sslx.errors import ConfigError, DataError
from sslx.machine import files
from sslx.runs import lock
from sslx.trained import Trained

LENGTH = 1024
"""Number of rows of a part, fewer only where images could not be read and at the end."""
_WORDS = {
    "format": "another version of sslx",
    "checkpoint": "another checkpoint",
    "images": "other images",
    "view": "another preprocessing",
    "dtype": "another --dtype",
    "autocast": "another precision",
}
Key = dict[str, str]
Vectors = npt.NDArray[Any]


def key_of(trained: Trained, source: Source, dtype: str, autocast: object) -> Key:
    """Return what the features are of, by which a later run knows that it continues this one."""
    weights = hashlib.sha256()
    for name, tensor in sorted(trained.weights.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    identity = source.identity()
    contents = identity.get("contents")
    return {
        "format": "1",
        "checkpoint": weights.hexdigest(),
        "images": f"{len(source)} {identity['digest']} {contents.tolist() if contents is not None else ''}",
        "view": str(trained.view),
        "dtype": dtype,
        "autocast": str(autocast),
    }


@dataclass(frozen=True)
class Parts:
    """The parts of a file.  num_rows: the number of images, of which all have a row that can be read."""

    folder: Path
    num_rows: int

    def __len__(self) -> int:
        return -(-self.num_rows // LENGTH)

    def samples(self, number: int) -> range:
        """Return the images of a part, in the order of the source."""
        return range(number * LENGTH, min((number + 1) * LENGTH, self.num_rows))

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not written yet."""
        written = {path.name for path in self.folder.iterdir()}
        return [number for number in range(len(self)) if _name(number) not in written]

    def write(self, number: int, index: npt.NDArray[np.int64], vectors: Vectors) -> None:
        """Write a part: (n,) indices of images and their (n, dim) features."""
        files.replace(self.folder / _name(number), save({"index": index, "vector": vectors}))

    def index(self, number: int) -> npt.NDArray[np.int64]:
        """Return the indices of a part's images.  Raises DataError for a damaged part."""
        return self._read(number, "index")

    def vectors(self, number: int) -> Vectors:
        """Return the features of a part's images.  Raises DataError for a damaged part."""
        return self._read(number, "vector")

    def _read(self, number: int, name: str) -> npt.NDArray[Any]:
        path = self.folder / _name(number)
        try:
            with safe_open(path, "numpy") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{shown(path)} is damaged: remove it, and give the same command again") from error


def _name(number: int) -> str:
    return f"{number:07}.safetensors"


def folder_of(file: Path) -> Path:
    """Return the folder of a file's parts."""
    return file.with_name(f"{file.name}.parts")


def claim(file: Path, key: Mapping[str, str], num_rows: int) -> tuple[Parts, lock.Lock]:
    """Create the parts of a file, or take over those that an earlier run with the same key has left.

    Raises ConfigError for parts of other features, and if another process is writing them.
    """
    folder = folder_of(file)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        owner = lock.acquire(folder)
    except ConfigError as error:
        raise ConfigError(f"another process is writing {shown(file)}: let it end, or name another --output") from error
    try:
        _check_key(folder, dict(key))
    except BaseException:
        owner.release()
        raise
    return Parts(folder, num_rows), owner


def _check_key(folder: Path, key: Key) -> None:
    """Write the key into a new folder; raise ConfigError if another one is there."""
    path = folder / "key.json"
    if not path.exists():
        files.replace(path, json.dumps(key).encode())
    try:
        before = files.parse_json(files.read_bytes(path, 1 << 16))
    except ValueError as error:
        raise DataError(f"{shown(path)} is damaged ({error}): remove {shown(folder)} to start anew") from error
    if different := [words for name, words in _WORDS.items() if before.get(name) != key[name]]:
        raise ConfigError(
            f"{shown(folder)} has features of {' and '.join(different)}: remove it to start anew, or name another "
            "file by --output"
        )


def remove(parts: Parts, owner: lock.Lock) -> None:
    """Remove the parts once their file is complete."""
    owner.release()
    with suppress(OSError):
        shutil.rmtree(parts.folder)
