"""Files of features: Parquet, or NumPy's and safetensors with a CSV of paths and labels beside them.

Each is written part by part, so that memory does not grow with the number of rows, to a temporary file that is renamed
once it is complete.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sslx.console.words import shown
from sslx.errors import ConfigError

_FORMATS = (".parquet", ".npy", ".safetensors")
COLUMNS = ("index", "path", "label", "class")


@dataclass(frozen=True)
class Rows:
    """Some rows of the file, in the order of the source.

    index: (n,) int64.  paths: n.  labels: (n,) int64, or None without labels.  classes: their names, or None.
    read: returns the vectors, (n, dim) float32 or float16.
    """

    index: npt.NDArray[np.int64]
    paths: list[str]
    labels: npt.NDArray[np.int64] | None
    classes: list[str] | None
    read: Callable[[], npt.NDArray[Any]]


Parts = Callable[[], Iterator[Rows]]
"""Returns all rows of the file, part by part; it may be called several times."""


def check(file: Path) -> None:
    """Raise ConfigError for a file that could not be written in the end."""
    if file.suffix not in _FORMATS:
        raise ConfigError(f"--output {shown(file)} must end in .parquet, .npy or .safetensors")
    if file.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError("a .parquet file needs pyarrow: pip install 'sslx[parquet]', or use .npy or .safetensors")


def files_of(file: Path) -> list[Path]:
    """Return the files that are written, the one with the features last."""
    return [file] if file.suffix == ".parquet" else [file.with_suffix(".csv"), file]


def write(file: Path, temporary: Path, parts: Parts, num_rows: int, dim: int, dtype: npt.DTypeLike) -> None:
    """Write all rows to the file, and to a CSV file beside it where the format has no room for paths.

    temporary: a folder for unfinished files, on the same file system.
    """
    for path in files_of(file):
        unfinished = temporary / f"unfinished{path.suffix}"
        _WRITERS[path.suffix](unfinished, parts, num_rows, dim, np.dtype(dtype))
        with open(unfinished, "rb+") as written:
            os.fsync(written.fileno())
        unfinished.replace(path)


def _parquet(path: Path, parts: Parts, num_rows: int, dim: int, dtype: np.dtype[Any]) -> None:
    del num_rows
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    number = arrow.float16() if dtype == np.float16 else arrow.float32()
    kinds = arrow.int64(), arrow.string(), arrow.int64(), arrow.string(), arrow.list_(number, dim)
    schema = arrow.schema(list(zip((*COLUMNS, "vector"), kinds, strict=True)))
    with parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=["class"]) as writer:
        for rows in parts():
            num = len(rows.index)
            paths = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in rows.paths]
            labels, classes = (
                arrow.nulls(num, kind) if values is None else arrow.array(values, kind)
                for values, kind in ((rows.labels, kinds[2]), (rows.classes, kinds[3]))
            )
            vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.read().reshape(-1)), dim)
            columns = [arrow.array(rows.index), arrow.array(paths, kinds[1]), labels, classes, vectors]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _csv(path: Path, parts: Parts, num_rows: int, dim: int, dtype: np.dtype[Any]) -> None:
    del num_rows, dim, dtype
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rows in parts():
            empty = [""] * len(rows.index)
            labels = empty if rows.labels is None else rows.labels.tolist()
            writer.writerows(zip(rows.index.tolist(), rows.paths, labels, rows.classes or empty, strict=True))


def _npy(path: Path, parts: Parts, num_rows: int, dim: int, dtype: np.dtype[Any]) -> None:
    with open(path, "wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (num_rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        _write_vectors(file, parts)


def _safetensors(path: Path, parts: Parts, num_rows: int, dim: int, dtype: np.dtype[Any]) -> None:
    """Write the tensors vector (N, dim), index (N,) and, if there are labels, label (N,)."""
    names: dict[str, tuple[str, list[int], int]] = {
        "vector": ({2: "F16", 4: "F32"}[dtype.itemsize], [num_rows, dim], num_rows * dim * dtype.itemsize),
        "index": ("I64", [num_rows], 8 * num_rows),
    }
    if (first := next(parts(), None)) and first.labels is not None:
        names["label"] = ("I64", [num_rows], 8 * num_rows)
    header, end = dict[str, Any](), 0
    for name, (kind, shape, num_bytes) in names.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + num_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        _write_vectors(file, parts)
        for rows in parts():
            file.write(rows.index.tobytes())
        if "label" in names:
            for rows in parts():
                assert rows.labels is not None
                file.write(rows.labels.tobytes())


def _write_vectors(file: BinaryIO, parts: Parts) -> None:
    for rows in parts():
        file.write(np.ascontiguousarray(rows.read()).data)


_WRITERS = {".parquet": _parquet, ".npy": _npy, ".safetensors": _safetensors, ".csv": _csv}
