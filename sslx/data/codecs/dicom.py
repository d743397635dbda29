"""DICOM: one frame of an image, with the values that its modality defines, by pydicom.

Stored values become those of the modality, such as Hounsfield units: rescale slope and intercept, or the modality's
table, are applied, because they may differ from file to file, and the same tissue would then have other values.
Windows (VOI) are not applied: they are a choice for viewing, differ between files, and cut values off.  Black and white
are measured for each modality by itself (``Levels``).  Whole numbers stay whole numbers of 16 bits where these suffice.
Palettes and YBR become RGB.
"""

import os
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sslx.console.words import shown
from sslx.data.codecs.headers import Unreadable, check_size
from sslx.data.codecs.values import Values, finite, library

_WITH_PALETTE = "PALETTE COLOR"
_PHOTOMETRIC = (
    "MONOCHROME1", "MONOCHROME2", _WITH_PALETTE, "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT",
)  # fmt: skip
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_INTEGERS = (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64)
_DECODERS = "python-gdcm"


def values(file: BinaryIO, frame: int) -> Values:
    """Return the values of a frame, counted from 0."""
    header = _header(file, frame)
    kind, stated = _kind(header)
    file.seek(0)
    stored = _stored(file, header, frame)
    photometric = str(header.PhotometricInterpretation)
    if photometric == _WITH_PALETTE:
        colors = library("pydicom.pixels", "a DICOM file", "pydicom").apply_color_lut(stored, header)
        return _color(colors[..., :3])
    if stored.ndim == 3:
        return Values(stored, kind, stated)
    return Values(finite(_of_modality(stored, header, frame)), kind, stated, photometric == "MONOCHROME1")


def kind(file: BinaryIO, frame: int) -> str | None:
    """Return, from the header alone, the kind of values whose range the file does not imply, or None."""
    name, stated = _kind(_header(file, frame))
    return None if stated else name


def size(file: BinaryIO) -> tuple[int, int, int]:
    """Return height, width and number of frames, from the header alone."""
    header = _header(file, 0)
    return int(header.Rows), int(header.Columns), int(header.get("NumberOfFrames") or 1)


def _header(file: BinaryIO, frame: int) -> Any:
    """Return the elements before the pixels.  Raises Unreadable if there are no pixels, too many, or no such frame."""
    pydicom = library("pydicom", "a DICOM file", "pydicom")
    if _DEFLATED in os.pread(file.fileno(), 2048, 0):  # pydicom would inflate it without a limit
        raise Unreadable("a DICOM file that is deflated as a whole, which sslx does not read: dcmconv +te inflates it")
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True)
    if not (header.get("Rows") and header.get("Columns") and header.get("PhotometricInterpretation")):
        raise Unreadable(f"a DICOM file without an image ({shown(header.get('Modality') or 'of no modality')})")
    if header.PhotometricInterpretation not in _PHOTOMETRIC:
        raise Unreadable(f"a DICOM file of {shown(header.PhotometricInterpretation)}, which sslx does not read")
    pixel_bytes = int(header.get("SamplesPerPixel") or 1) * -(-int(header.get("BitsAllocated") or 64) // 8)
    check_size(int(header.Columns), int(header.Rows), pixel_bytes)
    num_frames = int(header.get("NumberOfFrames") or 1)
    if frame >= num_frames:
        raise Unreadable(f"it has {num_frames} frames, of which --data.page {frame} is none: the first one is frame 0")
    return header


def _stored(file: BinaryIO, header: Any, frame: int) -> npt.NDArray[Any]:
    """Return the stored values of a frame, (H, W) or (H, W, 3), colors as RGB."""
    pixels = library("pydicom.pixels", "a DICOM file", "pydicom")
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not pixels.get_decoder(syntax).is_available:
        raise Unreadable(f"a DICOM file in {syntax.name}, for which pydicom needs a decoder: pip install {_DECODERS}")
    try:
        stored = np.asarray(pixels.pixel_array(file, index=frame))
    except (NotImplementedError, RuntimeError) as error:
        if syntax.is_encapsulated and "gdcm" not in pixels.get_decoder(syntax).available_plugins:
            raise Unreadable(
                f"a DICOM file in {syntax.name} that the installed decoders do not decode: it is damaged, or needs "
                f"another one: pip install {_DECODERS}"
            ) from error
        raise
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _kind(header: Any) -> tuple[str | None, tuple[float, float] | None]:
    """Return the kind of a file's values, None for uint8 from black to white, and the range that the file implies."""
    bits, is_signed = int(header.get("BitsStored") or 64), header.get("PixelRepresentation", 0) == 1
    photometric = str(header.PhotometricInterpretation)
    if photometric == _WITH_PALETTE:
        bits = int(header.RedPaletteColorLookupTableDescriptor[2])
        return _of_bits(bits, bits)
    is_color = int(header.get("SamplesPerPixel") or 1) > 1
    if not is_signed and (is_color or (bits <= 8 and not _is_rescaled(header))):
        return _of_bits(bits, int(header.BitsAllocated))
    return f"DICOM {shown(header.get('Modality') or 'of no modality')}", None


def _of_bits(bits: int, allocated: int = 8) -> tuple[str | None, tuple[float, float] | None]:
    return (None, None) if bits == allocated == 8 else (f"{bits}-bit", (0.0, 2.0**bits - 1))


def _color(colors: npt.NDArray[Any]) -> Values:
    """Return colors of a palette, (H, W, 3) uint8 or uint16."""
    bits = 8 * colors.dtype.itemsize
    return Values(np.ascontiguousarray(colors), *_of_bits(bits, bits))


def _is_rescaled(header: Any) -> bool:
    return bool(header.get("ModalityLUTSequence")) or _rescale(header, 0) != (1.0, 0.0)


def _rescale(header: Any, frame: int) -> tuple[float, float]:
    """Return slope and intercept of a frame.  Files of several frames may have them by frame, or for all frames."""
    for group in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        items = header.get(group) or []
        item = items[min(frame, len(items) - 1)] if items else {}
        if inner := item.get("PixelValueTransformationSequence"):
            header = inner[0]
            break
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _of_modality(stored: npt.NDArray[Any], header: Any, frame: int) -> npt.NDArray[Any]:
    """Return the values that the modality defines: of the smallest type of integers for all values, or float32."""
    if header.get("ModalityLUTSequence"):
        return library("pydicom.pixels", "a DICOM file", "pydicom").apply_modality_lut(stored, header)
    slope, intercept = _rescale(header, frame)
    if (slope, intercept) == (1.0, 0.0):
        return stored
    if not (slope.is_integer() and intercept.is_integer() and stored.dtype.kind in "iu"):
        return (stored * np.float64(slope) + intercept).astype(np.float32)
    rescaled = stored.astype(np.int64) * int(slope) + int(intercept)
    low, high = int(rescaled.min()), int(rescaled.max())
    dtype = next(kind for kind in _INTEGERS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    return rescaled.astype(dtype)
