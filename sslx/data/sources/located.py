"""Find the files that --source.root names: one file, a pattern with braces or wildcards, or all below a folder."""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.console.words import plural, shown
from sslx.data.sources import remote
from sslx.data.sources.config import Split, is_address
from sslx.data.sources.splits import KINDS, Kind, kind_of, kinds_of
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine.files import expanded

Choice = Literal["auto", "none"]
_MAX_FILES = 1_000_000  # that a pattern may name


@dataclass(frozen=True)
class Located:
    """The files of a split.

    name: what names them.  candidates: files, the best ones first.  notes: lines that a user should know.
    """

    name: str
    candidates: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def one_file(
    name: str, root: Path | None, test_root: Path | None, split: Split, what: str, suffixes: Sequence[str]
) -> tuple[Path, bool]:
    """Return the single file with the images of a split, and whether it is one that holds only the test split.

    what: the file in words.  Raises ConfigError without a root, and MissingInput if there is no such file.
    """
    endings = ", ".join(suffixes)
    if root is None:
        raise ConfigError(f"--source.name {name} needs --source.root FILE, {what} ({endings})")
    is_other = split == "test" and test_root is not None
    flag, place = ("--source.test-root", test_root) if is_other and test_root else ("--source.root", root)
    file = expanded(place)
    if not file.is_file():
        kind = f"is a folder, not {what}" if file.is_dir() else "does not exist"
        raise MissingInput(f"{flag} {shown(file)} {kind}: give {what} ({endings})")
    return file, is_other


def find(
    name: str,
    root: Path | None,
    test_root: Path | None,
    suffixes: Sequence[str],
    split: Split,
    splits: Choice,
    timeout_s: float = 300.0,
) -> Located:
    """Return the files of a split.  timeout_s: how long the storage of an address may refuse to answer.

    Files whose name or folder is that of a split are held out, and serve as the test split, if files to train on are
    left.  splits: ``none`` holds none out.  Raises ConfigError, MissingInput and DataError in one line.
    """
    if root is None:
        raise ConfigError(f"--source.name {name} needs --source.root, its {suffixes[0]} file, files or folder")
    if split == "test" and test_root is not None:
        return Located(_name(test_root), (_named(test_root, "--source.test-root", suffixes, timeout_s),))
    files = _named(root, "--source.root", suffixes, timeout_s)
    kinds = _kinds(files) if splits == "auto" else {}
    of: dict[Kind, tuple[str, ...]] = {kind: tuple(f for f in files if kinds.get(f) == kind) for kind in KINDS}
    held_out = [of[kind] for kind in ("test", "val") if of[kind]]
    train = tuple(file for file in files if kinds.get(file, "train") == "train")
    if not train:
        train, held_out = files, list[tuple[str, ...]]()
    if split == "test":
        if not held_out:
            raise MissingInput(
                f"no test images: none of the files of {_name(root)} is named test, val or the like beside others: "
                "give them with --source.test-root"
            )
        return Located(_name(root), tuple(held_out))
    num_held_out = sum(map(len, held_out))
    note = (
        f"held out, not trained on: {plural(num_held_out, 'file')} such as {shown(held_out[0][0])}" if held_out else ""
    )
    return Located(_name(root), (train,), (note,) if note else ())


def _name(root: Path) -> str:
    return shown(remote.address_of(root) if is_address(root) else root)


def _named(root: Path, flag: str, suffixes: Sequence[str], timeout_s: float) -> tuple[str, ...]:
    """Return the files that a path, an address or a pattern names."""
    if is_address(root):
        address = remote.address_of(root)
        return tuple(remote.named(address, braced(address), flag, suffixes, timeout_s))
    path = str(expanded(root))
    if os.path.isdir(path):
        return _below(path, flag, suffixes)
    if os.path.isfile(path):
        names = [path]
    else:
        patterns = braced(path)
        names = [n for one in patterns for n in (sorted(glob.glob(one)) if glob.has_magic(one) else [one])]
        missing = [name for name in names if not os.path.isfile(name)]
        if not names or missing == [path]:
            raise MissingInput(f"{flag} {shown(path)} names no file: check the path or the pattern, and quote it")
        if missing:
            raise MissingInput(
                f"{len(missing):,} of the {len(names):,} files that {flag} names do not exist, the first one "
                f"{shown(missing[0])}: restore them or change the pattern"
            )
    if others := [name for name in names if not name.lower().endswith(tuple(suffixes))]:
        raise DataError(f"{flag}: expected {' or '.join(suffixes)} files, got {shown(others[0])}")
    return tuple(names)


def _below(folder: str, flag: str, suffixes: Sequence[str]) -> tuple[str, ...]:
    """Return the files below a folder, sorted.  Links are followed, but no folder is read twice."""
    files: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [
            name for name in inner if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        seen |= {os.path.realpath(os.path.join(place, name)) for name in inner}
        files += [
            os.path.join(place, name)
            for name in names
            if name.lower().endswith(tuple(suffixes)) and name[0] != "." and not _is_cached(name)
        ]
    if not files:
        raise MissingInput(f"no {' or '.join(suffixes)} files below {shown(folder)}: check {flag}")
    first = {suffix: file for file in sorted(files, reverse=True) for suffix in suffixes if file.endswith(suffix)}
    if len(first) > 1:
        raise DataError(f"{flag} {shown(folder)} holds files of {' and '.join(first)}, perhaps the same: name one kind")
    return tuple(sorted(files))


def _is_cached(name: str) -> bool:
    """Return whether Hugging Face's datasets wrote this file for themselves."""
    return name.startswith("cache-") and name.endswith(".arrow")


def braced(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..123}`` in a pattern, as a shell does.  Raises ConfigError above a million names."""
    parts: list[list[str]] = []
    for place, text in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if place % 2 == 0:
            parts.append([text])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", text):
            first, last = map(int, numbers.groups())
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
            if abs(last - first) > _MAX_FILES:
                raise ConfigError(f"the pattern {shown(pattern)} names more than {_MAX_FILES:,} files")
            step = 1 if last >= first else -1
            parts.append([f"{number:0{width}}" for number in range(first, last + step, step)])
        else:
            parts.append(text.split(",") if "," in text else [f"{{{text}}}"])
    return ["".join(names) for names in itertools.islice(itertools.product(*parts), _MAX_FILES)]


def _kinds(files: Sequence[str]) -> dict[str, Kind]:
    """Return the splits of files by the names of their folders or by how their names begin."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    stems = {file: re.split(r"[-_.]?\d", os.path.basename(file))[0].split(".")[0] for file in files}
    pairs = kinds_of(set(stems.values()))
    kinds: dict[str, Kind] = {}
    for file in files:
        folders = os.path.relpath(os.path.dirname(os.path.abspath(file)), folder).split(os.sep)
        by_name: list[Kind | None] = [*map(kind_of, folders), kind_of(stems[file]), pairs.get(stems[file])]
        for kind in by_name[::-1]:  # the first one counts
            if kind is not None:
                kinds[file] = kind
    return kinds
