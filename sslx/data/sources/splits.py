"""Find the training split and the held-out folders below a data root by their usual names.

The guess is made only if it loses no images and trains on no held-out image; otherwise ``--source.splits`` decides.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.console.words import shown
from sslx.data.sources.listing import has_images, subfolders_and_image
from sslx.errors import ConfigError

Kind = Literal["train", "test", "val"]
KINDS: tuple[Kind, ...] = ("train", "test", "val")
Choice = Literal["auto", "folders", "none"]
_FILLER = r"(?:set|split|data|images?|imgs?|\d{1,4})"
_WORDS = (
    r"(?:(?P<train>train(?:[-_ ]?val)?|training|trn)|(?P<test>test|testing|tst)"
    r"|(?P<val>val|valid|validation|dev|development|eval|evaluation|holdout|held[-_ ]?out))"
)
_SPLIT_NAME = re.compile(rf"(?:{_FILLER}[-_ ])?{_WORDS}(?:[-_ ]?{_FILLER})*", re.IGNORECASE)  # images_val, train2017
_PAIRED_NAME = re.compile(
    rf"(?:.*[-_. ])?{_WORDS}(?:[-_. ].*)?", re.IGNORECASE
)  # one of a pair, such as a_train and a_test

_AMBIGUOUS = ("valid", "dev", "development", "eval", "evaluation")  # without a training split beside it


def kind_of(name: str) -> Kind | None:
    """Return the split that a folder of this name (Train, train2017, test_set, valid, ...) usually is, or None."""
    return _kind(_SPLIT_NAME.fullmatch(name))


def kinds_of(names: Collection[str]) -> dict[str, Kind]:
    """Return the splits among neighboring folders, by their usual names or by pairs such as a_train and a_test."""
    kinds: dict[str, Kind] = {name: kind for name in names if (kind := kind_of(name))}
    pairs: dict[str, dict[str, Kind]] = {}
    for name in names:
        match = _PAIRED_NAME.fullmatch(name) if name not in kinds else None
        if match and (kind := _kind(match)):
            start, end = match.span(kind)
            pairs.setdefault(f"{name[:start]}/{name[end:]}".lower(), {})[name] = kind
    for pair in pairs.values():
        if "train" in pair.values() and len(set(pair.values())) > 1:
            kinds |= pair
    return kinds


def _kind(match: re.Match[str] | None) -> Kind | None:
    return next((kind for kind in KINDS if match[kind]), None) if match else None


@dataclass(frozen=True)
class Layout:
    """The locations of the splits.

    train: the folder to train on.  held_out: folders to leave out of training.  test: the held-out folders that probes
    may use, the best one first.  notes: lines that a user should know.
    """

    train: Path
    held_out: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def find(root: Path, choice: Choice = "auto", test_root: Path | None = None) -> Layout:
    """Return the splits below ``root``.

    choice: ``auto`` guesses if it is safe; ``folders`` takes every folder named like a split as one, whatever lies
    beside it; ``none`` trains on all images.  test_root: the user's test split, which is never trained on, wherever it
    lies.  Raises ConfigError, naming the flag, if only the user can decide.
    """
    others = () if test_root is None else (test_root,)
    layout = Layout(root, others, others) if choice == "none" else _by_name(root, choice, others)
    for folder in others:
        train, test = os.path.realpath(layout.train), os.path.realpath(folder)
        if f"{train}/".startswith(f"{test}/"):
            raise ConfigError(
                f"--source.test-root {shown(folder)} holds the training images too ({shown(layout.train)}): "
                "give a folder of other images, or leave the flag out"
            )
    return layout


def _by_name(root: Path, choice: Choice, others: tuple[Path, ...]) -> Layout:
    base, trains, named, beside = _base(root, others)
    held_out = [folder for folder in named if not any(os.path.samefile(folder, train) for train in trains)]
    if not trains and not held_out:
        return Layout(root, others, others)
    if len(trains) > 1:
        raise ConfigError(
            f"{_names(trains)} in {shown(base)} both look like the training split: give one as --source.root, or take "
            "--source.splits none to train on everything"
        )
    if trains and beside and choice == "auto":
        raise ConfigError(
            f"{shown(base)} holds {_names(trains)}, and beside it {beside}: take --source.splits folders to train on "
            f"{_names(trains)} alone, or --source.splits none where every folder is a class to train on"
        )
    if not trains and choice == "auto":
        _check_ambiguous(base, held_out)
    if not trains and not beside:
        raise ConfigError(
            f"all images below {shown(base)} lie in {_names(held_out)}, which looks held out: take "
            "--source.splits none to train on them"
        )
    notes = [f"held out, not trained on: {_names(held_out)} in {shown(base)}"] if held_out else []
    if len(held_out) < len(named):
        notes += [f"not a test split, but the training images under another name: {_names(set(named) - set(held_out))}"]
    if trains and beside:
        notes += [f"not trained on: {beside}, beside {_names(trains)} (--source.splits folders)"]
    return Layout(trains[0] if trains else base, (*others, *held_out), (*others, *held_out), tuple(notes))


def _check_ambiguous(base: Path, held_out: Collection[Path]) -> None:
    """Raise ConfigError if a held-out folder may be a class, such as valid beside invalid."""
    classes = {folder.name for folder in subfolders_and_image(base)[0]}
    for folder in held_out:
        if folder.name.lower() in _AMBIGUOUS and not classes & {
            inner.name for inner in subfolders_and_image(folder)[0]
        }:
            raise ConfigError(
                f"{_names([folder])} in {shown(base)} may be held out or a class: take --source.splits folders to hold "
                "it out, or --source.splits none to train on it"
            )


def _base(root: Path, others: Collection[Path]) -> tuple[Path, list[Path], list[Path], str]:
    """Return the folder with the splits, its training splits, its held-out folders, and a description of the rest.

    The folder is the root or, if there is a chain of only folders with images apart from ``others``, the first one down
    the chain that holds splits.  The best held-out folder for probes comes first.
    """
    base, known = root, {os.path.realpath(folder) for folder in others}
    while True:
        folders, loose = subfolders_and_image(base)
        kinds = kinds_of([folder.name for folder in folders])
        splits = [folder for folder in folders if folder.name in kinds and has_images(folder)]
        rest = [folder for folder in folders if folder not in splits and os.path.realpath(folder) not in known]
        filled = _first_two(rest) if splits or not loose else []
        if splits:
            trains = [folder for folder in splits if kinds[folder.name] == "train"]
            held_out = [folder for folder in splits if folder not in trains]
            held_out.sort(
                key=lambda folder: (bool(subfolders_and_image(folder)[1]), kinds[folder.name] != "test")
            )  # labeled ones first
            beside: list[str] = []
            if filled:
                beside.append(f"images in {_names(filled)}")
            if loose:
                beside.append(f"images such as {shown(loose)}")
            return base, trains, held_out, " and ".join(beside)
        if loose or len(filled) != 1:
            return root, [], [], ""
        base = filled[0]


def _first_two(folders: Collection[Path]) -> list[Path]:
    """Return the first two folders with images.  Checking all folders would list them all."""
    filled = (folder for folder in folders if has_images(folder))
    return [folder for folder, _ in zip(filled, range(2), strict=False)]


def refuse_deeper(root: Path, folders: Collection[str]) -> str:
    """Raise ConfigError if a folder further down holds a training and a held-out split.

    folders: all folders below the root, relative to it, with a slash at the end.  Returns a line about folders that are
    named like held-out images without a training split beside them, or "".
    """
    inside: dict[str, list[str]] = {}
    for folder in folders:
        parent, _, name = folder.rstrip("/").rpartition("/")
        inside.setdefault(parent, []).append(name)
    held_out: list[str] = []
    for parent, names in inside.items():
        kinds = kinds_of(names)
        named = [os.path.join(parent, name) for name in names if kinds.get(name, "train") != "train"]
        filled = [folder for folder in named if has_images(root / folder)]
        if filled and "train" in kinds.values():
            raise ConfigError(
                f"{shown(filled[0])} in {shown(root)} looks held out, beside a training split: give "
                f"{shown(root / parent)} as --source.root, or take --source.splits none to train on all of it"
            )
        held_out += filled
    more = f" and {len(held_out) - 1:,} more" if len(held_out) > 1 else ""
    return f"trained on, although named like held-out images: {shown(held_out[0])}{more}" if held_out else ""


def _names(folders: Collection[Path]) -> str:
    return " and ".join(f"{shown(folder.name)}/" for folder in folders)
