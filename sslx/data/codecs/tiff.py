"""TIFF: its pages and their tags, read before decoding, and pages that only tifffile reads.

Pillow reads gray, palette, RGB, CMYK and YCbCr pages of up to 16 bits (``formats``).  Pages with other numbers of
bands, with 16 bits in separate planes, with colors as floats or with 64 bits are read by tifffile, which keeps every
value.
"""

import math
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np

from sslx.data.codecs.headers import Unreadable, check_size
from sslx.data.codecs.values import Values, finite, library, turned

Tags = dict[str, tuple[int, ...]]

_TAGS = {
    256: "width",
    257: "height",
    258: "bits",
    259: "compression",
    262: "photometric",
    274: "orientation",
    277: "samples",
    278: "rows",
    284: "planar",
    322: "tile_width",
    323: "tile_height",
    338: "extra",
    339: "sample_format",
    530: "subsampling",
}
_PART_COUNTS = {273: "num_strips", 324: "num_tiles"}
_INTEGER_CODES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # struct codes of TIFF's integer types
_MAX_PAGES = 1 << 20
_BASE_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # photometric interpretation -> bands without alpha
_BY_PILLOW = (1, 2, 4, 8, 12, 16, 32)  # numbers of bits


def tags(descriptor: int, page: int = 0) -> Tags:
    """Return the integers of a page for ``_TAGS``, with TIFF's defaults, and its number of parts.

    Raises Unreadable for too many pixels, too few parts, a truncated directory, a missing page, and for other files.
    """
    found: Tags = {
        "bits": (1,),
        "compression": (1,),
        "photometric": (-1,),
        "orientation": (1,),
        "samples": (1,),
        "planar": (1,),
        "extra": (),
        "subsampling": (2, 2),
    }
    try:
        order, big, start = _directory_of(descriptor, page)
        found |= _directory(descriptor, order, big, start)
        found["big_endian"] = (int(order == ">"),)
        if not (found.get("width") and found.get("height") and all(found[name] for name in found if name != "extra")):
            raise Unreadable("a TIFF without a size")
    except (struct.error, OverflowError) as error:
        raise Unreadable("a TIFF that ends in its directory") from error
    check_size(found["width"][0], found["height"][0], found["samples"][0] * math.ceil(max(found["bits"]) / 8))
    _check_parts(found)
    return {"sample_format": (1,)} | found


def num_pages(descriptor: int) -> int:
    """Return the number of pages of a TIFF, at most 1,048,576."""
    return sum(1 for _ in _directories(descriptor))


def kind(page: Tags) -> str | None:
    """Return the kind of values that may need a range from ``Levels``, or None for 8-bit ones."""
    bits, sample_format = page["bits"][0], page["sample_format"][0]
    if sample_format == 3:
        return "float"
    if sample_format == 2:
        return f"signed {bits}-bit"
    return f"{bits}-bit" if bits > 8 and page["photometric"] != (5,) else None


def check(page: Tags) -> None:
    """Raise Unreadable for unsupported TIFFs, which Pillow would refuse without a reason or read wrongly."""
    photometric, bits, samples, extra = (page[name] for name in ("photometric", "bits", "samples", "extra"))
    if photometric[0] == -1:
        raise Unreadable("a TIFF that does not say whether it is gray or has colors")
    if photometric[0] not in _BASE_BANDS:
        raise Unreadable(
            f"a TIFF with photometric interpretation {photometric[0]}; sslx reads gray, RGB, palette, CMYK"
        )
    bits = bits[: samples[0]]  # some writers name more
    if samples[0] < _BASE_BANDS[photometric[0]] or len(set(bits)) > 1 or len(set(page["sample_format"])) > 1:
        raise Unreadable(f"a TIFF with {samples[0]} bands of {' and '.join(map(str, sorted(set(bits))))} bits")
    if page["sample_format"][0] in (5, 6):
        raise Unreadable("a TIFF of complex numbers, which sslx does not read")
    if photometric == (6,) and page["compression"] == (1,) and page["subsampling"] != (1, 1):
        raise Unreadable("a TIFF with uncompressed, subsampled YCbCr, which sslx does not read")
    if 1 in extra and (max(bits) > 8 or by_tifffile(page)):
        raise Unreadable(
            f"a TIFF with {max(bits)}-bit colors that are multiplied by their alpha, which sslx does not read"
        )
    if by_tifffile(page) and photometric[0] in (3, 5, 6):
        raise Unreadable(
            f"a TIFF with {samples[0]} bands of {bits[0]} bits and photometric interpretation {photometric[0]}; "
            "sslx reads several bands of gray and RGB"
        )


def by_tifffile(page: Tags) -> bool:
    """Return whether Pillow would not read all values of a page, but tifffile does."""
    bits, samples = page["bits"][0], page["samples"][0]
    floats, signed = page["sample_format"][0] == 3, page["sample_format"][0] == 2
    num_extra = samples - _BASE_BANDS[page["photometric"][0]]
    if num_extra > 1 or (num_extra == 1 and page["extra"] not in ((1,), (2,))):
        return not _may_be_alpha(page) or (find_spec("tifffile") is not None and find_spec("imagecodecs") is not None)
    if bits not in _BY_PILLOW or (floats and bits != 32):
        return True
    if samples > 1 and (floats or signed or bits > 16):
        return True
    if page["big_endian"] == (1,) and bits in (16, 32):  # Pillow 13 swaps what libtiff has swapped
        if (page["compression"] != (1,) and (floats or signed)) or (bits == 32 and not floats and not signed):
            return True
    return bits > 8 and (samples == 2 or page["planar"] == (2,))


