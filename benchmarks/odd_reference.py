"""What other readers make of an odd image file: the reference of ``bench_odd_files``, without any code of sslx.

DICOM is read by pydicom, NPY by numpy, TIFF by tifffile where Pillow would cut values to 8 bits or not read them,
JPEG, JPEG 2000 and AVIF of more than 8 bits by imagecodecs, HEIC by pillow-heif, everything else by Pillow.
"""

import io
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Array = npt.NDArray[Any]
_ALPHA = (1, 2)
_MAX_PIXELS = 178_956_970  # as in sslx
warnings.simplefilter("ignore")


def read(path: Path) -> Array:
    """Return the values of an image, (H, W) or (H, W, C), upright, RGB if it has color; of uint8, these are pixels.

    Raises Exception, of any kind, for a file that the readers cannot read.
    """
    content = path.read_bytes()
    if content[128:132] == b"DICM":
        return _dicom(content)
    if content.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        return np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] < min(array.shape[1:]) else array
    if content[4:8] == b"ftyp" and b"avif" not in content[8:64]:
        heif: Any = import_module("pillow_heif")
        return np.array(heif.open_heif(io.BytesIO(content), convert_hdr_to_8bit=False, hdr_to_16bit=False))
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(content)
    if (deep := _deep(content)) is not None:
        return deep
    return _by_pillow(content)


def _by_pillow(content: bytes) -> Array:
    with Image.open(io.BytesIO(content)) as opened:
        if opened.width * opened.height > _MAX_PIXELS:
            raise ValueError("too many pixels")
        opened.load()
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # damaged EXIF is ignored
            image = opened
        if image.mode.startswith("I") or image.mode == "F":
            return np.asarray(image)
        return np.asarray(image.convert("RGB"))


def _deep(content: bytes) -> Array | None:
    """Return the values of a file of more than 8 bits that Pillow would cut, or None."""
    codecs: Any = import_module("imagecodecs")
    if content.startswith(b"\x89PNG") and content[24] == 16:
        Image.open(io.BytesIO(content)).load()  # libpng of imagecodecs accepts damaged files
        array = codecs.png_decode(content)
    elif content.startswith(b"\xff\xd8"):
        at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc1"))
        if at < 0 or content[at + 4] <= 8:
            return None
        if b"\xff\xd9" not in content[-100:]:
            raise ValueError("truncated")
        array = codecs.jpeg8_decode(content)
    elif b"\xff\x4f\xff\x51" in content[:4096]:
        at = content.index(b"\xff\x4f\xff\x51")
        if content[at + 42] & 0x7F < 8:
            return None
        array = codecs.jpeg2k_decode(content)
    elif content[4:8] == b"ftyp":
        array = codecs.avif_decode(content)
        array = array[0] if array.ndim == 4 else array
        if array.dtype == np.uint8:
            return None
    else:
        return None
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = array[..., 0] if array.shape[2] == 2 else array[..., :3]
    return array


def _tiff(content: bytes) -> Array:
    tifffile: Any = import_module("tifffile")
    with tifffile.TiffFile(io.BytesIO(content)) as opened:
        page = opened.pages[0]
        bits, photometric = np.max(page.bitspersample), int(page.photometric)
        alpha = sum(int(extra) in _ALPHA for extra in page.extrasamples)
        is_usual = page.samplesperpixel - alpha in (1, 3) or photometric in (3, 5, 6)
        if photometric == 3 or (bits <= 8 and page.sampleformat == 1 and is_usual):
            return _by_pillow(content)
        if page.imagewidth * page.imagelength > _MAX_PIXELS:
            raise ValueError("too many pixels")
        array, axes = page.asarray(maxworkers=1), page.axes
        if axes == "SYX":
            array = np.moveaxis(array, 0, -1)
        if photometric == 5:
            light = 65535 - array.astype(np.float64)
            return np.rint(light[..., :3] * light[..., 3:] / 65535).astype(np.uint16)
        kept = 3 if photometric == 2 and page.samplesperpixel == 4 else page.samplesperpixel - alpha
        array = array[..., :kept] if array.ndim == 3 else array
        if photometric == 0:
            array = array.max() - array
        tag = page.tags.get(274)
        return _turned(array, int(tag.value) if tag else 1)


def _turned(array: Array, orientation: int) -> Array:
    turns = {2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
    quarters, mirrored = turns.get(orientation, (0, 0))
    turned = np.rot90(array, quarters)
    return turned[:, ::-1] if mirrored else turned


def _dicom(content: bytes) -> Array:
    pydicom: Any = import_module("pydicom")
    processing: Any = import_module("pydicom.pixels.processing")
    dataset = pydicom.dcmread(io.BytesIO(content))
    array = np.asarray(dataset.pixel_array)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        array = array[0]
    if dataset.get("BitsStored", 8) < 8:
        array = array.astype(np.uint16)  # whose full scale is not 255
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        return processing.apply_color_lut(array, dataset)
    if array.ndim == 2:
        array = processing.apply_modality_lut(array, dataset)
        return -array if photometric == "MONOCHROME1" else array
    return array
