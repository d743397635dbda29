"""Which folders below a data root are the training split and which are held out, by their usual names.

A guess is made only where nothing is lost by it and no held-out image is trained on; else ``--data.splits`` decides.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.data.listing import has_images, loose_image, subfolders
from sslx.errors import ConfigError
from sslx.words import shown

Kind = Literal["train", "test", "val"]
KINDS: tuple[Kind, ...] = ("train", "test", "val")
Choice = Literal["auto", "folders", "none"]
_FILLER = r"(?:set|split|data|images?|imgs?|\d{1,4})"
_NAMED = re.compile(
    rf"(?:{_FILLER}[-_ ])?"  # images_val
    r"(?:(?P<train>train(?:[-_ ]?val)?|training)|(?P<test>test|testing)"
    r"|(?P<val>val|valid|validation|dev|development|eval|evaluation|holdout|held[-_ ]?out))"
    rf"(?:[-_ ]?{_FILLER})*",  # train2017, test_set
    re.IGNORECASE,
)


def kind_of(name: str) -> Kind | None:
    """Which split a folder of this name usually is: Train, train2017, test_set, valid, ...; None for no split."""
    match = _NAMED.fullmatch(name)
    return next((kind for kind in KINDS if match[kind]), None) if match else None


@dataclass(frozen=True)
class Layout:
    """Where the splits are.

    train: the folder to train on.  held_out: folders that are not trained on.  test: those among them that probes may
    use, the best one first.  notes: what a user should know of it, a line each.
    """

    train: Path
    held_out: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def find(root: Path, choice: Choice = "auto", test_root: Path | None = None) -> Layout:
    """The splits below ``root``.

    choice: ``auto`` guesses where it is safe; ``folders`` takes what is named like a split as one, whatever lies beside
    it; ``none`` trains on all.  test_root: a test split that was named; it is never trained on, wherever it lies.
    Raises ConfigError, naming the flag, where only the user can tell.
    """
    others = () if test_root is None else (test_root,)
    layout = Layout(root, others, others) if choice == "none" else _by_name(root, choice, others)
    for folder in others:
        train, test = os.path.realpath(layout.train), os.path.realpath(folder)
        if f"{train}/".startswith(f"{test}/"):
            raise ConfigError(
                f"--data.test-root {shown(folder)} holds the training images too ({shown(layout.train)}): "
                "give a folder of other images, or none"
            )
    return layout


def _by_name(root: Path, choice: Choice, others: tuple[Path, ...]) -> Layout:
    base, trains, named = _base(root)
    held_out = [folder for folder in named if not any(os.path.samefile(folder, train) for train in trains)]
    if not trains and not held_out:
        return Layout(root, others, others)
    test = (*others, *sorted(held_out, key=lambda folder: (bool(loose_image(folder)), kind_of(folder.name) != "test")))
    beside = _beside(base, {*trains, *named, *others})
    if len(trains) > 1:
        raise ConfigError(
            f"{_names(trains)} in {shown(base)} both look like the training split: give one as --data.root, or take "
            "--data.splits none to train on everything"
        )
    if trains and beside and choice == "auto":
        raise ConfigError(
            f"{shown(base)} holds {_names(trains)}, and beside it {beside}: take --data.splits folders to train on "
            f"{_names(trains)} alone, or --data.splits none where every folder is a class to train on"
        )
    if not trains and not beside:
        raise ConfigError(
            f"all images below {shown(base)} lie in {_names(held_out)}, which looks held out: take --data.splits none "
            "to train on them"
        )
    train = trains[0] if trains else base
    notes = [f"held out, not trained on: {_names(held_out)} in {shown(base)}"] if held_out else []
    if len(held_out) < len(named):
        notes += [f"no test split, but the training images by another name: {_names(set(named) - set(held_out))}"]
    if trains and beside:
        notes += [f"not trained on: {beside}, beside {_names(trains)} (--data.splits folders)"]
    return Layout(train, (*others, *held_out), test, tuple(notes))


def _base(root: Path) -> tuple[Path, list[Path], list[Path]]:
    """The folder that holds the splits, and those: the root, or the only folder with images down from it."""
    base = root
    while True:
        folders = subfolders(base)
        named = [(kind_of(folder.name), folder) for folder in folders]
        splits = [(kind, folder) for kind, folder in named if kind and has_images(folder)]
        if splits:
            trains = [folder for kind, folder in splits if kind == "train"]
            return base, trains, [folder for kind, folder in splits if kind != "train"]
        only = _first_two(folders) if not loose_image(base) else []
        if len(only) != 1:
            return root, [], []
        base = only[0]


def _first_two(folders: Collection[Path]) -> list[Path]:
    """The first two with images: to look into all would be to list them all."""
    filled = (folder for folder in folders if has_images(folder))
    return [folder for folder, _ in zip(filled, range(2), strict=False)]


def _beside(base: Path, known: Collection[Path]) -> str:
    """What else holds images, in words; "" for nothing."""
    filled = _first_two([folder for folder in subfolders(base) if folder not in known])
    words = [f"images in {_names(filled)}"] if filled else []
    if image := loose_image(base):
        words.append(f"images such as {shown(image)}")
    return " and ".join(words)


def refuse_deeper(root: Path, folders: Collection[str]) -> str:
    """Raise ConfigError where a folder further down holds a training and a held-out split.

    folders: all below the root, relative, with a slash at their end.  Returns a line on those that are named like
    held-out images without a training split beside them, "" where there are none.
    """
    kinds = {path: kind for path in map(Path, folders) if (kind := kind_of(path.name))}
    held_out = [path for path, kind in kinds.items() if kind != "train" and has_images(root / path)]
    for path in held_out:
        if any(kind == "train" and other.parent == path.parent for other, kind in kinds.items()):
            raise ConfigError(
                f"{shown(path)} in {shown(root)} looks held out, beside a training split: give "
                f"{shown(root / path.parent)} as --data.root, or take --data.splits none to train on all of it"
            )
    more = f" and {len(held_out) - 1:,} more" if len(held_out) > 1 else ""
    return f"trained on, although named like held-out images: {shown(held_out[0])}{more}" if held_out else ""


def _names(folders: Collection[Path]) -> str:
    return " and ".join(f"{shown(folder.name)}/" for folder in folders)
