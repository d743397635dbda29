"""Decode image files, with the same pixels for all backends, or refuse them with a reason.

``values`` returns what a file holds, and ``read`` the pixels of a source: RGB of 8 bits, or another number of channels
and more bits where the source has such (``Channels``).

The backends torchvision and resident use ``read`` for all files, and DALI for files that it would decode differently
or not at all (``headers.is_plain``).  These formats are supported:

- JPEG: 8 bits, gray, YCbCr, RGB, CMYK and YCCK (with inverted inks if it has Adobe's marker), any coding.
  Not supported: 12 bits, 2 planes.
- PNG: gray, palette and RGB with 1 to 16 bits; the default image of an animation.
- WebP, BMP: all; the first frame of an animation.
- TIFF, the first page: gray with 1 to 32 bits, signed or not, or floats; palette; RGB with 8 or 16 bits; CMYK; YCbCr.
  Not supported: other numbers of bands, CIELab, raw, 16 bits in separate planes, values that are not finite.
- JPEG 2000: gray, RGB.

One alpha channel or transparency is dropped, gray is repeated, and EXIF's orientation is applied.  ``Levels`` gives
black and white of more than 8 bits, of signed values and of floats.
"""

import io
import os
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    Image,
    ImageChops,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sslx.console.words import one_line
from sslx.data.codecs import bands, headers
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.facts import RGB, Channels

Pixels = npt.NDArray[np.uint8]
Range = tuple[float, float]

_PLUGINS: dict[str, Any] = {  # because Image.open would try dozens of formats
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
_ORIENTATION = 0x112
_BASE_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # photometric interpretation -> bands without alpha
_NPY = b"\x93NUMPY"
_FULL_16_BITS = (0.0, 65535.0)
_8_BITS = (0.0, 255.0)
_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")

warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged EXIF and many pixels


@dataclass(frozen=True)
class Levels:
    """Black and white of images whose files do not state them.  All images of a kind are scaled in the same way.

    chosen: the user's range for every kind.  measured: ranges measured on a sample of the images, by kind (``16-bit``).
    """

    chosen: Range | None = None
    measured: dict[str, Range] = field(default_factory=dict[str, Range])

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


@dataclass(frozen=True)
class Values:
    """The values in an image's file: (H, W) or (H, W, 3), upright.

    kind: the kind of values with an unknown range, or None for RGB uint8.  stated: the range that the format implies.
    white_first: whether low values are white.
    """

    array: npt.NDArray[Any]
    kind: str | None = None
    stated: Range | None = None
    white_first: bool = False


def read(file: File, levels: Levels | None = None, channels: Channels = RGB) -> npt.NDArray[Any]:
    """Return the pixels of an image file: (H, W, C), of the number, type and range of ``channels``.

    By default, that is RGB of 8 bits, for which values of more bits are rounded.  Of other channels, no value is
    rounded to fewer levels (``bands.fitted``).  Raises Unreadable with the reason.
    """
    image = values(file)
    if not channels.is_plain:
        black, white = _range(image, levels or Levels())
        return bands.fitted(image.array, black, white, is_white_first=image.white_first, channels=channels)
    if image.array.ndim == 3 and (num := image.array.shape[2]) not in (1, 3):
        raise Unreadable(f"{num} channels; --data.channels {num} trains on such images")
    if image.kind is None:
        return _as_rgb(image.array)
    black, white = _range(image, levels or Levels())
    exact = image.array.dtype.kind == "f" or image.array.dtype.itemsize <= 2
    scaled = image.array.astype(np.float32 if exact else np.float64)
    scaled -= black
    scaled *= 255 / (white - black)
    gray = np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)
    if image.white_first:
        gray = 255 - gray
    return _as_rgb(gray)


