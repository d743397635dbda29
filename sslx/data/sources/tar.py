"""WebDataset's tar shards, or any tar files of images, read in place: labels from .cls or .json, texts from .txt."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from sslx.console import activity
from sslx.console.words import one_line, plural, shown
from sslx.data.codecs.headers import Unreadable
from sslx.data.facts import Facts
from sslx.data.sources import labels, located, remote, shards, sides
from sslx.data.sources.base import Context, Encoded, Indices
from sslx.data.sources.config import SourceConfig, Split, is_address
from sslx.data.sources.packed import Packed
from sslx.data.sources.shard_cache import ShardCache
from sslx.data.sources.shards import Index
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine import files

_WINDOW = 16  # tar files from which the order takes a batch, or two of them


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The location of your tar files."""

    name: Literal["tar"] = "tar"
    root: Path | None = None
    """Tar file, folder of tar files, or quoted pattern such as 'train-{000..099}.tar', also at s3://, http://, ..."""
    test_root: Path | None = None
    """Tar files with the test images.  Default: those below the root whose name or folder is test, val or similar."""
    splits: Literal["auto", "none"] = "auto"
    """Hold out files whose name or folder is test, val or similar (auto), or train on all of them (none)."""
    image: str = ""
    """Extensions of the images, such as jpg or 'left.png,left.jpg', if samples have several images."""
    label: str = ""
    """Key of the labels in .json members.  Default: .cls members, else the key label or a similar one, else folders."""
    caption: str = ""
    """Key of the captions in .json members.  Default: .txt members, else the key caption or a similar one."""
    cache_gb: float = 50.0
    """Disk in gigabytes for copies of tar files at addresses; those read longest ago give way to others."""
    cache: Path | None = None
    """Folder of these copies, best on a local disk.  Default: ~/.cache/sslx/shards."""

    def __post_init__(self) -> None:
        if not self.cache_gb > 0:
            raise ConfigError(f"--source.cache-gb must be above 0, not {self.cache_gb:g}")

    def build(self, split: Split, context: "Context") -> "Encoded":
        with activity.doing("indexing the tar files"):
            return context.call(
                f"the index of the tar files {shown(self.root or '')}", partial(_read, self, split, context)
            )


@dataclass(frozen=True, eq=False)
class Members:
    """Reads image files out of tar files, at random and from any number of processes and threads.

    paths, stamps: of the tar files.  file, offset, size: (N,) where the bytes of each image lie.  keys: the names of
    all samples without extensions.  key: (N,) of each image its sample.  extensions: of each image, by ``extension``.
    cache: where tar files at addresses are read.
    """

    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    file: Indices
    offset: Indices
    size: Indices
    keys: Packed
    key: Indices
    extensions: tuple[str, ...]
    extension: Indices
    cache: ShardCache | None = None

    def read(self, rows: Indices) -> list[bytes]:
        return [self._read(row) for row in rows.tolist()]

    def where(self, row: int) -> str:
        name = f"{os.fsdecode(self.name(row))}.{self.extensions[self.extension[row]]}"
        return f"{self.paths[self.file[row]]}!{name}"

    def name(self, row: int) -> bytes:
        """Return the name of an image in its tar file, without the extension."""
        return self.keys[int(self.key[row])] or b""

    def _read(self, row: int) -> bytes:
        number = int(self.file[row])
        if self.cache is not None:
            with self.cache.opened(self.paths[number], self.stamps[number]) as descriptor:
                return self._bytes(descriptor, row)
        with_file = opened(self.paths[number])
        if shards.stamp_of(with_file.fileno()) != self.stamps[number]:
            raise Unreadable("its tar file has changed since it was indexed: start again, with the file as it was")
        return self._bytes(with_file.fileno(), row)

    def _bytes(self, descriptor: int, row: int) -> bytes:
        size, offset = int(self.size[row]), int(self.offset[row])
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
            data += more  # a read of more than 2 GB, or one that a signal interrupted
        if len(data) < size:
            raise Unreadable(f"{len(data):,} bytes of {size:,}, at which its tar file ends")
        return data


