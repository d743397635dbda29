"""Read the headers of a sample of images to find the suitable side of their views, and files with several pages."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from PIL import Image

from sslx.data.codecs import formats
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.sources.base import Coded

Sized = TypeVar("Sized", bound=Coded)

LARGEST = 224
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, LARGEST)
"""Sides that are divisible by the strides and patch sizes of encoders."""
_NUM_HEADERS = 64  # of files evenly spaced in the list


def suitable(paths: Sequence[str]) -> tuple[int, str]:
    """Return the largest usual side that four of five images have, and a file with several pages, or "".

    The result depends only on the files, so that all ranks agree.  Unreadable files are ignored; without any readable
    file the side is 224.
    """
    number = min(_NUM_HEADERS, len(paths))
    sample = [paths[place * len(paths) // number] for place in range(number)]
    headers = [_header(path) for path in sample]
    paged = next((path for path, (_, pages) in zip(sample, headers, strict=True) if pages > 1), "")
    return _common(headers), paged


def sized(source: Sized) -> Sized:
    """Return a source of image files, of any origin, with the suitable side of their views, and a note about pages."""
    sample = source.facts.sample(_NUM_HEADERS)
    headers = [_header_at(source, index) for index in sample]
    source = replace(source, facts=replace(source.facts, size=_common(headers)))
    if paged := [index for index, (_, pages) in zip(sample, headers, strict=True) if pages > 1]:
        return replace(source, notes=(*source.notes, pages_note(source.where(paged[0]))))
    return source


def pages_note(name: str) -> str:
    """Return the line about files with several pages or frames.  name: the first one."""
    return (
        f"{name} holds several pages or frames: only the first of each such file is read (--data.page takes another "
        "one of TIFF and DICOM files)"
    )


def _common(headers: Sequence[tuple[int, int]]) -> int:
    """Return the largest usual side that four of five of these images have."""
    shorter = [side for side, _ in headers if side]
    if not shorter:
        return LARGEST
    return nearest(float(np.quantile(shorter, 0.2, method="lower")))


def nearest(side: float) -> int:
    """Return the largest usual side up to this one, or the smallest."""
    return max((usual for usual in _SIDES if usual <= side), default=_SIDES[0])


def _header_at(source: Coded, index: int) -> tuple[int, int]:
    try:
        return _header(source.files(np.array([index]))[0])
    except Unreadable:  # reported when it is read
        return 0, 1


def _header(file: File) -> tuple[int, int]:
    """Return the shorter side of an image and its number of pages or frames."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return min(image.size), getattr(image, "n_frames", 1)
    except Exception:  # Pillow raises anything on files that it does not know and on damaged ones
        pass
    try:
        height, width, pages = formats.size(file)
        return min(height, width), pages
    except Unreadable:  # reported when it is read
        return 0, 1
