"""The index of a tar file: where each image lies in it, and the texts that describe it, so that nothing is unpacked.

Members whose names are equal up to the first dot of the last part are one sample, as in WebDataset.  An index is made
once, kept beside its tar file or, where that folder cannot be written, below ~/.cache/sslx, and made again when the tar
file's size or time of change differs.  Tar files at addresses are read from local copies (``shard_cache``).
"""

import hashlib
import io
import os
import tarfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sslx import distributed
from sslx.console.words import plural, shown
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources.config import is_address
from sslx.data.sources.listing import EXTENSIONS, silent
from sslx.data.sources.packed import Packed
from sslx.data.sources.shard_cache import ShardCache
from sslx.data.waiting import WaitPolicy
from sslx.data.workers import Pool, answer_alone
from sslx.errors import DataError, MissingInput, UserError
from sslx.machine import cores, files

TEXTS = ("cls", "txt", "json")
"""The extensions of members whose contents an index holds."""
SUFFIX = ".sslx-index"
_VERSION = 1
_MAX_TEXT_BYTES = 1 << 20
_MAX_WORKERS = 8
_MESSAGE_EVERY_S = 3.0
_BLOCK = 512  # of a tar file
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Index:
    """What a tar file holds.

    stamp: its size in bytes and its time of change in nanoseconds.  num_links: the members that are links, which are
    not read.  keys: the name of each sample without extension.  sample, extension, offset, size: (num_images,) int64,
    of each image file its sample, its number in ``extensions``, and where its bytes lie.  texts: of each sample the
    contents of its members with an extension of TEXTS.
    """

    stamp: tuple[int, int]
    num_links: int
    keys: Packed
    extensions: tuple[str, ...]
    sample: Indices
    extension: Indices
    offset: Indices
    size: Indices
    texts: dict[str, Packed]


def stamp_of(descriptor: int) -> tuple[int, int]:
    """Return the size and the time of change of an open file, by which a changed one is noticed."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Remote:
    """Where tar files at addresses are read.  stamps: of each address."""

    cache: ShardCache
    stamps: Mapping[str, tuple[int, int]]


@contextmanager
def _reading(path: str, remote: Remote | None) -> Generator[tuple[BinaryIO, tuple[int, int]]]:
    """Give an open tar file and its stamp."""
    if remote is None:
        with _opened(path) as file:
            yield file, stamp_of(file.fileno())
        return
    try:
        with (
            remote.cache.opened(path, remote.stamps[path]) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
        ):
            yield file, remote.stamps[path]
    except Unreadable as error:
        raise MissingInput(f"the shard {shown(path)} cannot be read: {error}") from error


def make(path: str, begin: Callable[[], None] = lambda: None, remote: Remote | None = None) -> Index:
    """Read through a tar file.  begin: called now and then, as a sign of progress.

    Raises DataError for one that is no tar file, is compressed, was cut, or has a member with a wrong size.
    """
    with _reading(path, remote) as (file, stamp):
        samples: dict[bytes, int] = {}
        extensions: dict[str, int] = {}
        images: list[tuple[int, int, int, int]] = []
        texts: dict[str, dict[int, bytes]] = {extension: {} for extension in TEXTS}
        num_links = 0
        for number, member in enumerate(_members(file, path)):
            if number % 1000 == 0:
                begin()
            num_links += member.islnk() or member.issym()
            if not member.isreg() or member.issparse() or os.path.basename(member.name)[:1] == ".":
                continue
            key, extension = _split(member.name)
            is_image = f".{extension}".endswith(EXTENSIONS)
            if not is_image and extension not in TEXTS:
                continue
            sample = samples.setdefault(os.fsencode(key), len(samples))
            if is_image:
                kind = extensions.setdefault(extension, len(extensions))
                images.append((sample, kind, member.offset_data, member.size))
            elif member.size <= _MAX_TEXT_BYTES:
                texts[extension][sample] = os.pread(file.fileno(), member.size, member.offset_data)
    columns = np.array(images, dtype=np.int64).reshape(-1, 4).T.copy()
    packed = {extension: Packed.of(map(found.get, range(len(samples)))) for extension, found in texts.items()}
    return Index(stamp, num_links, Packed.of(samples), tuple(extensions), *columns, texts=packed)


def _split(name: str) -> tuple[str, str]:
    """Return a member's name up to the first dot of its last part, and the rest in lower case."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb", opener=files.without_waiting)
    except OSError as error:
        raise MissingInput(f"the shard {shown(path)} cannot be read: {files.reason(error)}") from error


