"""The manifest of a checkpoint: the size and SHA-256 of each file, written last, and files opened once they match it.

The digests are needed: torch.load takes a file with a flipped bit without complaint and returns wrong weights.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sslx.console.words import one_line
from sslx.errors import DataError
from sslx.machine import files

FORMAT = 2
"""Of the files beside the manifest.  1: a single ``state.pt`` (sslx 0.1), which is still read."""
NAME = "manifest.json"
FOLDER = re.compile(r"step_(0|[1-9]\d*)(\.old)?")
"""The names of checkpoint folders; ``.old`` is one that its successor is about to replace."""


class _Digest:
    """A file to write to that hashes what passes: the digest is of what was meant, not of what is on disk."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.sha256.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(folder: Path, step: int, writers: Mapping[str, Callable[[Any], None]]) -> None:
    """Write each file by its writer, which gets a binary file, then the manifest, all synchronized to the disk."""
    entries: dict[str, dict[str, int | str]] = {}
    for name, writer in writers.items():
        with open(folder / name, "wb") as file:
            digest = _Digest(file)
            writer(digest)
            file.flush()
            os.fsync(file.fileno())
        entries[name] = {"bytes": digest.num_bytes, "sha256": digest.sha256.hexdigest()}
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, "files": entries}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    synchronize(folder)


def opened(folder: Path, stack: ExitStack, choose: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, BinaryIO]:
    """The files that ``choose`` picks from the manifest's names, verified and open for reading at their start.

    The same open files are then read, so that what was verified is what is loaded; ``stack`` closes them.  DataError
    where the manifest or a file that was picked is missing or damaged.
    """
    name = NAME
    try:
        manifest = files.parse_json(files.read_bytes(folder / NAME))
        step, entries = manifest["step"], dict(manifest["files"].items())
        named = FOLDER.fullmatch(folder.name)
        if manifest["format"] not in (1, FORMAT):
            raise _Damage(f"format {manifest['format']}, this sslx reads 1 and {FORMAT}")
        if named and step != int(named[1]):
            raise _Damage(f"of step {step}")
        picked = {name: (entries[name]["bytes"], entries[name]["sha256"]) for name in choose(list(entries))}
        found: dict[str, BinaryIO] = {}
        for name, (num_bytes, sha256) in picked.items():
            if os.path.basename(name) != name:
                raise ValueError
            found[name] = file = stack.enter_context(open(folder / name, "rb", opener=files.without_waiting))
            size = os.fstat(file.fileno()).st_size
            if size != num_bytes:
                raise _Damage(f"{size} bytes instead of {num_bytes}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _Damage("SHA-256 differs")
            file.seek(0)
        return found
    except OSError as error:
        reason = error.strerror
    except _Damage as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "not as written"
    raise DataError(one_line(f"checkpoint {folder.name} is damaged ({name}: {reason})"))


class _Damage(Exception):
    """Why a file is not the one that was written."""


def verify(folder: Path) -> None:
    """Raise DataError unless every file of a checkpoint is as it was written."""
    with ExitStack() as stack:
        opened(folder, stack, lambda names: names)


def is_ours(folder: Path) -> bool:
    """Whether sslx wrote a ``step_N``: a real folder, with a manifest of that step, and with nothing else in it."""
    try:
        manifest = files.parse_json(files.read_bytes(folder / NAME))
        named = FOLDER.fullmatch(folder.name)
        return (
            named is not None
            and manifest["step"] == int(named[1])
            and not folder.is_symlink()
            and {path.name for path in folder.iterdir()} <= {*manifest["files"], NAME}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def synchronize(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no fsync of a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
