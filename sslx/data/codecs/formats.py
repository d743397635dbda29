"""Decode image files, with the same pixels for all backends, or refuse them with a reason.

``values`` returns what a file holds, and ``read`` the pixels of a source: RGB of 8 bits, or another number of channels
and more bits where the source has such (``Channels``).

The backends torchvision and resident use ``read`` for all files, and DALI for files that it would decode differently
or not at all (``headers.is_plain``).  README.md beside this file has the table of the formats.

``values`` returns what the file holds, at its own depth and with all of its bands, and ``read`` makes RGB of 8 bits of
it.  One alpha channel or transparency is dropped, gray is repeated, and EXIF's orientation is applied.  Color profiles
(ICC) are ignored, as by torchvision and DALI: applying them would make other pixels than those on which encoders of
other libraries were trained, and nearly all files are sRGB.  ``Levels`` gives black and white of more than 8 bits, of
signed values and of floats.
"""

import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sslx.console.words import one_line
from sslx.data.codecs import bands, deep, dicom, headers, heif, npy, tiff
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.codecs.values import Range as Range
from sslx.data.codecs.values import Values as Values
from sslx.data.codecs.values import finite, turned
from sslx.data.facts import RGB, Channels

Pixels = npt.NDArray[np.uint8]

_PLUGINS: dict[str, Any] = {  # because Image.open would try dozens of formats
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}
_OTHER_READERS: dict[str, Any] = {"DICOM": dicom, "HEIF": heif, "NPY": npy}
_ORIENTATION = 0x112
_FULL_16_BITS = (0.0, 65535.0)
_8_BITS = (0.0, 255.0)
_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Levels:
    """Black and white of images whose files do not state them.  All images of a kind are scaled in the same way.

    chosen: the user's range for every kind.  measured: ranges measured on a sample of the images, by kind (``16-bit``).
    page: which page of a TIFF, or frame of a DICOM file, is read.
    """

    chosen: Range | None = None
    measured: dict[str, Range] = field(default_factory=dict[str, Range])
    page: int = 0

    def of(self, kind: str, low: float, high: float) -> Range:
        """Return black and white of an image with values from low to high.  Raises Unreadable if they are unknown."""
        if self.chosen:
            return self.chosen
        if kind in self.measured:
            black, white = self.measured[kind]
            if max(black - low, high - white) > (white - black) / 2:
                raise Unreadable(
                    f"{kind} values from {low:g} to {high:g}, but the other images use {black:g} to {white:g}: "
                    "give black and white with --data.range LOW HIGH"
                )
            return black, white
        if kind == "16-bit" and high > 32767:
            return _FULL_16_BITS
        raise Unreadable(
            f"{kind} values from {low:g} to {high:g} with unknown black and white: give them with --data.range LOW HIGH"
        )


def read(file: File, levels: Levels | None = None, channels: Channels = RGB) -> npt.NDArray[Any]:
    """Return the pixels of an image file: (H, W, C), of the number, type and range of ``channels``.

    By default, that is RGB of 8 bits, for which values of more bits are rounded.  Of other channels, no value is
    rounded to fewer levels (``bands.fitted``).  Raises Unreadable with the reason.
    """
    levels = levels or Levels()
    image = values(file, levels.page)
    array = image.array
    if image.alpha_unstated and (channels.is_plain or array.shape[2] == channels.num + 1):
        array = array[..., :-1]
    if not channels.is_plain:
        black, white = _range(image, array, levels)
        return bands.fitted(array, black, white, is_white_first=image.white_first, channels=channels)
    if array.ndim == 3 and (num := array.shape[2]) not in (1, 3):
        raise Unreadable(f"{num} channels; --data.channels {num} trains on such images")
    if image.kind is None:
        return _as_rgb(255 - array if image.white_first else array)
    black, white = _range(image, array, levels)
    is_narrow = array.dtype.name in ("uint8", "int8", "uint16", "float16", "float32")
    scaled = array.astype(np.float32 if is_narrow else np.float64)
    scaled -= black
    scaled *= 255 / (white - black)
    pixels = np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)
    return _as_rgb(255 - pixels if image.white_first else pixels)


def _as_rgb(pixels: Pixels) -> Pixels:
    """Return (H, W), (H, W, 1) or (H, W, 3) pixels as contiguous (H, W, 3)."""
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    rgb = np.empty((*pixels.shape[:2], 3), dtype=np.uint8)
    rgb[:] = pixels if pixels.ndim == 3 else pixels[..., None]
    return rgb


