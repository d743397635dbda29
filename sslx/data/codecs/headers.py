"""Read a file's header before decoding: find its container and whether DALI decodes it as sslx does.

All backends begin here, so that they agree on which files are images.  Only a few kilobytes are read.  DALI gets only
files that look complete and whose kind it decodes to the same pixels as ``formats.read`` (``is_plain``).  That function
reads all other files with other libraries, or reports why it does not.  TIFFs are never plain, because libraries
decode damaged TIFFs differently.
"""

import os
import re
import stat
import struct

from sslx.machine import files

MAX_PIXELS = 178_956_970
"""Largest image that sslx reads, 0.5 GiB as RGB.  This is Pillow's limit; it is the same for all backends."""
MAX_BYTES = 12 * MAX_PIXELS
"""Most bytes of an image's values, 2 GiB: the largest image with three bands of 32 bits."""
START_BYTES = 132
"""Bytes at the beginning of a file by which ``container`` knows it."""

_HEAD_BYTES = 4096  # all of a small file, and the header of most files
_MAX_HEAD_BYTES = 1 << 20  # only a few cameras write longer JPEG headers
_TAIL_BYTES = 1 << 16  # searched for the end of a JPEG, after which cameras may append other data

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\x93NUMPY", "NPY"),
)
_NOT_READ = (
    (rb"....ftyp", "a video"),
    (rb"%PDF|%!PS", "a PDF or PostScript file"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL"),
    (rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "an archive"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself: run git lfs pull"),
    (rb"(?i)\s*(<!doctype html|<html|<head)", "an HTML page"),
    (rb"(?i)\s*<(\?xml|svg)", "an XML or SVG file"),
    (rb"[\2\x08]\0.\0([A-Z]{2}|..\0\0)|\0[\2\x08]\0.[A-Z]{2}", "a DICOM data set without the header of a DICOM file"),
    (rb"\0{64}", "nothing but zeros"),
)
_READ = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "JPEG 2000", "AVIF", "HEIF", "DICOM")
_IMAGE_BRANDS = (
    b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1",
)  # fmt: skip
_TURNED = re.compile(
    rb"tiff:Orientation(?:=[\"']|>)[02-9]"
)  # an XMP orientation, which Pillow applies and DALI does not


File = str | bytes
"""An image file: its path, or all of its bytes."""


class Unreadable(RuntimeError):
    """sslx cannot read an image.  The message is the reason, without the path."""


def opened(file: File) -> int:
    """Open a regular file, or a file in memory that holds these bytes, and return its descriptor.

    Raises Unreadable, also for a dangling link and for a pipe, which would block.
    """
    return _opened(file) if isinstance(file, str) else _in_memory(file)


def _in_memory(data: bytes) -> int:
    descriptor = files.in_memory()
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _opened(path: str) -> int:
    try:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BlockingIOError:  # a file server holds a lease, which it releases soon
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise Unreadable("a link to a file that does not exist") from error
        raise Unreadable(error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("not a regular file")
    return descriptor


def container(head: bytes) -> str:
    """Return the container that begins with these START_BYTES bytes.  Raises Unreadable, naming other kinds."""
    if head[128:132] == b"DICM":  # first, because the bytes before may be a TIFF's
        return "DICOM"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and (kind := _of_brands(head)):
        return kind
    if not head:
        raise Unreadable("an empty file")
    other = next((name for magic, name in _NOT_READ if re.match(magic, head, re.DOTALL)), "not an image")
    raise Unreadable(f"{other}; sslx reads {', '.join(_READ)} and NPY")


def _of_brands(head: bytes) -> str:
    """Return AVIF or HEIF if the brands of an ISO media file, which is no video, say so; "" otherwise."""
    if head[8:12] not in _IMAGE_BRANDS:
        return ""
    length = int.from_bytes(head[:4])
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(length, len(head)), 4))}
    return "AVIF" if brands & {b"avif", b"avis"} else "HEIF"


def check_size(width: int, height: int, pixel_bytes: int = 3) -> None:
    """Raise Unreadable if an image has more pixels, or more bytes of values, than sslx reads."""
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{width:,} x {height:,} pixels; sslx reads at most {MAX_PIXELS:,}")
    if width * height * pixel_bytes > MAX_BYTES:
        raise Unreadable(
            f"{width:,} x {height:,} pixels of {pixel_bytes:,} bytes; sslx reads at most {MAX_BYTES:,} bytes"
        )