def _as_rgb(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of an image (H, W) or (H, W, C) as (H, W, 3), of which three channels are left as they are."""
    array = array if array.ndim == 3 else array[..., None]
    return array if array.shape[2] == 3 else np.repeat(array, 3, axis=-1)


def _range(image: Values, levels: Levels) -> Range:
    """Return black and white of an image.  Raises Unreadable if they are unknown."""
    if image.kind is None:
        return _8_BITS
    return image.stated or levels.of(image.kind, float(image.array.min()), float(image.array.max()))


def of_pil(image: Image.Image) -> Pixels:
    """Return the (H, W, 3) uint8 RGB pixels of a PIL image, upright.  Raises Unreadable if it has more than 8 bits."""
    return _upright(_rgb(image.copy() if "transparency" in image.info else image, image.format or "PIL image"), image)


def values(file: File) -> Values:
    """Return the values in an image file.  Raises Unreadable with the reason."""
    if isinstance(file, bytes) and file.startswith(_NPY):
        return _of_npy(file)
    descriptor = headers.opened(file)
    with open(descriptor, "rb") as opened:
        container = headers.container(opened.read(64))
        if container == "TIFF":
            _check_tiff(headers.tiff_tags(descriptor))
        opened.seek(0)
        try:
            return _decoded(opened, container)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # Pillow raises SyntaxError, struct.error and others at damaged files
            reason = one_line(error) or type(error).__name__
            raise Unreadable(f"{_name(container, opened)} that cannot be decoded: {reason}") from error


def kind_of(file: File) -> str | None:
    """Return, from the header alone, the kind of values whose range ``Levels`` must give, or None for other files."""
    if isinstance(file, bytes) and file.startswith(_NPY):
        return _of_npy(file).kind
    descriptor = headers.opened(file)
    try:
        head = os.pread(descriptor, 64, 0)
        container = headers.container(head)
        if container == "PNG" and head[24:25] == b"\x10":
            return "16-bit"
        return _tiff_kind(headers.tiff_tags(descriptor)) if container == "TIFF" else None
    finally:
        os.close(descriptor)


def _of_npy(data: bytes) -> Values:
    """Return the array in the bytes of an NPY file, as a Dataset's arrays come.  Raises Unreadable."""
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Unreadable(f"an NPY that cannot be read: {one_line(error)}") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Unreadable("some of its values are not finite numbers")
    kinds = {"uint8": None, "uint16": "16-bit"}
    return Values(array, kinds.get(array.dtype.name, "float"))


def _decoded(file: BinaryIO, container: str) -> Values:
    """Return the values in an open file of a known container."""
    with _PLUGINS[container](file) as image:
        headers.check_size(*image.size)
        tags = headers.tiff_tags(file.fileno()) if container == "TIFF" else {}
        kind = _tiff_kind(tags) if tags else None
        rawmode = _rawmode(image)
        if container == "PNG" and rawmode == "LA;16B":
            return Values(_gray_of_gray_alpha(image), "16-bit")
        if ";16" in rawmode and image.mode in ("RGB", "RGBA"):
            return Values(_sixteen_bits(image, file, container), "16-bit")
        image.load()
        widened = kind is None and image.mode == "I" and ";16" in rawmode  # Pillow 10's gray PNG of 16 bits
        if image.mode.startswith("I;16") or kind or widened:
            array = np.asarray(image).astype(np.uint16) if widened else np.asarray(image)
            if kind == "signed 8-bit":
                array = array.view(np.int8)
            elif kind == "32-bit":
                array = array.view(np.uint32)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise Unreadable("some of its values are not finite numbers")
            stated: Range | None = None
            if container == "JPEG 2000":
                stated = _FULL_16_BITS
            elif tags.get("bits") == (12,):
                stated = 0, 4095
            white_first = tags.get("photometric") == (0,)
            return Values(_upright(array, image), kind or "16-bit", stated, white_first)
        return Values(_upright(_rgb(image, container), image))


def _rgb(image: Image.Image, container: str) -> Pixels:
    """Return the pixels of an image with at most 8 bits per band."""
    if image.mode == "CMYK" and container == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow assumes Adobe's inverted inks
    if image.mode not in _CONVERTED:
        raise Unreadable(f"a {container} of mode {image.mode}")
    image.info.pop("transparency", None)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _rawmode(image: Any) -> str:
    args = image.tile[0][3] if image.tile else ""  # by number, because the field name args is new in Pillow 11
    if args and not isinstance(args, str):
        args = args[0]
    return str(args or "")


def _decode_as(image: Any, rawmode: str) -> npt.NDArray[np.uint8]:
    """Decode the bytes as if the file held ``rawmode``."""

    def with_rawmode(args: Any) -> Any:
        return rawmode if isinstance(args, str) else (rawmode, *args[1:])

    image.tile = [(*tile[:3], with_rawmode(tile[3])) for tile in image.tile]
    image.load()
    return np.asarray(image)


def _gray_of_gray_alpha(image: Any) -> npt.NDArray[Any]:
    """Return the gray of a 16-bit PNG with alpha, whose four bytes per pixel are decoded as RGBA."""
    pixel_bytes = _decode_as(image, "RGBA").astype(np.uint16)
    return _upright(pixel_bytes[..., 0] << 8 | pixel_bytes[..., 1], image)


def _sixteen_bits(image: Any, file: BinaryIO, container: str) -> npt.NDArray[Any]:
    """Return (H, W, 3) pixels of 16 bits per band.

    Pillow keeps only the upper byte, so the file is decoded again in the other byte order for the lower one.
    """
    rawmode = _rawmode(image)
    order = rawmode[-1].replace("N", "L" if sys.byteorder == "little" else "B")
    upper = _upright(_decode_as(image, rawmode)[..., :3], image).astype(np.uint16)
    file.seek(0)
    with _PLUGINS[container](file) as again:
        lower = _upright(_decode_as(again, rawmode[:-1] + {"L": "B", "B": "L"}[order])[..., :3], again)
        return upper << 8 | lower


def _upright(array: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """Apply EXIF's orientation.  Damaged EXIF is ignored."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises anything at damaged EXIF, which DALI ignores
        orientation = 1
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def _tiff_kind(tags: dict[str, tuple[int, ...]]) -> str | None:
    """Return the kind of values that may need a range from ``Levels``, or None for 8-bit ones."""
    bits, sample_format = tags["bits"][0], tags["sample_format"][0]
    if sample_format == 3:
        return "float"
    if sample_format == 2:
        return f"signed {bits}-bit"
    return f"{bits}-bit" if bits > 8 and tags["photometric"] != (5,) else None


def _check_tiff(tags: dict[str, tuple[int, ...]]) -> None:
    """Raise Unreadable for unsupported TIFFs, which Pillow would refuse without a reason or read wrongly."""
    photometric, bits, samples, extra = (tags[name] for name in ("photometric", "bits", "samples", "extra"))
    if photometric[0] not in _BASE_BANDS:
        raise Unreadable(
            f"a TIFF with photometric interpretation {photometric[0]}; sslx reads gray, RGB, palette, CMYK"
        )
    num_extra = samples[0] - _BASE_BANDS[photometric[0]]
    alpha = extra in ((1,), (2,)) or (photometric == (2,) and extra in ((), (0,)))
    if num_extra < 0 or num_extra > 1 or (num_extra == 1 and not alpha):
        raise Unreadable(f"a TIFF with {samples[0]} bands; sslx reads gray and RGB, with or without alpha")
    if tags["planar"] == (2,) and max(bits) > 8:
        raise Unreadable(f"a TIFF whose {max(bits)}-bit colors are in separate planes; sslx reads interleaved ones")
    if photometric == (6,) and tags["compression"] == (1,) and tags["subsampling"] != (1, 1):
        raise Unreadable("a TIFF with uncompressed, subsampled YCbCr, which sslx does not read")
    if extra[:1] == (1,) and max(bits) > 8:
        raise Unreadable(
            f"a TIFF with {max(bits)}-bit colors that are multiplied by their alpha, which sslx does not read"
        )


def _name(container: str, file: BinaryIO) -> str:
    """Return the name of a file that cannot be decoded, for messages."""
    if container != "TIFF":
        return f"a {container}"
    tags = headers.tiff_tags(file.fileno())
    what = {2: "signed integers", 3: "floats"}.get(tags["sample_format"][0], "integers")
    return f"a TIFF of {tags['samples'][0]} x {tags['bits'][0]}-bit {what}"
