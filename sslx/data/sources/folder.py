"""A user's own images: files below a folder, with its subfolders as classes."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from sslx.console import activity
from sslx.console.words import shown
from sslx.data.facts import Facts
from sslx.data.sources import sides, splits
from sslx.data.sources.base import Context, Files
from sslx.data.sources.config import SourceConfig, Split
from sslx.data.sources.labels import and_more, without_unknown
from sslx.data.sources.listing import EXTENSIONS, Listing, subfolders_and_image
from sslx.data.sources.splits import Choice
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine.files import expanded

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xlsx")
_READ_BY = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".jsonl"), "list"),
    **dict.fromkeys((".parquet", ".arrow"), "parquet"),
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5"), "arrays"),
}
"""Suffixes of files that another source reads, and its name."""
_DATA_SETS = {  # folders of torchvision's data sets, and the source that reads them
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "FashionMNIST": "fashion_mnist",
    "stl10_binary": "stl10",
}


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The location of your own images."""

    name: Literal["folder"] = "folder"
    root: Path | None = None
    """Folder with your images."""
    test_root: Path | None = None
    """Folder with the test images.  Default: a subfolder of the root named test, val or similar."""
    splits: Choice = "auto"
    """Take subfolders named train, test, val, ... as splits: if that is safe (auto), always (folders), never (none)."""

    def build(self, split: Split, context: "Context") -> "Files":
        with activity.doing("listing the images"):
            return context.call(
                f"the list of the images below {shown(self.root or '')}",
                lambda say: _read(self, split, say, context.classes),
            )


def _read(config: Config, split: Split, say: Callable[[str], None], classes: Sequence[str] | None) -> Files:
    """Return the image files below a folder.  If all lie in subfolders, the first level of these are the classes."""
    if config.root is None:
        raise ConfigError("--source.name folder needs --source.root FOLDER, the folder of your images")
    root = _checked(config.root, "--source.root")
    test_root = None if config.test_root is None else _checked(config.test_root, "--source.test-root")
    layout = splits.find(root, config.splits, test_root)
    if split == "test":
        if test_root is not None:
            return _listed(test_root, "--source.test-root", (), say, classes, split)
        if not layout.test:
            raise MissingInput(f"no test images: {_why_no_test(root, config)}: give the folder with --source.test-root")
        return _listed(layout.test[0], "--source.root", (), say, classes, split)
    source = _listed(
        layout.train, "--source.root", layout.held_out, say, classes, split, check_deeper=config.splits != "none"
    )
    return replace(source, notes=(*layout.notes, *source.notes))


def _why_no_test(root: Path, config: Config) -> str:
    if config.splits == "none":
        return "--source.splits none holds no images out"
    kinds = splits.kinds_of([folder.name for folder in subfolders_and_image(root.absolute().parent)[0]])
    beside = next((name for name, kind in sorted(kinds.items()) if kind != "train" and name != root.name), "")
    hint = f" (beside it is {shown(beside)})" if beside and kinds.get(root.name) == "train" else ""
    return f"{shown(root)} has no folder named test, val, validation or the like with images in it{hint}"


def _listed(
    root: Path,
    flag: str,
    held_out: Sequence[Path],
    say: Callable[[str], None],
    classes: Sequence[str] | None,
    split: Split,
    *,
    check_deeper: bool = False,
) -> Files:
    """Return the images below a folder, with notes about them.  check_deeper: refuse splits further down."""
    listing = Listing(root, held_out, say)
    paths = sorted(listing)
    left_out = listing.left_out()
    if not paths:
        other_files = f"not taken: {left_out}" if left_out else "found no files"
        raise MissingInput(
            f"no images below {shown(root)}: expected {', '.join(EXTENSIONS)}; {other_files}: "
            f"{_hint(root, set(listing.skipped))}check {flag}"
        )
    notes: list[str] = []
    if left_out:
        notes.append(f"{split} images, not taken: {left_out}" if split == "test" else f"not taken: {left_out}")
    if check_deeper and (deeper := splits.refuse_deeper(root, listing.folders)):
        notes.append(deeper)
    side, paged = sides.suitable(paths)
    if paged:
        notes.append(sides.pages_note(shown(paged)))
    facts = Facts(num_samples=len(paths), size=side)
    source = Files(name=shown(root), facts=facts, paths=paths, root=listing.root, notes=tuple(notes))
    return _labeled(source, listing, classes)


