"""A list of image files, as CSV, TSV, JSON lines or text, with their labels, captions and splits."""

import csv
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from sslx.console import activity
from sslx.console.words import one_line, plural, shown
from sslx.data.facts import Facts
from sslx.data.sources import labels, listing_cache, located, sides
from sslx.data.sources.base import Context, Files
from sslx.data.sources.config import SourceConfig, Split
from sslx.data.sources.listing import Stamp, stamp_of
from sslx.data.sources.paths import Paths
from sslx.data.sources.splits import Kind, kind_of
from sslx.errors import DataError, MissingInput
from sslx.machine import files

_PATHS = ("path", "file_name", "filename", "file", "filepath", "image_path", "image")
_SPLITS = ("split", "set", "subset", "partition")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".lst")
_NUMBERED = re.compile(r"(.*\S)\s+(\d+)\s*")  # a path and a label


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The location of your list and the names of its columns."""

    name: Literal["list"] = "list"
    root: Path | None = None
    """List of images: .csv or .tsv with a header, .jsonl with an object a line, or .txt with a path a line."""
    test_root: Path | None = None
    """List of the test images.  Default: those that the column of splits names test or val."""
    base: Path | None = None
    """Folder to which the paths in the list are relative.  Default: the list's own."""
    path: str = ""
    """Column of the paths.  Default: path, file_name or similar."""
    label: str = ""
    """Column of the labels, whole numbers or names.  Default: label, class or similar, if there is one."""
    caption: str = ""
    """Column of the captions.  Default: caption, text or similar, if there is one."""
    split: str = ""
    """Column of the splits (train, test, val, ...).  Default: split or similar, if there is one."""

    def build(self, split: Split, context: "Context") -> "Files":
        with activity.doing("reading the list of images"):
            return context.call(
                f"the list of images {shown(self.root or '')}", lambda _: _read(self, split, context.classes)
            )


@dataclass(eq=False)
class _Rows:
    """The columns of a list.  lines: of each row its line in the file, from 1 on."""

    lines: list[int] = field(default_factory=list[int])
    paths: list[str] = field(default_factory=list[str])
    labels: list[Any] = field(default_factory=list[Any])
    captions: list[Any] = field(default_factory=list[Any])
    splits: list[Any] = field(default_factory=list[Any])


def _read(config: Config, split: Split, known: Sequence[str] | None) -> Files:
    what = "a list of images"
    file, is_other = located.one_file("list", config.root, config.test_root, split, what, _SUFFIXES)
    rows = _Rows()
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            for line, values in _parsed(config, file, opened):
                rows.lines.append(line)
                for column, value in zip((rows.paths, rows.labels, rows.captions, rows.splits), values, strict=True):
                    column.append(value)
    except (OSError, csv.Error) as error:
        raise DataError(f"the list {shown(file)} cannot be read: {files.reason(error)}") from error
    kept, notes = _of_split(rows, split, file, is_other)
    source = _files(config, file, rows, kept)
    if rows.captions and any(rows.captions):
        source = labels.captioned(source, [rows.captions[i] for i in kept])
    source = labels.labeled(source, [rows.labels[i] for i in kept], known)
    return replace(source, notes=(*notes, *source.notes))


def _parsed(config: Config, file: Path, opened: TextIO) -> Iterator[tuple[int, tuple[str, Any, Any, Any]]]:
    """Yield the line number, and the path, label, caption and split, of each row; None without such a column."""
    suffix = file.suffix.lower()
    place = f"the list {shown(file)}"
    if suffix not in _SUFFIXES:
        raise DataError(f"{place} has the suffix '{suffix}': expected {', '.join(_SUFFIXES)}")
    records = {".csv": _table, ".tsv": _table, ".jsonl": _json_lines, ".ndjson": _json_lines}.get(suffix, _text)(
        opened, place
    )
    columns: tuple[str, ...] | None = None
    for line, record in records:
        if columns is None:
            names = [*record]
            columns = (
                labels.column(names, _PATHS, config.path, "--source.path", place),
                labels.column(names, labels.NAMES, config.label, "--source.label", place),
                labels.column(names, labels.CAPTIONS, config.caption, "--source.caption", place),
                labels.column(names, _SPLITS, config.split, "--source.split", place),
            )
            if not columns[0]:
                raise DataError(
                    f"{place} has no column of paths, such as path or file_name: its columns are "
                    f"{labels.listed(names)}; name it with --source.path"
                )
        path, label, caption, split = (record.get(column) for column in columns)
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise DataError(
                f"line {line:,} of {place} has no path in its column {columns[0]!r}, but {shown(path, 60)!r}"
            )
        if isinstance(label, str) and columns[1] == "labels":
            label = re.split(r"[;|]", label)
        yield line, (path, label, caption, split)


