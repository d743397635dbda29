"""Tables of images in Parquet and Arrow files, read by groups of rows, of which each process keeps some."""

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import remote
from sslx.data.sources.config import is_address

Indices = npt.NDArray[np.int64]


class Cache:
    """The columns of images of the groups that a process read last.  It is safe to use in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], Future[Any]] = OrderedDict()
        self._bytes: dict[tuple[str, int], int] = {}

    def get(self, table: "Table", number: int, column: str, max_bytes: int) -> Any:
        """Return a group's array of images, and read it if it is not here, dropping those used longest ago."""
        key = table.path, number
        with self._lock:
            if is_new := key not in self._groups:
                self._groups[key] = Future()
            self._groups.move_to_end(key)
            future = self._groups[key]
        if is_new:
            try:
                array = table.group(number, column)
            except BaseException as error:
                with self._lock:
                    del self._groups[key]
                future.set_exception(error)
                raise
            future.set_result(array)
            with self._lock:
                self._bytes[key] = array.nbytes
                while sum(self._bytes.values()) > max_bytes and len(self._bytes) > 1:
                    oldest = next(other for other in self._groups if other in self._bytes)
                    del self._groups[oldest], self._bytes[oldest]
        return future.result()


@cache
def _cache(process: int) -> Cache:
    """Return this process's cache: a forked one must not share the lock, which another thread may have held."""
    assert process == os.getpid()
    return Cache()


class Table:
    """An open Parquet or Arrow file.  Raises OSError or pyarrow's errors if it is not one."""

    def __init__(self, path: str) -> None:
        self.path = path
        if path.lower().endswith(".arrow"):
            arrow: Any = import_module("pyarrow")
            mapped = arrow.memory_map(path)
            try:
                batches = arrow.ipc.open_stream(mapped)  # as Hugging Face's datasets write it
                self._rows = batches.read_all()
            except arrow.ArrowInvalid:
                self._rows = arrow.ipc.open_file(mapped).read_all()
            self._file: Any = None
            self.schema = self._rows.schema
            chunks = self._rows.column(0).chunks if self._rows.num_columns else []
            self.lengths = [len(chunk) for chunk in chunks]
        else:
            parquet: Any = import_module("pyarrow.parquet")
            self._file = parquet.ParquetFile(remote.open_file(path) if is_address(path) else path)
            metadata = self._file.metadata
            self.schema = self._file.schema_arrow
            self.lengths = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def column(self, name: str) -> list[Any]:
        """Return all values of a small column."""
        rows = self._rows if self._file is None else self._file.read(columns=[name], use_threads=False)
        return rows.column(name).to_pylist()

    def group(self, number: int, column: str) -> Any:
        """Return a group's array of a column."""
        if self._file is None:
            return self._rows.column(column).chunk(number)
        chunks = self._file.read_row_group(number, columns=[column], use_threads=False).column(0)
        return chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()

    def group_bytes(self, column: str) -> int:
        """Return the size of the largest group's images; 0 for a file that is mapped into memory."""
        if self._file is None:
            return 0
        groups = map(self._file.metadata.row_group, range(self._file.metadata.num_row_groups))
        return max((self._column_bytes(group, column) for group in groups), default=0)

    def _column_bytes(self, group: Any, column: str) -> int:
        chunks = map(group.column, range(group.num_columns))
        return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


@lru_cache(maxsize=64)
def opened(path: str, process: int) -> Table:
    """Open a table, once in each process."""
    assert process == os.getpid()
    return Table(path)


@dataclass(frozen=True, eq=False)
class Rows:
    """Reads image files out of tables.

    paths, stamps: of the tables.  table, group, first: (num_groups,) of each group its table, its number there and its
    first row in all.  column: of the images, bytes or a struct of bytes and path.  max_bytes: of the groups in memory.
    """

    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    table: Indices
    group: Indices
    first: Indices
    column: str
    max_bytes: int = field(repr=False)

    def read(self, rows: Indices) -> list[bytes]:
        groups = np.searchsorted(self.first, rows, side="right") - 1
        for table in np.unique(self.table[groups]).tolist():
            if stamp_at(self.paths[table]) != self.stamps[table]:
                raise Unreadable("its file has changed since the start: start again, with the file as it was")
        return [self._read(*pair) for pair in zip(rows.tolist(), groups.tolist(), strict=True)]

    def where(self, row: int) -> str:
        table = int(self.table[np.searchsorted(self.first, row, side="right") - 1])
        start = self.first[np.searchsorted(self.table, table)]
        return f"{self.paths[table]}[{row - start}]"

    def _read(self, row: int, number: int) -> bytes:
        path = self.paths[self.table[number]]
        table = opened(path, os.getpid())
        images = _cache(os.getpid()).get(table, int(self.group[number]), self.column, self.max_bytes)
        value = images[row - int(self.first[number])].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else _file(value.get("path"), path)
        if value is None:
            raise Unreadable("there is no image in its row")
        return value


def _file(path: str | None, table: str) -> bytes | None:
    """Return the bytes of an image that lies outside of its table, relative to which its path is."""
    if path is None:
        return None
    with open(os.path.join(os.path.dirname(table), path), "rb") as file:
        return file.read()


def stamp_at(path: str) -> tuple[int, int]:
    """Return the size and the time of change of a file.  Each process asks only once for a file at an address."""
    if is_address(path):
        return _remote_stamp(path, os.getpid())
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@cache
def _remote_stamp(address: str, process: int) -> tuple[int, int]:
    assert process == os.getpid()
    return remote.current_stamp(address)
