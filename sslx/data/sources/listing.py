"""The image files below a folder, and a word on everything else that lies there.

The walk follows links, but reads no folder twice; it leaves out what is hidden, what other programs keep there
(thumbnails, recycle bins), and the run folders of sslx itself, whose pictures are no data.
"""

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from sslx.console.words import shown

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
_OTHER_IMAGES = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw")
_SYSTEM = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
_RUN_FILES = {"config.json", "run_id", "status.json"}
"""The first and one of the others: a run folder of sslx."""
_FIRST_WORD_S, _NEXT_WORD_S = 1.0, 3.0
_KINDS_TOLD = 6


def silent(_: str) -> None:
    """Say nothing."""


class Listing:
    """The images below ``root``, found as it is iterated over; ``skipped`` fills up meanwhile.

    held_out: folders whose images are left out, however a link may lead there.  say: gets a line on how far the walk
    has come, the first one after a second.  skipped: reason -> (how many, an example).
    """

    def __init__(self, root: Path, held_out: Collection[Path] = (), say: Callable[[str], None] = silent) -> None:
        self.root, self._say = os.path.join(root, ""), say
        self._held_out = tuple(os.path.realpath(folder) for folder in held_out)
        self.skipped: dict[str, tuple[int, str]] = {}
        self.folders: list[str] = []
        """All folders that were read, relative to the root, with a slash at their end but for the root: ""."""
        self.runs: list[str] = []
        """Those among them that are run folders of sslx."""

    def __iter__(self) -> Iterator[str]:
        """Paths of images, in no order to rely on, each beginning with ``root``."""
        seen: set[str] = set()
        stack = [("", os.path.realpath(self.root))]  # a folder below the root, and where it really is
        num, started = 0, time.monotonic()
        next_word = started + _FIRST_WORD_S
        while stack:
            below, real = stack.pop()
            if real in seen:  # a link back up would never end
                self._skip("folders read already, under another name", below)
                continue
            if self._is_held_out(real):
                continue
            seen.add(real)
            self.folders.append(below)
            images, inner = self._read(below, real)
            yield from images
            stack += inner
            num += len(images)
            if time.monotonic() > next_word:
                next_word = time.monotonic() + _NEXT_WORD_S
                self._say(f"listing {shown(self.root)}: {num:,} images so far")

    def read_one(self) -> tuple[list[str], list[tuple[str, str]]]:
        """The images right in the root, and its subfolders, the last one by name first."""
        return self._read("", os.path.realpath(self.root))

    def _read(self, below: str, real: str) -> tuple[list[str], list[tuple[str, str]]]:
        """The images right in a folder, and its subfolders, the last one by name first."""
        folder = self.root + below
        images: list[str] = []
        inner: list[tuple[str, str]] = []
        skipped: list[tuple[str, str]] = []
        of_run: set[str] = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        skipped.append(("hidden", name))
                    elif _is_folder(entry):
                        if name.lower() in _SYSTEM:
                            skipped.append(("folders of other programs", name))
                        else:
                            there = os.path.realpath(entry.path) if entry.is_symlink() else f"{real.rstrip('/')}/{name}"
                            inner.append((f"{below}{name}/", there))
                    elif not name.lower().endswith(EXTENSIONS):
                        skipped.append((os.path.splitext(name)[1].lower() or "without a suffix", name))
                        of_run |= {name} & _RUN_FILES
                    elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                        images.append(folder + name)
                    else:  # a pipe: to open it takes for ever
                        skipped.append(("no regular files", name))
        except OSError as error:
            self._skip(f"folders that cannot be read ({error.strerror})", below or ".")
            return [], []
        if "config.json" in of_run and len(of_run) > 1:
            self._skip("run folders of sslx", below or ".")
            self.runs.append(below)
            return [], []
        for reason, name in skipped:
            self._skip(reason, below + name)
        inner.sort(reverse=True)
        return images, inner

    def _is_held_out(self, real: str) -> bool:
        return any(real == folder or real.startswith(folder + "/") for folder in self._held_out)

    def _skip(self, reason: str, example: str) -> None:
        count, first = self.skipped.get(reason, (0, example))
        self.skipped[reason] = count + 1, min(first, example)

    def left_out(self) -> str:
        """One line on what is below the root and was not taken, image files of other kinds first; "" for nothing."""
        order = sorted(self.skipped, key=lambda reason: (reason not in _OTHER_IMAGES, -self.skipped[reason][0], reason))
        words: list[str] = []
        for reason in order[:_KINDS_TOLD]:
            count, example = self.skipped[reason]
            words.append(f"{reason}: {count:,} ({'such as ' if count > 1 else ''}{shown(example)})")
        rest = sum(self.skipped[reason][0] for reason in order[_KINDS_TOLD:])
        return "; ".join([*words, *[f"of other kinds: {rest:,}"] * (rest > 0)])


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or through a folder that may not be entered
        return False


def has_images(folder: Path) -> bool:
    """Whether there is an image below the folder; mostly the first few names in it tell."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, 64) if not entry.is_dir()]
        if not (folder / "config.json").exists() and any(_is_image(name) for name in names):
            return True
    return next(iter(Listing(folder)), None) is not None


def look(folder: Path) -> tuple[list[Path], str]:
    """The folders right in a folder, sorted, that may hold images, and the name of an image right in it, or ""."""
    images, inner = Listing(folder).read_one()
    return [folder / below for below, _ in reversed(inner)], os.path.basename(min(images, default=""))


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(EXTENSIONS)