def _range(image: Values, array: npt.NDArray[Any], levels: Levels) -> Range:
    """Return black and white of an image.  Raises Unreadable if they are unknown."""
    if image.kind is None:
        return _8_BITS
    return image.stated or levels.of(image.kind, float(array.min()), float(array.max()))


def of_pil(image: Image.Image) -> Pixels:
    """Return the (H, W, 3) uint8 RGB pixels of a PIL image, upright.  Raises Unreadable if it has more than 8 bits."""
    alone = image.copy() if "transparency" in image.info else image
    return _as_rgb(_upright(_at_most_8_bits(alone, image.format or "PIL image"), image))


def values(file: File, page: int = 0) -> Values:
    """Return the values in an image file.  Raises Unreadable with the reason.

    page: of a TIFF, or frame of a DICOM file, counted from 0.  Other files have one image, or the first one is read.
    """
    descriptor = headers.opened(file)
    with open(descriptor, "rb") as opened:
        container = headers.container(opened.read(headers.START_BYTES))
        page_tags = tiff.tags(descriptor, page) if container == "TIFF" else {}
        if page_tags:
            tiff.check(page_tags)
        opened.seek(0)
        try:
            return _decoded(opened, container, page_tags, page)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # Pillow raises SyntaxError, struct.error and others at damaged files
            reason = one_line(error) or type(error).__name__
            name = tiff.name(page_tags) if page_tags else _named(container)
            raise Unreadable(f"{name} that cannot be decoded: {reason}") from error


def kind_of(file: File, page: int = 0) -> str | None:
    """Return, from the header alone, the kind of values whose range ``Levels`` must give, or None for other files."""
    descriptor = headers.opened(file)
    with open(descriptor, "rb") as opened:
        head = os.pread(descriptor, headers.START_BYTES, 0)
        container = headers.container(head)
        if container == "PNG" and head[24:25] == b"\x10":
            return "16-bit"
        try:
            if container == "DICOM":
                return dicom.kind(opened, page)
            if container == "NPY":
                return npy.kind(opened)
            return tiff.kind(tiff.tags(descriptor, page)) if container == "TIFF" else None
        except (Unreadable, MemoryError):
            raise
        except Exception as error:
            raise Unreadable(f"{_named(container)} whose header is damaged: {one_line(error)}") from error


def size(file: File) -> tuple[int, int, int]:
    """Return height, width and number of pages or frames, as a rule from the header alone.  Raises Unreadable."""
    descriptor = headers.opened(file)
    with open(descriptor, "rb") as opened:
        container = headers.container(os.pread(descriptor, headers.START_BYTES, 0))
        try:
            if container == "TIFF":
                page_tags = tiff.tags(descriptor)
                return page_tags["height"][0], page_tags["width"][0], tiff.num_pages(descriptor)
            if container in _OTHER_READERS:
                return _OTHER_READERS[container].size(opened)
            with _plugin(container)(opened) as image:
                return image.height, image.width, getattr(image, "n_frames", 1)
        except (Unreadable, MemoryError):
            raise
        except Exception:  # of damaged files, and of some with more than 8 bits
            height, width = values(file).array.shape[:2]
            return height, width, 1


def _named(container: str) -> str:
    return f"{'an' if container in ('AVIF', 'NPY') else 'a'} {container}"


def _plugin(container: str) -> Any:
    """Return Pillow's class for a container."""
    if container != "AVIF":
        return _PLUGINS[container]
    try:
        plugin = import_module("PIL.AvifImagePlugin")  # new in Pillow 11.3
    except ImportError:
        plugin = None
    if plugin is None or not plugin.SUPPORTED:
        raise Unreadable("an AVIF, which the installed Pillow does not read: pip install 'pillow>=11.3'")
    return plugin.AvifImageFile


def _decoded(file: BinaryIO, container: str, page_tags: tiff.Tags, page: int) -> Values:
    """Return the values in an open file of a known container."""
    if container == "DICOM":
        return dicom.values(file, page)
    if container in _OTHER_READERS:
        return _OTHER_READERS[container].values(file)
    if page_tags and tiff.by_tifffile(page_tags):
        return tiff.values(file, page_tags, page)
    if container == "JPEG 2000" and (many := deep.jpeg_2000(file)):
        return many
    try:
        return _by_pillow(file, container, page_tags, page)
    except SyntaxError:  # also of a JPEG of 12 bits
        if container == "JPEG" and (many := deep.jpeg(file)):
            return many
        raise


