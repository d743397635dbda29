"""Parquet files of images, or a folder of Hugging Face's datasets (Parquet or Arrow): bytes, labels and captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslx.console import activity
from sslx.console.words import shown
from sslx.data import retries
from sslx.data.facts import Facts
from sslx.data.sources import labels, located, remote, row_groups, sides
from sslx.data.sources.base import Context, Encoded
from sslx.data.sources.config import SourceConfig, Split, is_address
from sslx.data.sources.row_groups import Rows, Table
from sslx.errors import ConfigError, DataError, MissingInput, UserError
from sslx.machine import files

_IMAGES = ("image", "img", "images", "jpg", "png", "bytes", "image_bytes", "content")
_WINDOW = 16  # groups from which the order takes a batch


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The location of your tables and the names of their columns."""

    name: Literal["parquet"] = "parquet"
    root: Path | None = None
    """Parquet or Arrow file, folder of them, or quoted pattern such as 'train-*.parquet', Parquet also at s3://, ..."""
    test_root: Path | None = None
    """Files with the test images.  Default: those below the root whose name or folder is test, val or similar."""
    splits: Literal["auto", "none"] = "auto"
    """Hold out files whose name or folder is test, val or similar (auto), or train on all of them (none)."""
    image: str = ""
    """Column of the images, each the bytes of an image file.  Default: image, img or similar."""
    label: str = ""
    """Column of the labels, whole numbers or names.  Default: label, class or similar, if there is one."""
    caption: str = ""
    """Column of the captions.  Default: caption, text or similar, if there is one."""
    cache_gb: float = 1.0
    """Memory in gigabytes for groups of rows, of each process that reads images."""

    def __post_init__(self) -> None:
        if not self.cache_gb > 0:
            raise ConfigError(f"--source.cache-gb must be above 0, not {self.cache_gb:g}")

    def build(self, split: Split, context: "Context") -> "Encoded":
        if find_spec("pyarrow") is None:
            raise ConfigError("--source.name parquet needs pyarrow: pip install 'sslx[parquet]'")
        with activity.doing("reading the tables of images"):
            return context.call(f"the tables of images {shown(self.root or '')}", lambda _: _read(self, split, context))


def _read(config: Config, split: Split, context: Context) -> Encoded:
    suffixes = (".parquet", ".arrow")
    found = located.find("parquet", config.root, config.test_root, suffixes, split, config.splits, context.timeout_s)
    return labels.first_labeled(found, lambda name, paths: _joined(config, name, paths, context))


class _Columns:
    """What a split's tables hold besides images, read from one table after another: all may be too many to open.

    lengths: the rows of each group of each table.  largest: the bytes of the largest group.
    """

    def __init__(self, config: Config, paths: Sequence[str], timeout_s: float) -> None:
        first = _opened(paths[0], timeout_s)
        self.names: list[str] = first.schema.names
        names, place = self.names, f"the table {shown(first.path)}"
        self.image = _image_column(first, config)
        self.label = labels.column(names, labels.NAMES, config.label, "--source.label", place)
        self.caption = labels.column(names, labels.CAPTIONS, config.caption, "--source.caption", place)
        self.classes = _class_names(first, self.label)
        self.lengths: list[list[int]] = []
        self.labels: list[Any] = []
        self.captions: list[Any] = []
        self.largest = 0
        for path in paths:
            table = _opened(path, timeout_s)
            self._check(table, first)
            self.lengths.append(table.lengths)
            self.labels += _column(table, self.label, timeout_s)
            self.captions += _column(table, self.caption, timeout_s)
            self.largest = max(self.largest, table.group_bytes(self.image))

    def _check(self, table: Table, first: Table) -> None:
        """Raise DataError unless a table has the same columns as the first one."""
        for name in filter(None, (self.image, self.label, self.caption)):
            if name not in table.schema.names or table.schema.field(name).type != first.schema.field(name).type:
                raise DataError(
                    f"{shown(table.path)} has not the same column {name!r} as {shown(first.path)}: its columns are "
                    f"{labels.listed(table.schema.names)}; give files of one kind with --source.root"
                )