def _members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file.  The module tarfile ends in silence where it finds no header."""
    last: tarfile.TarInfo | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            tar: Any = opened
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps every member
                last = member
                yield member
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: damaged numbers in extended headers
        if last is None:
            raise DataError(_no_tar(file, path, error)) from error
        raise DataError(f"the shard {shown(path)} is cut or damaged {_behind(last)}: {files.reason(error)}") from error
    head = os.pread(file.fileno(), _BLOCK, end)
    if not head:
        where = _behind(last) if last else "at its beginning"
        raise DataError(f"the shard {shown(path)} ends {where}, without the mark of its end: it was cut, restore it")
    if head != bytes(_BLOCK):
        where = _behind(last) if last else "at its beginning"
        raise DataError(f"the shard {shown(path)} is damaged {where}: no member begins there, restore it")


def _behind(member: tarfile.TarInfo) -> str:
    return f"behind its member {shown(member.name)} of {plural(member.size, 'byte')}"


def _no_tar(file: BinaryIO, path: str, error: Exception) -> str:
    head = os.pread(file.fileno(), 2, 0)
    if head in _COMPRESSED:
        return f"the shard {shown(path)} is compressed by {_COMPRESSED[head]}: unpack it once, to a .tar file"
    return f"the shard {shown(path)} is not a tar file: {files.reason(error)}" if head else f"{shown(path)} is empty"


def of_files(
    paths: Sequence[str],
    say: Callable[[str], None] = silent,
    timeout_s: float = 300.0,
    remote: Remote | None = None,
) -> list[Index]:
    """Return the indexes of these tar files; those that are missing or stale are made by several processes and kept.

    Ranks that start together begin at different files, and take over what another one has made meanwhile.
    remote: if the paths are addresses.  Raises what ``make`` raises.
    """
    indexes: dict[str, Index] = {}
    report = _now_and_then(lambda: say(f"indexing {plural(len(paths), 'tar file')}: {len(indexes):,} done"))
    start = distributed.rank() * len(paths) // distributed.world_size()
    to_make: list[str] = []
    for path in (*paths[start:], *paths[:start]):
        if path in indexes:
            continue
        if index := _kept(path, remote):
            indexes[path] = index
        else:
            to_make.append(path)
    to_make = list(dict.fromkeys(to_make))
    for path, index in zip(to_make, _all_made(to_make, say, timeout_s, remote), strict=True):
        indexes[path] = index
        report()
    return [indexes[path] for path in paths]


def _all_made(
    paths: Sequence[str], say: Callable[[str], None], timeout_s: float, remote: Remote | None
) -> Iterator[Index]:
    num_workers = min(len(paths), cores.allowed(), _MAX_WORKERS)
    if num_workers < 2:
        for path in paths:
            report = _now_and_then(lambda path=path: say(f"indexing {shown(path)}"))
            yield _kept(path, remote) or _made_and_kept(path, report, remote)
        return
    policy = WaitPolicy(timeout_s, say=say)
    pool = Pool(
        partial(_work, paths, remote), num_workers, place_bytes=0, wait_policy=policy, name=lambda i: shown(paths[i])
    )
    try:
        for index in pool.results(range(len(paths)), answer_alone):
            if isinstance(index, UserError):
                raise index
            yield index
    finally:
        pool.close()


def _now_and_then(act: Callable[[], None]) -> Callable[[], None]:
    """Return a function that acts when it is called, at most every three seconds."""
    last = time.monotonic()

    def call() -> None:
        nonlocal last
        if time.monotonic() > last + _MESSAGE_EVERY_S:
            last = time.monotonic()
            act()

    return call


def _work(
    paths: Sequence[str], remote: Remote | None, number: int, place: Tensor, begin: Callable[[int], None]
) -> Index | UserError:
    """Return the index of a tar file, or why there is none, as work for a pool."""
    del place
    try:
        return _kept(paths[number], remote) or _made_and_kept(paths[number], partial(begin, number), remote)
    except UserError as error:
        return error


def _made_and_kept(path: str, begin: Callable[[], None], remote: Remote | None) -> Index:
    index = make(path, begin, remote)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = _arrays(index)
    np.savez_compressed(buffer, **arrays)
    for place in _places(path):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            files.replace(place, buffer.getvalue())
            break
    return index


def _places(path: str) -> list[Path]:
    """Return where an index may be: beside its tar file, unless that is at an address, and in a folder of the user."""
    is_remote = is_address(path)
    real = path if is_remote else os.path.realpath(path)
    name = hashlib.blake2b(os.fsencode(real), digest_size=16).hexdigest()
    return [*([] if is_remote else [Path(real + SUFFIX)]), files.cache("indexes") / (name + SUFFIX)]


def _kept(path: str, remote: Remote | None) -> Index | None:
    """Return the index that was kept of a tar file, or None if there is none of the file as it is now."""
    if remote:
        stamp = remote.stamps[path]
    else:
        with _opened(path) as file:
            stamp = stamp_of(file.fileno())
    for place in _places(path):
        with suppress(Exception):  # one of another version, damaged, or not there
            with np.load(place, allow_pickle=False) as arrays:
                index = _index(arrays)
            if index.stamp == stamp:
                return index
    return None


def _arrays(index: Index) -> dict[str, npt.NDArray[Any]]:
    """Return an index as arrays to be kept in a file."""
    arrays = {"head": np.array([_VERSION, *index.stamp, index.num_links])}
    arrays |= {name: getattr(index, name) for name in ("sample", "extension", "offset", "size")}
    packed = {"keys": index.keys, **index.texts, "extensions": Packed.of(map(os.fsencode, index.extensions))}
    for name, texts in packed.items():
        arrays |= {f"{name} data": np.frombuffer(texts.data, np.uint8), f"{name} lengths": texts.lengths}
    return arrays


def _index(arrays: Any) -> Index:
    """Return the index of ``_arrays``.  Raises ValueError for one of another version."""
    version, num_bytes, time_ns, num_links = arrays["head"].tolist()
    if version != _VERSION:
        raise ValueError(f"the index is of version {version}")

    def packed(name: str) -> Packed:
        return Packed(arrays[f"{name} data"].tobytes(), arrays[f"{name} lengths"])

    extensions = packed("extensions")
    return Index(
        (num_bytes, time_ns),
        num_links,
        packed("keys"),
        tuple(os.fsdecode(extensions[i] or b"") for i in range(len(extensions))),
        *(arrays[name] for name in ("sample", "extension", "offset", "size")),
        texts={name: packed(name) for name in TEXTS},
    )