def _labeled(source: Files, listing: Listing, classes: Sequence[str] | None) -> Files:
    """Return the source with its class folders as labels, if all images lie in such folders."""
    start = len(source.root)
    tops = [
        path[start : path.rfind("/")].partition("/")[0] for path in source.paths
    ]  # "" for images directly in the root
    if loose := tops.count(""):
        first = shown(source.paths[tops.index("")][start:])
        beside = f"{loose:,} images such as {first} lie" if loose > 1 else f"{first} lies"
        why = "no class folders" if loose == len(tops) else f"{beside} beside the folders"
        return replace(source, unlabeled=why)
    names = sorted(set(tops))
    printable = {name: shown(name, limit=len(name) * 10) for name in names}
    number = {name: i for i, name in enumerate(classes or printable.values())}
    known = {name: number.get(printable[name], -1) for name in names}
    labels = np.array([known[top] for top in tops], dtype=np.int64)
    source = replace(
        source,
        facts=replace(source.facts, labels=labels, classes=tuple(number)),
        notes=(*source.notes, *_class_notes(listing, names, len(tops))),
    )
    unknown = [shown(name) for name in names if known[name] < 0]
    return without_unknown(source, unknown) if unknown else source


def _class_notes(listing: Listing, names: Sequence[str], num_images: int) -> list[str]:
    """Return notes about surprising properties of the class folders."""
    notes: list[str] = []
    filled = set(names)
    filled |= {run.partition("/")[0] for run in listing.runs}
    if empty := sorted(f for f in listing.folders if f.count("/") == 1 and f[:-1] not in filled):
        notes.append(f"not a class, since it holds no image: {shown(empty[0])}" + and_more(len(empty) - 1))
    if 1 < len(names) == num_images:
        notes.append("each class has only one image: the probes will ignore the classes")
    if len(names) == 1 and any(f.count("/") == 2 for f in listing.folders):
        notes.append(
            f"all images lie in {shown(names[0])}/, so there is one class: give {shown(listing.root + names[0])} to "
            "have the folders in it as classes"
        )
    return notes


def _checked(path: Path, flag: str) -> Path:
    """Return the folder with ~ expanded.  Raises MissingInput or DataError, naming what the path is instead."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise MissingInput(f"{flag} {shown(path)} is an address, not a folder: download the images, give their folder")
    folder = expanded(path)
    try:
        if stat.S_ISDIR(os.stat(folder).st_mode):
            return folder
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(folder):
            link = shown(os.readlink(folder))
            raise MissingInput(f"{flag} {shown(folder)} is a link to {link}, which does not exist") from None
        nearest = shown(next((p for p in folder.parents if os.path.isdir(p)), Path("/")))
        raise MissingInput(
            f"data folder {shown(folder)} does not exist (nearest existing folder: {nearest}): check {flag}"
        ) from None
    except (OSError, ValueError) as error:  # no permission, a path that is too long or holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise MissingInput(f"data folder {shown(folder)} cannot be read ({reason}): check {flag}") from error
    suffix = folder.suffix.lower()
    what, advice = "a file", "give the folder of your images"
    if suffix in _ARCHIVES:
        what, advice = "an archive", "unpack it and give the folder of the images"
        advice = f"--source.name tar reads it, or {advice}" if suffix == ".tar" else advice
    elif suffix in _READ_BY:
        what, advice = f"a {suffix} file", f"--source.name {_READ_BY[suffix]} reads it"
    elif suffix in _TABLES:
        what, advice = "a table", "give the folder of the images themselves, or save it as .csv for --source.name list"
    elif suffix in EXTENSIONS:
        what, advice = "one image", "give the folder that holds your images"
    raise DataError(f"{flag} {shown(folder)} is {what}, not a folder: {advice}")


def _hint(root: Path, suffixes: set[str]) -> str:
    """Return advice for a folder that holds a data set of torchvision or files with these suffixes instead."""
    name = next((name for folder, name in _DATA_SETS.items() if (root / folder).is_dir()), "")
    if name:
        return f"it holds {name}, which --source.name {name} reads; "
    if ".tar" in suffixes:
        return "--source.name tar reads its .tar shards; "
    if kind := next((suffix for suffix in (".parquet", ".arrow", ".npz", ".npy", ".h5") if suffix in suffixes), ""):
        return f"--source.name {_READ_BY[kind]} reads its {kind} files; "
    if suffixes & set(_VIDEOS):
        return "videos are not read: write their frames as images first (ffmpeg -i VIDEO -r 1 FRAMES/%06d.jpg); "
    if suffixes & set(_ARCHIVES):
        return "archives are not read: unpack them first; "
    if suffixes & set(_TABLES):
        return "give the folder of the images themselves, or a list of their paths with --source.name list; "
    return ""