@lru_cache(maxsize=128)
def opened(path: str) -> BinaryIO:
    """Open a file for ``pread``.  Python closes it when it is neither kept here nor read from any more."""
    return open(path, "rb", buffering=0)


def _read(config: Config, split: Split, context: Context, say: Callable[[str], None]) -> Encoded:
    timeout_s = context.timeout_s
    found = located.find("tar", config.root, config.test_root, (".tar",), split, config.splits, timeout_s)

    def joined(name: str, paths: Sequence[str]) -> Encoded:
        store = _store(config, paths, timeout_s) if is_address(paths[0]) else None
        indexes = shards.of_files(paths, say, timeout_s, store)
        return _joined(config, name, paths, indexes, context.classes, store)

    return labels.first_labeled(found, joined)


def _store(config: Config, paths: Sequence[str], timeout_s: float) -> shards.Remote:
    """Return where tar files at addresses are read.  Raises MissingInput if some do not exist."""
    folder = files.expanded(config.cache) if config.cache else files.cache("shards")
    stamps = dict(zip(paths, remote.stamps_of(paths, "--source.root", timeout_s), strict=True))
    return shards.Remote(ShardCache(folder, int(config.cache_gb * 1e9), timeout_s), stamps)


def _joined(
    config: Config,
    name: str,
    paths: Sequence[str],
    indexes: Sequence[Index],
    known: Sequence[str] | None,
    store: shards.Remote | None,
) -> Encoded:
    """Return the images of tar files as one source, in the order in which they lie there."""
    chosen = [_images(config.image, path, index) for path, index in zip(paths, indexes, strict=True)]
    counts = np.array([len(rows) for rows in chosen], dtype=np.int64)
    if not counts.sum():
        others = "no member of a known kind" if not any(len(index.keys) for index in indexes) else "only texts"
        raise MissingInput(f"no images in {plural(len(paths), 'tar file')} such as {shown(paths[0])}: {others}")

    def column(field: str) -> Indices:
        return np.concatenate([getattr(index, field)[rows] for index, rows in zip(indexes, chosen, strict=True)])

    file = np.repeat(np.arange(len(paths)), counts)
    num_keys = np.array([len(index.keys) for index in indexes], dtype=np.int64)
    num_extensions = np.array([len(index.extensions) for index in indexes], dtype=np.int64)
    reader = Members(
        paths=tuple(paths),
        stamps=tuple(index.stamp for index in indexes),
        file=file,
        offset=column("offset"),
        size=column("size"),
        keys=Packed.joined([index.keys for index in indexes]),
        key=column("sample") + np.repeat(np.cumsum(num_keys) - num_keys, counts),
        extensions=tuple(extension for index in indexes for extension in index.extensions),
        extension=column("extension") + np.repeat(np.cumsum(num_extensions) - num_extensions, counts),
        cache=store.cache if store else None,
    )
    facts = Facts(num_samples=len(file), size=sides.LARGEST, blocks=np.cumsum(counts) - counts)
    source = sides.sized(Encoded(name=name, facts=facts, reader=reader))
    if left_out := sum(len(index.keys) for index in indexes) - len(file):
        source = replace(source, notes=(*source.notes, f"left out: {plural(left_out, 'sample')} without an image"))
    if num_links := sum(index.num_links for index in indexes):
        source = replace(source, notes=(*source.notes, f"left out: {plural(num_links, 'link')} to other members"))
    if store and (line := _too_little(config, list(store.stamps.values()))):
        source = replace(source, notes=(*source.notes, line))
    texts = {kind: _texts([index.texts[kind] for index in indexes], reader.key) for kind in shards.TEXTS}
    return _described(config, source, texts, known)