def _by_pillow(file: BinaryIO, container: str, page_tags: tiff.Tags, page: int) -> Values:
    """Return the values in an open file that Pillow reads."""
    with _opened(file, container, page) as image:
        headers.check_size(*image.size)
        if container == "AVIF" and (colors := deep.avif(file, image.n_frames)) is not None:
            bits = deep.avif_bits(file)
            return Values(_upright(colors, image), f"{bits}-bit", (0.0, 2.0**bits - 1))
        kind = tiff.kind(page_tags) if page_tags else None
        rawmode = _rawmode(image)
        if container == "PNG" and rawmode == "LA;16B":
            return Values(_gray_of_gray_alpha(image), "16-bit")
        has_16_bits = rawmode[-4:-1] == ";16"  # and not 16 in all, as a BMP's BGR;16
        if has_16_bits and image.mode in ("RGB", "RGBA"):
            return Values(_sixteen_bits(image, file, container, page)[..., :3], "16-bit")
        if has_16_bits and image.mode == "CMYK":
            return Values(_of_inks(_sixteen_bits(image, file, container, page)), "16-bit", _FULL_16_BITS)
        image.load()
        widened = kind is None and image.mode == "I" and ";16" in rawmode  # Pillow 10's gray PNG of 16 bits
        if image.mode.startswith("I;16") or kind or widened:
            array = np.asarray(image)
            array = array.astype(np.uint16 if widened else array.dtype.newbyteorder("="))
            if kind == "signed 8-bit":
                array = array.view(np.int8)
            elif kind == "signed 16-bit":
                array = array.astype(np.int16)
            elif kind == "32-bit":
                array = array.view(np.uint32)
            stated: Range | None = None
            if container == "JPEG 2000":
                stated = _FULL_16_BITS
            elif page_tags.get("bits") == (12,):
                stated = 0, 4095
            white_first = page_tags.get("photometric") == (0,)
            return Values(_upright(finite(array), image), kind or "16-bit", stated, white_first)
        return Values(_upright(_at_most_8_bits(image, container), image))


def _opened(file: BinaryIO, container: str, page: int) -> Any:
    """Open a file with Pillow, at a page of a TIFF."""
    image = _plugin(container)(file)
    if page and container == "TIFF":
        image.seek(page)
    return image


def _at_most_8_bits(image: Image.Image, container: str) -> Pixels:
    """Return the pixels of an image with at most 8 bits per band: (H, W) if it is gray, else (H, W, 3) RGB."""
    if image.mode == "CMYK" and container == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow assumes Adobe's inverted inks
    if image.mode not in _CONVERTED:
        raise Unreadable(f"{_named(container)} of mode {image.mode}")
    image.info.pop("transparency", None)
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def _of_inks(inks: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return RGB of CMYK of 16 bits, (H, W, 4), by the rule by which Pillow converts those of 8 bits."""
    light = 65535 - inks.astype(np.float64)
    return np.rint(light[..., :3] * light[..., 3:] / 65535).astype(np.uint16)


def _rawmode(image: Any) -> str:
    args = image.tile[0].args if image.tile else ""
    if args and not isinstance(args, str):
        args = args[0]
    return str(args or "")


def _decode_as(image: Any, rawmode: str) -> npt.NDArray[np.uint8]:
    """Decode the bytes as if the file held ``rawmode``."""

    def with_rawmode(args: Any) -> Any:
        return rawmode if isinstance(args, str) else (rawmode, *args[1:])

    image.tile = [tile._replace(args=with_rawmode(tile.args)) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _gray_of_gray_alpha(image: Any) -> npt.NDArray[Any]:
    """Return the gray of a 16-bit PNG with alpha, whose four bytes per pixel are decoded as RGBA."""
    pixel_bytes = _decode_as(image, "RGBA").astype(np.uint16)
    return _upright(pixel_bytes[..., 0] << 8 | pixel_bytes[..., 1], image)


def _sixteen_bits(image: Any, file: BinaryIO, container: str, page: int) -> npt.NDArray[Any]:
    """Return (H, W, C) pixels of 16 bits per band.

    Pillow keeps only the upper byte, so the file is decoded again in the other byte order for the lower one.
    """
    rawmode = _rawmode(image)
    order = rawmode[-1].replace("N", "L" if sys.byteorder == "little" else "B")
    upper = _upright(_decode_as(image, rawmode), image).astype(np.uint16)
    file.seek(0)
    with _opened(file, container, page) as again:
        lower = _upright(_decode_as(again, rawmode[:-1] + {"L": "B", "B": "L"}[order]), again)
        return upper << 8 | lower


def _upright(array: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """Apply EXIF's orientation.  Damaged EXIF is ignored."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises anything at damaged EXIF, which DALI ignores
        orientation = 1
    return turned(array, orientation)