def _table(opened: TextIO, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table with a header, separated by tabs, semicolons or commas, whichever its header has."""
    head = opened.readline()
    opened.seek(0)
    separator = next((sign for sign in "\t;," if sign in head), ",")
    reader = csv.reader(opened, delimiter=separator)
    names = [name.strip() for name in next(reader, [])]
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{place} has several columns {again[0]!r}: its columns are {labels.listed(names)}")
    for row in reader:
        if len(row) > len(names) or 0 < len(row) < len(names):
            raise DataError(
                f"line {reader.line_num:,} of {place} has {plural(len(row), 'cell')}, its header {len(names)}"
            )
        if row:
            yield reader.line_num, dict(zip(names, row, strict=True))


def _json_lines(opened: TextIO, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(opened, 1):
        if not text.strip():
            continue
        try:
            record: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {line:,} of {place} is not JSON: {one_line(error)}") from error
        if not isinstance(record, dict):
            raise DataError(f"line {line:,} of {place} is {shown(text.strip(), 60)}: expected an object in braces")
        yield line, record


def _text(opened: TextIO, place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield paths, one a line, with a label behind a tab, or, if all lines end in one, a number behind a space."""
    del place
    lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(opened, 1) if line.strip()]
    numbered = [_NUMBERED.fullmatch(line) for _, line in lines]
    for (number, line), match in zip(lines, numbered, strict=True):
        path, _, label = line.partition("\t")
        if all(numbered) and match:
            path, label = match.groups()
        yield number, {"path": path, "label": label or None}


def _of_split(rows: _Rows, split: Split, file: Path, is_other: bool) -> tuple[list[int], list[str]]:
    """Return the numbers of the rows of a split, and notes.  is_other: whether the list has no other images."""
    everything = range(len(rows.paths))
    if not everything:
        raise MissingInput(f"the list {shown(file)} is empty: it names no images")
    kinds: list[Kind | None] = [kind_of(str(name).strip()) if name else None for name in rows.splits]
    held_out = [[i for i in everything if kinds[i] == kind] for kind in ("test", "val")]
    if is_other:
        return next((some for some in held_out if some), [*everything]), []
    if split == "test":
        if some := next((some for some in held_out if some), None):
            return some, []
        raise MissingInput(
            f"no test images: no row of the list {shown(file)} has the split test or val (--source.split): give "
            "a list of them with --source.test-root"
        )
    kept = [i for i in everything if kinds[i] in (None, "train")]
    if not kept:
        raise MissingInput(f"the list {shown(file)} has no images to train on: all are of the splits test and val")
    notes: list[str] = []
    if held_out := len(rows.paths) - len(kept):
        notes.append(f"held out, not trained on: {plural(held_out, 'image')} of the splits test and val")
    if others := sorted({str(rows.splits[i]) for i in kept if rows.splits[i] and kinds[i] is None}):
        notes.append(f"trained on, although not of the split train: images of the split {shown(others[0], 60)}")
    return kept, notes


def _files(config: Config, file: Path, rows: _Rows, kept: Sequence[int]) -> Files:
    """Return the image files of these rows.  Raises MissingInput if some do not exist."""
    base = os.path.join(files.expanded(config.base) if config.base else file.parent, "")
    paths = [os.path.join(base, os.path.expanduser(rows.paths[i].strip())) for i in kept]
    root = base if all(path.startswith(base) for path in paths) else ""
    packed = Paths.of(paths, root)
    if missing := _missing(file, packed, paths):
        raise MissingInput(
            f"{len(missing):,} of the {plural(len(paths), 'image')} of the list {shown(file)} do not exist, the first "
            f"one {shown(paths[missing[0]])} (line {rows.lines[kept[missing[0]]]:,}): correct the paths, or give the "
            "folder that they are relative to with --source.base"
        )
    side, paged = sides.suitable(paths)
    notes = [sides.pages_note(shown(paged))] if paged else []
    if twice := len(paths) - len(set(paths)):
        notes.append(f"listed more than once: {plural(twice, 'image')}")
    facts = Facts(num_samples=len(paths), size=side)
    return Files(name=shown(file), facts=facts, paths=packed, notes=tuple(notes))


def _missing(file: Path, packed: Paths, paths: Sequence[str]) -> list[int]:
    """Return the numbers of the paths that do not exist, listing each folder once rather than asking for each file.

    That all files of a long list exist is noted, and holds until one of their folders changes.
    """
    digest = hashlib.blake2b(packed.names.data + packed.names.lengths.tobytes(), digest_size=16).hexdigest()
    options = [*packed.roots, digest]
    if listing_cache.load("list", str(file), options):
        return []
    began_ns = time.time_ns()
    names: dict[str, frozenset[str]] = {}
    stamps: dict[str, Stamp | None] = {}
    missing: list[int] = []
    for place, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in names:
            stamps[folder] = stamp_of(folder)
            try:
                names[folder] = frozenset(os.listdir(folder))
            except OSError:
                names[folder] = frozenset()
        if name not in names[folder]:
            missing.append(place)
    if not missing and len(paths) >= listing_cache.MIN_ENTRIES:
        listing_cache.keep("list", str(file), options, stamps, began_ns)
    return missing