def is_plain(file: File) -> bool:
    """Return whether this looks like a complete file of a kind that DALI decodes to the pixels of ``formats.read``.

    Raises Unreadable if it is not an image, cannot be opened or has too many pixels.
    """
    descriptor = opened(file)
    try:
        head = os.pread(descriptor, _HEAD_BYTES, 0)
        kind = container(head)
        if kind not in _PLAIN:
            return False
        return _PLAIN[kind](descriptor, head, os.fstat(descriptor).st_size)
    except (struct.error, IndexError):  # the file ends in its header
        return False
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def _plain_jpeg(descriptor: int, head: bytes, size: int) -> bool:
    """Return whether a JPEG has 8 bits, Huffman coding, gray or YCbCr colors, and an end."""
    at, frame = 2, 0
    turned = exif = rgb = False
    while True:
        if at + 20 > len(head):
            head = _more(descriptor, head, size)
        marker, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        if head[at] != 0xFF or length < 2:
            return False
        if marker == 0xDA:  # the pixels
            break
        if marker in (0xC0, 0xC1, 0xC2) and not frame:
            frame = at
        elif marker == 0xEE and head.startswith(b"Adobe", at + 4):
            rgb |= head[at + 15] == 0
        elif marker == 0xE1:
            while at + 2 + length > len(head):
                head = _more(descriptor, head, size)
            exif |= head.startswith(b"Exif\0\0", at + 4)
            turned |= _TURNED.search(head, at, at + 2 + length) is not None
        elif not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
            return False  # arithmetic coding, lossless, hierarchical, or no marker of a header
        at += 2 + length
    length, bits, height, width, planes = struct.unpack_from(">HBHHB", head, frame + 2)
    check_size(width, height)
    if not frame or bits != 8 or planes not in (1, 3) or not width or not height or length != 8 + 3 * planes:
        return False
    rgb |= head[frame + 10 : frame + 19 : 3] == b"RGB"  # as three of libjpeg's names for planes
    if (rgb and planes == 3) or (turned and not exif):
        return False
    end = head if size <= len(head) else os.pread(descriptor, 2, size - 2)
    return end.endswith(b"\xff\xd9") or b"\xff\xd9" in os.pread(descriptor, _TAIL_BYTES, max(at, size - _TAIL_BYTES))


def _more(descriptor: int, head: bytes, size: int) -> bytes:
    """Return more of a file's beginning.  Raises IndexError if there is no more."""
    if len(head) >= min(size, _MAX_HEAD_BYTES):
        raise IndexError
    return os.pread(descriptor, 16 * len(head), 0)


def _plain_png(descriptor: int, head: bytes, size: int) -> bool:
    """Return whether a PNG has 8 bits, is upright and not animated, and consists of valid chunks to its end."""
    length, name, width, height, bits, color = struct.unpack_from(">I4sIIBB", head, 8)
    check_size(width, height)
    if (length, name, bits) != (13, b"IHDR", 8) or color not in (0, 2, 3, 4, 6) or not width or not height:
        return False
    at, pixels = 33, False
    while name != b"IEND":
        start = head[at : at + 32] if at + 32 <= len(head) else os.pread(descriptor, 32, at)
        length, name = struct.unpack_from(">I4s", start)
        if name in (b"eXIf", b"acTL") or start.startswith((b"Raw profile type", b"XML:com.adobe.xmp"), 8):
            return False
        pixels |= name == b"IDAT"
        at += 12 + length
    return pixels and at == size


def _plain_webp(_: int, head: bytes, size: int) -> bool:
    """Return whether a WebP is complete and has only one picture, without EXIF, animation or separate alpha."""
    length, kind = struct.unpack_from("<I4x4s", head, 4)
    lossy, lossless = kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a", kind == b"VP8L" and head[20] == 0x2F
    return size >= length + 8 and (lossy or lossless)


def _plain_bmp(_: int, head: bytes, size: int) -> bool:
    """Return whether a BMP has 24 bits, is not compressed, and stores the bottom line first."""
    start, length, width, height, planes, bits, compression = struct.unpack_from("<IIiiHHI", head, 10)
    check_size(abs(width), abs(height))
    if (length, planes, bits, compression) != (40, 1, 24, 0) or width <= 0 or height <= 0:
        return False
    return size >= start + (3 * width + 3) // 4 * 4 * height


_PLAIN = {"JPEG": _plain_jpeg, "PNG": _plain_png, "WebP": _plain_webp, "BMP": _plain_bmp}
