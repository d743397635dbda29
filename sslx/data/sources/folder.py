"""A user's own images: files below a folder, with its subfolders as classes."""

import itertools
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from sslx.console import activity
from sslx.console.words import shown
from sslx.data.facts import Facts, Share
from sslx.data.sources import sides, splits
from sslx.data.sources.base import Context, Files
from sslx.data.sources.config import SourceConfig, Split, is_address
from sslx.data.sources.labels import and_more, without_unknown
from sslx.data.sources.listing import EXTENSIONS, Listing, subfolders_and_image
from sslx.data.sources.paths import Paths
from sslx.data.sources.splits import Choice, Layout
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine.files import expanded

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_MAX_WEIGHT = 1000
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
    root: Path | tuple[Path, ...] | None = None
    """Folder with your images, or several folders, whose classes are merged by name."""
    weights: tuple[float, ...] = ()
    """For each folder, how often its images are seen in an epoch, such as 1 2 0.5.  Default: each image once."""
    test_root: Path | None = None
    """Folder with the test images.  Default: a subfolder of the root named test, val or similar."""
    splits: Choice = "auto"
    """Take subfolders named train, test, val, ... as splits: if that is safe (auto), always (folders), never (none)."""

    def __post_init__(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.roots):
            raise ConfigError(
                "--source.weights needs one number for each folder of --source.root: "
                f"{len(self.roots)}, not {len(self.weights)}"
            )
        if not all(0 < weight <= _MAX_WEIGHT for weight in self.weights):
            raise ConfigError(
                f"--source.weights must be above 0 and at most {_MAX_WEIGHT}, not {' '.join(map(str, self.weights))}"
            )

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders."""
        return self.root if isinstance(self.root, tuple) else () if self.root is None else (self.root,)

    def build(self, split: Split, context: "Context") -> "Files":
        with activity.doing("listing the images"):
            return context.call(
                f"the list of the images below {shown(', '.join(map(str, self.roots)))}",
                lambda say: _read(self, split, say, context.classes),
            )


def _read(config: Config, split: Split, say: Callable[[str], None], classes: Sequence[str] | None) -> Files:
    """Return the image files below the folders.  If all lie in subfolders, the first level of these are the classes."""
    if not config.roots:
        raise ConfigError("--source.name folder needs --source.root FOLDER, the folder of your images")
    roots = [_checked(root, "--source.root") for root in config.roots]
    _check_apart(roots)
    test_root = None if config.test_root is None else _checked(config.test_root, "--source.test-root")
    layouts = [splits.find(root, config.splits, test_root) for root in roots]
    if split == "test":
        if test_root is not None:
            return _listed(test_root, "--source.test-root", (), say, classes, split)
        tests = [layout.test[0] for layout in layouts if layout.test]
        if not tests:
            why = _why_no_test(roots[0], config)
            raise MissingInput(f"no test images: {why}: give the folder with --source.test-root")
        if len(tests) == 1:
            return _listed(tests[0], "--source.root", (), say, classes, split)
        return _joined([_listed(test, "--source.root", (), say, None, split) for test in tests], classes)
    parts = [_training(config, layout, say, classes if len(roots) == 1 else None, split) for layout in layouts]
    return _weighted(parts[0] if len(parts) == 1 else _joined(parts, classes), parts, config.weights)


def _training(
    config: Config, layout: Layout, say: Callable[[str], None], classes: Sequence[str] | None, split: Split
) -> Files:
    """Return the training images of one folder, with notes about its splits."""
    source = _listed(
        layout.train, "--source.root", layout.held_out, say, classes, split, check_deeper=config.splits != "none"
    )
    return replace(source, notes=(*layout.notes, *source.notes))


def _check_apart(roots: Sequence[Path]) -> None:
    """Raise ConfigError if a folder lies inside another one: its images would be seen twice."""
    for (outer, outside), (inner, inside) in itertools.permutations([(f, os.path.realpath(f)) for f in roots], 2):
        if os.path.join(inside, "").startswith(os.path.join(outside, "")):
            raise ConfigError(
                f"--source.root names images twice, since {shown(inner)} is part of {shown(outer)}: name each folder "
                "once; --source.weights says how often its images are seen"
            )


def _joined(parts: Sequence[Files], classes: Sequence[str] | None) -> Files:
    """Return the images of several folders as one source, with their classes merged by name.

    classes: those of the training images, for test images.
    """
    paths = Paths.joined([part.packed for part in parts])
    notes = tuple(f"{part.name}: {note}" for part in parts for note in part.notes)
    side, _ = sides.suitable(paths)
    facts = Facts(num_samples=len(paths), size=side)
    source = Files(name=", ".join(part.name for part in parts), facts=facts, paths=paths, notes=notes)
    if unlabeled := next((part for part in parts if part.facts.labels is None), None):
        return replace(source, unlabeled=f"{unlabeled.unlabeled} in {unlabeled.name}")
    names = sorted({name for part in parts for name in part.facts.classes or ()})
    number = {name: i for i, name in enumerate(classes or names)}
    labels = np.concatenate(
        [np.array([number.get(name, -1) for name in part.facts.classes or ()])[part.facts.labels] for part in parts]
    )
    source = replace(source, facts=replace(facts, labels=labels, classes=tuple(number)))
    unknown = [name for name in names if name not in number]
    return without_unknown(source, unknown) if unknown else source


def _weighted(source: Files, parts: Sequence[Files], weights: Sequence[float]) -> Files:
    """Return the source with the weights of its folders, and lines about them."""
    if all(weight == 1 for weight in weights):
        return source
    shares = tuple(Share(num_samples=len(part), weight=weight) for part, weight in zip(parts, weights, strict=True))
    total = sum(share.num_per_epoch for share in shares)
    lines = [
        f"of weight {share.weight:g}: {part.name}, {share.num_per_epoch / total:.1%} of an epoch's {total:,} images"
        for part, share in zip(parts, shares, strict=True)
    ]
    return replace(source, facts=replace(source.facts, shares=shares), notes=(*lines, *source.notes))


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
    paths = listing.paths()
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
    seen: dict[bytes, int] = {}  # the first folder of a path, or b"" for images directly in the root
    tops = np.empty(len(source), dtype=np.int64)
    start = 0
    for part in source.packed.below_roots():
        halves = [name.partition(b"/") for name in part]
        numbers = [seen.setdefault(folder if slash else b"", len(seen)) for folder, slash, _ in halves]
        tops[start : start + len(part)] = numbers
        start += len(part)
    if loose := int((tops == seen.get(b"", -1)).sum()):
        first = shown(source.paths[int((tops == seen[b""]).argmax())][len(listing.root) :])
        beside = f"{loose:,} images such as {first} lie" if loose > 1 else f"{first} lies"
        why = "no class folders" if loose == len(tops) else f"{beside} beside the folders"
        return replace(source, unlabeled=why)
    folders = list(map(os.fsdecode, seen))
    names = sorted(folders)
    printable = {name: shown(name, limit=len(name) * 10) for name in names}
    number = {name: i for i, name in enumerate(classes or printable.values())}
    known = {name: number.get(printable[name], -1) for name in names}
    labels = np.array([known[folder] for folder in folders], dtype=np.int64)[tops]
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
    if is_address(path):
        raise MissingInput(
            f"{flag} {shown(path)} is an address, not a folder: download the images and give their folder, or keep "
            "them in tar shards, which --source.name tar reads from there"
        )
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