def _too_little(config: Config, stamps: Sequence[tuple[int, int]]) -> str:
    """Return a line if copies are removed before they have been read to their end; "" otherwise."""
    sizes = sorted((size for size, _ in stamps), reverse=True)
    needed = sum(sizes[: 2 * _WINDOW]) / 1e9
    if needed <= config.cache_gb:
        return ""
    return (
        f"slow, since batches take images from up to {2 * _WINDOW} tar files, {needed:.3g} GB, and each is copied "
        f"several times an epoch: give more than --source.cache-gb {config.cache_gb:g}"
    )


def _texts(parts: Sequence[Packed], samples: Indices) -> list[bytes | None]:
    """Return the texts of these samples; [] if no sample has one."""
    packed = Packed.joined(parts)
    return [packed[sample] for sample in samples.tolist()] if packed.data else []


def _images(image: str, path: str, index: Index) -> Indices:
    """Return the rows of one image of each sample, in the order of the samples."""
    if image:
        extensions = [extension.strip(" .").lower() for extension in image.split(",")]
        rows = np.flatnonzero(np.isin(index.extension, [i for i, e in enumerate(index.extensions) if e in extensions]))
    else:
        rows = np.arange(len(index.sample))
        plain = np.array(["." not in extension for extension in index.extensions], dtype=np.bool_)
        if len(np.unique(index.sample)) < len(rows) and plain.any():  # right.png and left.png, say, beside png
            rows = np.flatnonzero(plain[index.extension])
    rows = rows[np.argsort(index.sample[rows], kind="stable")]
    again = np.flatnonzero(np.diff(index.sample[rows]) == 0)
    if len(again):
        key = shown(index.keys[int(index.sample[rows[again[0]]])] or b"")
        raise ConfigError(
            f"the sample {key} of {shown(path)} has several images: its extensions are "
            f"{labels.listed(index.extensions)}, choose with --source.image, or give the others another name"
        )
    return rows


def _described(
    config: Config, source: Encoded, texts: dict[str, list[bytes | None]], known: Sequence[str] | None
) -> Encoded:
    """Return the source with the labels and captions that its members have."""
    from_json = _Fields(source, texts["json"], config)
    if any(texts["cls"]) and not config.label:
        values: Sequence[Any] = texts["cls"]
    else:
        values = from_json.labels or _folders(source)
    captions: Sequence[Any] = from_json.captions
    if any(texts["txt"]) and not config.caption:
        captions = [None if text is None else text.decode(errors="replace").strip() for text in texts["txt"]]
    return labels.labeled(labels.captioned(source, captions) if captions else source, values, known)


class _Fields:
    """The labels and captions in the .json members of samples; [] for none."""

    def __init__(self, source: Encoded, texts: Sequence[bytes | None], config: Config) -> None:
        self._source = source
        self.labels: list[Any] = []
        self.captions: list[Any] = []
        first = next((i for i, text in enumerate(texts) if text is not None), None)
        if first is None:
            if config.label or config.caption:
                raise DataError(f"{source.name} has no .json members, where --source.label and --source.caption belong")
            return
        names = [*self._parsed(first, texts[first])]
        place = f"the .json of {source.where(first)}"
        label = labels.column(names, labels.NAMES, config.label, "--source.label", place)
        caption = labels.column(names, labels.CAPTIONS, config.caption, "--source.caption", place)
        if not label and not caption:
            return
        pairs = [(table.get(label), table.get(caption)) for table in map(self._parsed, range(len(texts)), texts)]
        self.labels = [value for value, _ in pairs] if label else []
        self.captions = [value for _, value in pairs] if caption else []

    def _parsed(self, i: int, text: bytes | None) -> dict[str, Any]:
        try:
            table: Any = json.loads(text or b"{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"the .json of {self._source.where(i)} cannot be read: {one_line(error)}") from error
        return table if isinstance(table, dict) else {}


def _folders(source: Encoded) -> list[bytes | None]:
    """Return the first folder in each image's name, if there are several, as the images' classes."""
    reader = source.reader
    assert isinstance(reader, Members)
    folders = [name.partition(b"/")[0] if b"/" in (name := reader.name(row)) else None for row in range(len(source))]
    return folders if len(set(folders)) > 1 else [None] * len(folders)
