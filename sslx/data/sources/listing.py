"""List the image files below a folder and summarize the other files there.

The walk follows links but reads no folder twice.  It leaves out hidden files, folders of other programs (thumbnails,
recycle bins), and the run folders of sslx itself, whose pictures are not data.  The listing of a large folder is kept
and used again until a folder changes (``listing_cache``).
"""

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sslx.console.words import shown

if TYPE_CHECKING:
    from sslx.data.sources.paths import Paths

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".heic",
    ".heif", ".dcm",
)  # fmt: skip
_OTHER_IMAGES = (".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw")
_SYSTEM = ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
_RUN_FILES = {"config.json", "run_id", "status.json"}
"""A run folder of sslx holds config.json and at least one of the others."""
_FIRST_MESSAGE_S, _NEXT_MESSAGE_S = 1.0, 3.0
_MAX_KINDS_SHOWN = 6
Stamp = tuple[int, int, int]


def silent(_: str) -> None:
    """Say nothing."""


def stamp_of(folder: str) -> Stamp | None:
    """Return what differs once a folder's entries have changed: its inode and times; None if it cannot be asked."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


class Listing:
    """The images below ``root``, found during iteration or by ``paths``, which also fill ``skipped``.

    held_out: folders whose images are left out, even if links lead there.  say: takes lines about the progress of the
    walk, the first one after a second.  skipped: reason -> (number of entries, an example).
    """

    def __init__(self, root: Path, held_out: Collection[Path] = (), say: Callable[[str], None] = silent) -> None:
        self.root, self._say = os.path.join(root, ""), say
        self._held_out = tuple(os.path.realpath(folder) for folder in held_out)
        self.skipped: dict[str, tuple[int, str]] = {}
        self.folders: list[str] = []
        """All folders that were read, relative to the root, with a slash at the end; "" is the root."""
        self.runs: list[str] = []
        """The run folders of sslx among them."""
        self._num_entries = 0
        self._stamps: dict[str, Stamp | None] = {}

    def __iter__(self) -> Iterator[str]:
        """Yield the paths of images in arbitrary order, each beginning with ``root``."""
        return (self.root + name for name in self._names())

    def paths(self) -> "Paths":
        """Return the sorted paths of all images."""
        from sslx.data.sources import listing_cache  # imports numpy, which splits and flags do without
        from sslx.data.sources.packed import Packed
        from sslx.data.sources.paths import Paths

        options = [*EXTENSIONS, *self._held_out]
        if kept := listing_cache.load("images", self.root, options):
            (self.skipped, self.folders, self.runs), names = kept
            return Paths((self.root,), names)
        began_ns = time.time_ns()
        names = Packed.of(map(os.fsencode, sorted(self._names())))
        if self._num_entries >= listing_cache.MIN_ENTRIES:
            about = self.skipped, self.folders, self.runs
            listing_cache.keep("images", self.root, options, self._stamps, began_ns, about=about, names=names)
        return Paths((self.root,), names)

    def _names(self) -> Iterator[str]:
        """Yield the paths of images below the root, in arbitrary order."""
        seen: set[str] = set()
        stack = [("", os.path.realpath(self.root))]  # a folder relative to the root, and its real path
        num, started = 0, time.monotonic()
        next_message = started + _FIRST_MESSAGE_S
        while stack:
            below, real = stack.pop()
            if real in seen:  # a link back up would never end
                self._skip("folders already read under another name", below)
                continue
            if self._is_held_out(real):
                continue
            seen.add(real)
            self.folders.append(below)
            images, inner = self._read(below, real)
            yield from images
            stack += inner
            num += len(images)
            if time.monotonic() > next_message:
                next_message = time.monotonic() + _NEXT_MESSAGE_S
                self._say(f"listing {shown(self.root)}: {num:,} images so far")

    def subfolders_and_image(self) -> tuple[list[str], str]:
        """Return the sorted names of the root's subfolders, and the first name of an image directly in it or ""."""
        from sslx.data.sources import listing_cache  # imports numpy, which splits and flags do without

        if kept := listing_cache.load("folder", self.root, EXTENSIONS):
            folders, image = kept[0]
            return folders, image
        began_ns = time.time_ns()
        images, inner = self._read("", os.path.realpath(self.root))
        folders, image = [below[:-1] for below, _ in reversed(inner)], min(images, default="")
        if self._num_entries >= listing_cache.MIN_ENTRIES:
            listing_cache.keep("folder", self.root, EXTENSIONS, self._stamps, began_ns, about=(folders, image))
        return folders, image

    def _read(self, below: str, real: str) -> tuple[list[str], list[tuple[str, str]]]:
        """Return the images directly in a folder and its subfolders in reverse order, both relative to the root."""
        folder = self.root + below
        self._stamps[folder] = stamp_of(folder)
        images: list[str] = []
        inner: list[tuple[str, str]] = []
        skipped: list[tuple[str, str]] = []
        run_files: set[str] = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    self._num_entries += 1
                    if name[0] == ".":
                        skipped.append(("hidden", name))
                    elif _is_folder(entry):
                        if name.lower() in _SYSTEM:
                            skipped.append(("folders of other programs", name))
                        else:
                            real_path = (
                                os.path.realpath(entry.path) if entry.is_symlink() else f"{real.rstrip('/')}/{name}"
                            )
                            inner.append((f"{below}{name}/", real_path))
                    elif not name.lower().endswith(EXTENSIONS):
                        skipped.append((os.path.splitext(name)[1].lower() or "without a suffix", name))
                        run_files |= {name} & _RUN_FILES
                    elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                        images.append(below + name)
                    else:  # for example a pipe, which would block on opening
                        skipped.append(("not regular files", name))
        except OSError as error:
            self._stamps[folder] = None  # perhaps it can be read the next time
            self._skip(f"folders that cannot be read ({error.strerror})", below or ".")
            return [], []
        if "config.json" in run_files and len(run_files) > 1:
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
        """Return one line about the skipped entries, unsupported image files first; "" if nothing was skipped."""
        order = sorted(self.skipped, key=lambda reason: (reason not in _OTHER_IMAGES, -self.skipped[reason][0], reason))
        parts: list[str] = []
        for reason in order[:_MAX_KINDS_SHOWN]:
            count, example = self.skipped[reason]
            parts.append(f"{reason}: {count:,} ({'such as ' if count > 1 else ''}{shown(example)})")
        num_others = sum(self.skipped[reason][0] for reason in order[_MAX_KINDS_SHOWN:])
        if num_others:
            parts.append(f"other kinds: {num_others:,}")
        return "; ".join(parts)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder without permission
        return False


def has_images(folder: Path) -> bool:
    """Return whether there is an image below the folder.  Usually its first few names are enough."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, 64) if not entry.is_dir()]
        if not (folder / "config.json").exists() and any(_is_image(name) for name in names):
            return True
    return next(iter(Listing(folder)), None) is not None


def subfolders_and_image(folder: Path) -> tuple[list[Path], str]:
    """Return a folder's sorted subfolders that may hold images, and the name of an image directly in it or ""."""
    names, image = Listing(folder).subfolders_and_image()
    return [folder / name for name in names], image


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(EXTENSIONS)