def _joined(config: Config, name: str, paths: Sequence[str], context: Context) -> Encoded:
    """Return the images of these tables as one source, in the order of their rows."""
    columns = _Columns(config, paths, context.timeout_s)
    counts = list(map(len, columns.lengths))
    lengths = np.array([length for table in columns.lengths for length in table], dtype=np.int64)
    if not lengths.sum():
        raise MissingInput(f"no rows in the tables of {name}, such as {shown(paths[0])}")
    first = np.cumsum(lengths) - lengths
    rows = Rows(
        paths=tuple(paths),
        stamps=tuple(_stamps(paths, context.timeout_s)),
        table=np.repeat(np.arange(len(paths)), counts),
        group=np.concatenate([np.arange(count) for count in counts]),
        first=first,
        column=columns.image,
        max_bytes=int(config.cache_gb * 1e9),
    )
    facts = Facts(num_samples=int(lengths.sum()), size=sides.LARGEST, blocks=first)
    notes = _sizes(columns.largest / 1e9, name, config)
    source = sides.sized(Encoded(name=name, facts=facts, reader=rows, notes=notes))
    if columns.caption:
        source = labels.captioned(source, columns.captions)
    if not columns.label:
        others = labels.listed([other for other in columns.names if other not in (columns.image, columns.caption)])
        return replace(source, unlabeled=f"no column of labels, which --source.label names; others: {others}")
    return labels.labeled(source, columns.labels, context.classes, columns.classes)


def _stamps(paths: Sequence[str], timeout_s: float) -> list[tuple[int, int]]:
    if is_address(paths[0]):
        return remote.stamps_of(paths, "--source.root", timeout_s)
    return list(map(row_groups.stamp_at, paths))


def _opened(path: str, timeout_s: float) -> Table:
    if is_address(path) and path.endswith(".arrow"):
        raise ConfigError(f"{shown(path)} cannot be read at its address: download it, or write it as Parquet")
    try:
        return retries.until_read(lambda: Table(path), lambda: shown(path), timeout_s)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingInput(f"the table {shown(path)} does not exist: check --source.root") from error
    except Exception as error:  # pyarrow raises several kinds, at damaged files also of other libraries
        raise DataError(f"the table {shown(path)} cannot be read: {files.reason(error)}") from error


def _column(table: Table, name: str, timeout_s: float) -> list[Any]:
    """Return all values of a small column; [] without a name."""
    if not name:
        return []
    return retries.until_read(lambda: table.column(name), lambda: f"the table {shown(table.path)}", timeout_s)


def _image_column(table: Table, config: Config) -> str:
    """Return the column of the images.  Raises DataError if there is none, or none of bytes."""
    names, place = table.schema.names, f"the table {shown(table.path)}"
    image = labels.column(names, _IMAGES, config.image, "--source.image", place)
    if not image:
        raise DataError(
            f"{place} has no column of images, such as image or img: its columns are {labels.listed(names)}; name it "
            "with --source.image"
        )
    kind = table.schema.field(image).type
    is_struct = import_module("pyarrow.types").is_struct(kind)
    of_bytes = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields if is_struct else 0)}
    if str(of_bytes.get("bytes", kind)) not in ("binary", "large_binary"):
        raise DataError(
            f"the column {image!r} of {place} is of type {shown(kind, 60)}: expected the bytes of image files, or a "
            "struct of bytes and path"
        )
    return image


def _sizes(largest: float, name: str, config: Config) -> tuple[str, ...]:
    """Return a note about groups too large to be kept.  largest: gigabytes.  Raises ConfigError if not one can be."""
    again = "write the files again in smaller groups, such as row_group_size=100 of pyarrow"
    if largest > config.cache_gb:
        raise ConfigError(
            f"the tables of {name} have groups of up to {largest:.3g} GB, more than the "
            f"{config.cache_gb:g} GB of --source.cache-gb: give more, or {again}"
        )
    if largest * _WINDOW > config.cache_gb:
        return (
            f"slow, since batches take images from {_WINDOW} groups of rows of up to {largest:.3g} GB, of which "
            f"--source.cache-gb {config.cache_gb:g} keeps too few: give more, or {again}",
        )
    return ()


def _class_names(table: Table, label: str) -> list[str] | None:
    """Return the names of the classes, which Hugging Face's datasets write into the schema; None without them."""
    try:
        about: Any = json.loads((table.schema.metadata or {})[b"huggingface"])
        names: Any = about["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