def _may_be_alpha(page: Tags) -> bool:
    """Return whether a page has a fourth band of which it does not say what it is, and which Pillow can leave out."""
    if page["photometric"] != (2,) or page["samples"] != (4,) or page["extra"] not in ((), (0,)):
        return False
    return page["sample_format"][0] == 1 and (page["bits"][0] == 8 or (page["bits"][0], page["planar"]) == (16, (1,)))


def values(file: BinaryIO, page: Tags, number: int) -> Values:
    """Return the values of a page that ``by_tifffile`` chose."""
    tifffile = library("tifffile", name(page), "tifffile imagecodecs")
    with tifffile.TiffFile(file, name="image") as opened:
        found = opened.pages[number]
        if not all(found.databytecounts):
            raise Unreadable("a TIFF with empty strips or tiles")
        try:
            array = found.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" in str(error):
                library("imagecodecs", f"{name(page)} with compression {page['compression'][0]}", "imagecodecs")
            raise
        axes = found.axes
    if axes == "SYX":
        array, axes = np.moveaxis(array, 0, -1), "YXS"
    if axes not in ("YX", "YXS"):
        raise Unreadable(f"a TIFF whose page has the dimensions {axes}; sslx reads height, width and bands")
    base, extra, num_bands = _BASE_BANDS[page["photometric"][0]], page["extra"], page["samples"][0]
    named = {base + i for i, meaning in enumerate(extra) if meaning == 2}
    kept = [band for band in range(num_bands) if band not in named]
    if num_bands > 1:
        array = array[..., kept] if len(kept) > 1 else array[..., kept[0]]
    bits, is_unsigned = page["bits"][0], page["sample_format"][0] not in (2, 3)
    stated = (0.0, 2.0**bits - 1) if is_unsigned and bits not in (8, 16, 32, 64) else None
    return Values(
        turned(finite(array), page["orientation"][0]),
        f"{bits}-bit" if stated else kind(page),
        stated,
        white_first=page["photometric"] == (0,),
        alpha_unstated=page["photometric"] == (2,) and num_bands == len(kept) == 4,
    )


def name(page: Tags) -> str:
    """Return what a page holds, for messages."""
    what = {2: "signed integers", 3: "floats"}.get(page["sample_format"][0], "integers")
    return f"a TIFF of {page['samples'][0]} x {page['bits'][0]}-bit {what}"


def _check_parts(page: Tags) -> None:
    """Raise Unreadable if there are too few strips or tiles for the size: Pillow would leave the rest black."""
    width, height = page["width"][0], page["height"][0]
    parts = "tiles" if "num_tiles" in page else "strips"
    if parts == "tiles":
        wide, high = page.get("tile_width", (width,))[0], page.get("tile_height", (height,))[0]
        check_size(wide, high)
    else:
        wide, high = width, page.get("rows", (height,))[0]
    planes = page["samples"][0] if page["planar"] == (2,) else 1
    expected = math.ceil(width / max(1, wide)) * math.ceil(height / max(1, high)) * planes
    num_parts = page.get(f"num_{parts}", (0,))[0]
    if num_parts < expected:
        raise Unreadable(f"a TIFF with {num_parts:,} {parts}; its {width:,} x {height:,} pixels take {expected:,}")


def _directory_of(descriptor: int, page: int) -> tuple[str, bool, int]:
    """Return the byte order of a TIFF, whether it is a BigTIFF, and where the directory of a page begins."""
    number = -1
    for number, found in enumerate(_directories(descriptor)):
        if number == page:
            return found
    if number < 0:
        raise Unreadable("a TIFF without a page")
    raise Unreadable(f"it has {number + 1} pages, of which --data.page {page} is none: the first one is page 0")


def _directories(descriptor: int) -> Iterator[tuple[str, bool, int]]:
    """Yield byte order, whether it is a BigTIFF, and the start of each directory.  Raises struct.error at the end."""
    head = os.pread(descriptor, 16, 0)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    offset_kind, width, count_kind = ("Q", 20, "Q") if big else ("I", 12, "H")
    (start,) = struct.unpack_from(order + offset_kind, head, 8 if big else 4)
    seen = set[int]()
    while start and start not in seen and len(seen) < _MAX_PAGES:
        yield order, big, start
        seen.add(start)
        size = struct.calcsize(count_kind)
        (count,) = struct.unpack(order + count_kind, os.pread(descriptor, size, start))
        try:
            link = os.pread(descriptor, struct.calcsize(offset_kind), start + size + count * width)
            (start,) = struct.unpack(order + offset_kind, link)
        except (struct.error, OSError, OverflowError):  # some writers leave the last link out
            return


def _directory(descriptor: int, order: str, big: bool, start: int) -> Tags:
    width, count_kind = (20, "Q") if big else (12, "H")
    offset = struct.calcsize(count_kind)
    (count,) = struct.unpack(f"{order}{count_kind}", os.pread(descriptor, offset, start))
    if count > 4096:
        raise Unreadable("a TIFF whose directory is damaged")
    entries = os.pread(descriptor, count * width, start + offset)
    found: Tags = {}
    for at in range(0, count * width, width):
        tag, code = struct.unpack_from(f"{order}HH", entries, at)
        (number,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", entries, at + 4)
        if tag in _TAGS and code in _INTEGER_CODES and number <= 4096:
            pattern = f"{order}{number}{_INTEGER_CODES[code]}"
            value_at, room = (12, 8) if big else (8, 4)
            place = entries[at + value_at : at + value_at + room]
            if struct.calcsize(pattern) > room:
                (far,) = struct.unpack(f"{order}Q" if big else f"{order}I", place)
                place = os.pread(descriptor, struct.calcsize(pattern), far)
            found[_TAGS[tag]] = struct.unpack_from(pattern, place)
        elif tag in _PART_COUNTS:
            found[_PART_COUNTS[tag]] = (number,)
    return found
