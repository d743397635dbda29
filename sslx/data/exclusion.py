"""Exclusion: a list of images on which a run does not train, while all others keep their places and draws."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslx.console.words import plural, shown
from sslx.data.sources import Source
from sslx.errors import ConfigError, MissingInput

Indices = npt.NDArray[np.int64]


def excluded(file: Path, source: Source) -> tuple[Indices, str]:
    """Return the sorted indices (K,) of a source's images that a list names, and a line about it.

    file: a text file with a path in each line, absolute, or relative to the working directory, to the list or to the
    source's root; for images that are no files, their names in messages.  Empty lines are passed over.
    Raises MissingInput if the list cannot be read, and ConfigError if it names no image of the source, or all of them.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise MissingInput(f"--data.exclude {shown(file)} cannot be read: {error.strerror}") from error
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    roots = ("", str(file.parent), *source.roots)
    spellings = {line: [*(_real(os.path.join(root, line)) for root in roots), line] for line in lines}
    wanted = {spelling for of_line in spellings.values() for spelling in of_line}
    places = {name: i for i in range(len(source)) if (name := _real(source.path(i))) in wanted}
    found, unknown = set[int](), list[str]()
    for line in lines:
        index = next((places[spelling] for spelling in spellings[line] if spelling in places), None)
        if index is None:
            unknown.append(line)
        else:
            found.add(index)
    if not found:
        first = f", such as {shown(unknown[0])}" if unknown else ""
        raise ConfigError(
            f"--data.exclude {shown(file)} names none of the {plural(len(source), 'image')} of {source.name}"
            f"{first}: expected a path like {shown(source.path(0))} in each line"
        )
    if len(found) == len(source):
        raise ConfigError(f"--data.exclude {shown(file)} names all {plural(len(source), 'image')} of {source.name}")
    line = f"excludes {plural(len(found), 'image')} of {len(source):,} by {shown(file)}"
    if unknown:
        line += f"; {plural(len(unknown), 'other line')} of it name no image here, the first {shown(unknown[0])}"
    return np.array(sorted(found), dtype=np.int64), line


def _real(path: str) -> str:
    """Return one spelling for all spellings of a path.  Links are not followed: a source may list both."""
    return os.path.abspath(path)
