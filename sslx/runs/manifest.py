"""The manifest of a checkpoint: each file's size and SHA-256, written last and verified before a file is read.

The digests are needed because torch.load reads a file with a flipped bit without complaint and returns wrong weights.
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
"""Format of the files beside the manifest.  Format 1, a single ``state.pt`` (sslx 0.1), can still be read."""
NAME = "manifest.json"
FOLDER = re.compile(r"step_(0|[1-9]\d*)(\.old)?")
"""Names of checkpoint folders.  ``.old`` marks one that its successor is about to replace."""


class _Digest:
    """A binary file that hashes what is written to it, so that the digest describes the intended bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self.sha256.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(folder: Path, step: int, writers: Mapping[str, Callable[[Any], None]]) -> None:
    """Write each file with its writer, which gets a binary file, then the manifest, and sync all of it to disk."""
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


def open_verified(
    folder: Path, stack: ExitStack, choose: Callable[[Sequence[str]], Sequence[str]]
) -> dict[str, BinaryIO]:
    """Verify the files that ``choose`` picks from the manifest's names, and open them for reading.

    The verified files are the ones that are read, because they stay open; ``stack`` closes them.  Raise DataError if
    the manifest or a picked file is missing or damaged.
    """
    name = NAME
    try:
        manifest = files.parse_json(files.read_bytes(folder / NAME))
        step, entries = manifest["step"], dict(manifest["files"].items())
        named = FOLDER.fullmatch(folder.name)
        if manifest["format"] not in (1, FORMAT):
            raise _Damage(f"format {manifest['format']}; this version of sslx reads formats 1 and {FORMAT}")
        if named and step != int(named[1]):
            raise _Damage(f"of step {step}")
        picked = {name: (entries[name]["bytes"], entries[name]["sha256"]) for name in choose(list(entries))}
        opened: dict[str, BinaryIO] = {}
        for name, (num_bytes, sha256) in picked.items():
            if os.path.basename(name) != name:
                raise ValueError
            opened[name] = file = stack.enter_context(open(folder / name, "rb", opener=files.without_waiting))
            size = os.fstat(file.fileno()).st_size
            if size != num_bytes:
                raise _Damage(f"{size} bytes instead of {num_bytes}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise _Damage("SHA-256 differs")
            file.seek(0)
        return opened
    except OSError as error:
        reason = error.strerror
    except _Damage as error:
        reason = str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "not as sslx wrote it"
    raise DataError(one_line(f"checkpoint {folder.name} is damaged ({name}: {reason})"))


class _Damage(Exception):
    """The reason why a file is not the one that was written."""


def verify(folder: Path) -> None:
    """Raise DataError unless every file of a checkpoint is as it was written."""
    with ExitStack() as stack:
        open_verified(folder, stack, lambda names: names)


def is_ours(folder: Path) -> bool:
    """Return whether sslx wrote a ``step_N``: a real folder with that step's manifest and no other files."""
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
    """Sync the directory entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot fsync a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
