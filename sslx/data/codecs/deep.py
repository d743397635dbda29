"""JPEG, JPEG 2000 and AVIF files with more than 8 bits, which Pillow would cut to 8, by imagecodecs."""

import os
import re
import struct
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from sslx.data.codecs.headers import Unreadable, check_size
from sslx.data.codecs.values import Values, library, turned

_START_BYTES = 1 << 16  # within which the headers are
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SIZE = b"\xff\x4f\xff\x51"  # the start of a JPEG 2000 codestream and the marker of its size
_SYCC = b"colr\1\0\0\0\0\0\x12"
_AV1 = re.compile(rb"av1C\x81.(.)", re.DOTALL)  # the configuration of AV1: high_bitdepth and twelve_bit are in byte 2


def jpeg(file: BinaryIO) -> Values | None:
    """Return the values of a JPEG of 9 to 16 bits, upright, or None for one of 8."""
    bits, height, width, planes = jpeg_frame(file.fileno())
    if bits <= 8:
        return None
    check_size(width, height, 2 * planes)
    if planes not in (1, 3):
        raise Unreadable(f"a JPEG of {planes} planes of {bits} bits; sslx reads gray and RGB")
    codecs = library("imagecodecs", f"a JPEG of {bits} bits", "imagecodecs")
    content = _content(file)
    if b"\xff\xd9" not in content[-_START_BYTES:]:  # libjpeg would fill the rest with gray
        raise Unreadable("a JPEG that is truncated")
    array = turned(np.asarray(codecs.jpeg8_decode(content)), _orientation(file))
    return Values(array, f"{bits}-bit", (0.0, 2.0**bits - 1))


def jpeg_frame(descriptor: int) -> tuple[int, int, int, int]:
    """Return bits, height, width and the number of planes of a JPEG.  Raises Unreadable if there is no frame."""
    at = 2
    while True:
        start = os.pread(descriptor, 10, at)
        if len(start) < 10 or start[0] != 0xFF:
            raise Unreadable("a JPEG that ends in its header")
        if start[1] in _FRAMES:
            return struct.unpack(">BHHB", start[4:])
        at += 1 if start[1] == 0xFF else 2 + struct.unpack(">H", start[2:4])[0]


def jpeg_2000(file: BinaryIO) -> Values | None:
    """Return the values of a JPEG 2000 that Pillow would cut to 8 bits or not read, or None for others."""
    start = os.pread(file.fileno(), _START_BYTES, 0)
    at = start.find(_SIZE)
    if at < 0:
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", start, at + 8)
    (planes,) = struct.unpack_from(">H", start, at + 40)
    depths = start[at + 42 : at + 42 + 3 * planes : 3]
    bits, is_signed = max(depth & 0x7F for depth in depths) + 1, any(depth & 0x80 for depth in depths)
    if planes <= 4 and (bits <= 8 or (planes == 1 and bits <= 16)):
        return None
    check_size(right - left, bottom - top, planes * (1 if bits <= 8 else 2 if bits <= 16 else 4))
    if is_signed or len(set(depths)) > 1 or _SYCC in start[:at]:
        raise Unreadable(f"a JPEG 2000 of {planes} planes of {bits} bits that are signed, different, or no RGB")
    codecs = library("imagecodecs", f"a JPEG 2000 of {planes} planes of {bits} bits", "imagecodecs")
    array = np.asarray(codecs.jpeg2k_decode(_content(file)))
    if planes in (2, 4):  # gray or RGB with alpha, as Pillow reads those of 8 bits
        array = array[..., 0] if planes == 2 else array[..., :3]
    return Values(np.ascontiguousarray(array), *((None, None) if bits == 8 else (f"{bits}-bit", (0.0, 2.0**bits - 1))))


def avif(file: BinaryIO, num_frames: int) -> npt.NDArray[np.uint16] | None:
    """Return the colors of an AVIF of 10 or 12 bits, not yet upright, and None for one of 8 bits."""
    bits = avif_bits(file)
    if bits == 8:
        return None
    if num_frames > 1:  # imagecodecs 2026.3 ends the process by SIGSEGV when it is to decode one of several frames
        raise Unreadable(f"an AVIF of {num_frames} frames of {bits} bits; sslx reads several frames of 8 bits only")
    codecs = library("imagecodecs", f"an AVIF of {bits} bits", "imagecodecs")
    array = np.asarray(codecs.avif_decode(_content(file)))
    return array[..., :3] if array.ndim == 3 and array.shape[2] == 4 else array


def avif_bits(file: BinaryIO) -> int:
    """Return the number of bits of an AVIF: 8, 10 or 12."""
    codings = [match[1][0] for match in _AV1.finditer(os.pread(file.fileno(), _START_BYTES, 0))]
    if not codings:
        raise Unreadable("an AVIF that does not say how it is coded")
    coding = max(byte & 0x60 for byte in codings)
    return {0x60: 12, 0x40: 10}.get(coding, 8)


def _orientation(file: BinaryIO) -> int:
    """Return EXIF's orientation of a JPEG, 1 without any."""
    start = os.pread(file.fileno(), _START_BYTES, 0)
    if (at := start.find(b"Exif\0\0")) < 0:
        return 1
    exif = Image.Exif()
    exif.load(start[at:])
    return exif.get(ExifTags.Base.Orientation, 1)


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()
