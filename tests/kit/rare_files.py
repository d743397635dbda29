"""Image files of the rarer formats, each with the picture that it holds or the words that it is refused with."""

import io
import struct
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, features

from kit.image_files import BIG, LENGTH, LITTLE, SIDE, Array, Kinds, encoded, exif, grays, segment, smooth, tiff, turned

HAS_AVIF = bool(features.check("avif"))
EXPLICIT, IMPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"


def dicom(
    pixels: Array,
    *,
    photometric: str = "MONOCHROME2",
    stored: int = 0,
    rescale: tuple[float, float] | None = None,
    modality: str = "OT",
    planar: bool = False,
    syntax: str = EXPLICIT,
    rows: int = 0,
) -> bytes:
    """A DICOM file by the standard's part 10, written here.

    pixels: (H, W), (H, W, 3) or several frames (N, H, W) of integers.  stored: the bits of a value; default: all.
    rescale: slope and intercept.  rows: what the file says instead of H.
    """
    bands = pixels.shape[-1] if pixels.ndim == 3 and pixels.shape[-1] == 3 else 1
    num_frames = len(pixels) if pixels.ndim == 3 and bands == 1 else 1
    height, width = pixels.shape[-2:] if bands == 1 else pixels.shape[:2]
    bits = 8 * pixels.dtype.itemsize
    data = (pixels.transpose(2, 0, 1) if planar else pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    elements: list[tuple[int, int, str, bytes]] = [
        (8, 0x60, "CS", modality.encode()),
        (0x28, 2, "US", struct.pack("<H", bands)),
        (0x28, 4, "CS", photometric.encode()),
        *([(0x28, 6, "US", struct.pack("<H", planar))] if bands > 1 else []),
        *([(0x28, 8, "IS", str(num_frames).encode())] if num_frames > 1 else []),
        (0x28, 0x10, "US", struct.pack("<H", rows or height)),
        (0x28, 0x11, "US", struct.pack("<H", width)),
        (0x28, 0x100, "US", struct.pack("<H", bits)),
        (0x28, 0x101, "US", struct.pack("<H", stored or bits)),
        (0x28, 0x102, "US", struct.pack("<H", (stored or bits) - 1)),
        (0x28, 0x103, "US", struct.pack("<H", pixels.dtype.kind == "i")),
    ]
    if rescale:
        slope, intercept = rescale
        elements += [(0x28, 0x1052, "DS", f"{intercept:g}".encode()), (0x28, 0x1053, "DS", f"{slope:g}".encode())]
    elements.append((0x7FE0, 0x10, "OW", data))
    meta = _element(2, 0x10, "UI", syntax.encode())
    body = b"".join(_element(*element) for element in elements)
    return bytes(128) + b"DICM" + _element(2, 0, "UL", struct.pack("<I", len(meta))) + meta + body


def _element(group: int, number: int, kind: str, value: bytes) -> bytes:
    value += (b"\0" if kind in ("UI", "OW") else b" ") * (len(value) % 2)
    length = struct.pack("<HI", 0, len(value)) if kind == "OW" else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + length + value


def npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def heif(image: Image.Image | npt.NDArray[np.uint16]) -> bytes:
    """A lossless HEIC file of 8 bits, or of 10 bits of (H, W, 3) values up to 1023."""
    library: Any = import_module("pillow_heif")
    if isinstance(image, Image.Image):
        made = library.from_pillow(image)
    else:
        made = library.from_bytes("RGB;16", image.shape[1::-1], (image << 6).tobytes())
    file = io.BytesIO()
    made.save(file, quality=-1, chroma=444)
    return file.getvalue()


def sized(content: bytes, width: int, height: int) -> bytes:
    """An AVIF or HEIF file that says to be of another size."""
    at = content.index(b"ispe") + 8
    return content[:at] + struct.pack(">II", width, height) + content[at + 8 :]


def gifs(rng: np.random.Generator) -> Kinds:
    rgb = rng.integers(0, 256, (SIDE, LENGTH, 3)).astype(np.uint8)
    palette = Image.fromarray(rgb).quantize(32)
    colors = np.asarray(palette.convert("RGB"))
    plain = encoded(palette, "GIF")
    later = [Image.fromarray(255 - rgb).quantize(32)]
    return {
        "plain": (plain, colors),
        "gray": (encoded(rgb[..., 0], "GIF"), grays(rgb[..., 0])),
        "interlaced": (encoded(palette, "GIF", interlace=1), colors),
        "transparent": (encoded(palette, "GIF", transparency=3), colors),
        "frames": (encoded(palette, "GIF", save_all=True, append_images=later, duration=40), colors),
        "cut": (plain[: len(plain) // 2], "GIF"),
        "bomb": (plain[:6] + b"\xff\xff\xff\xff" + plain[10:], "65,535 x 65,535 pixels"),
    }


def dicoms(rng: np.random.Generator) -> Kinds:
    """DICOM files: of CT, with 12 of 16 bits and an intercept, whose black and white are measured; and others."""
    gray = rng.integers(0, 256, (SIDE, LENGTH)).astype(np.uint8)
    rgb = rng.integers(0, 256, (SIDE, LENGTH, 3)).astype(np.uint8)
    deep = rng.integers(0, 4096, (SIDE, LENGTH)).astype(np.uint16)
    deep[0, :2] = 0, 4095
    signed = (rng.integers(0, 2001, (SIDE, LENGTH)) - 1000).astype(np.int16)
    signed[0, :2] = -1000, 1000
    frames = np.stack([gray, 255 - gray])
    expected = grays(np.rint(deep / 4095 * 255))
    kinds: Kinds = {
        "gray": (dicom(gray), grays(gray)),
        "white_first": (dicom(255 - gray, photometric="MONOCHROME1"), grays(gray)),
        "rgb": (dicom(rgb, photometric="RGB"), rgb),
        "planar": (dicom(rgb, photometric="RGB", planar=True), rgb),
        "frames": (dicom(frames), grays(gray)),
        "ct": (dicom(deep, stored=12, rescale=(1, -1024), modality="CT"), expected),
        "ct_signed": (dicom(deep.astype(np.int16) - 1024, stored=16, modality="CT"), expected),
        "ct_white_first": (
            dicom(4095 - deep, stored=12, rescale=(1, -1024), modality="CT", photometric="MONOCHROME1"),
            expected,
        ),
        "pt": (dicom(signed, rescale=(0.25, 1.5), modality="PT"), grays(np.rint((signed + 1000.0) / 2000 * 255))),
        "7_bits": (dicom((gray // 2).astype(np.uint8), stored=7), grays(np.rint(gray // 2 / 127 * 255))),
        "16_bits_rgb": (dicom(rgb.astype(np.uint16) * 257, photometric="RGB"), rgb),
        "bomb": (dicom(np.repeat(gray, 1000, axis=1), rows=60000), "52,000 x 60,000 pixels"),
        "cut": (dicom(gray)[:-500], "DICOM"),
        "deflated": (dicom(gray, syntax=DEFLATED), "deflated"),
        "no_header": (dicom(gray)[132 + 12 + 28 :], "without the header"),
        "colors": (dicom(rgb, photometric="HSV"), "HSV"),
    }
    if not find_spec("pydicom"):
        return {name: (content, "pip install pydicom") for name, (content, _) in kinds.items() if name != "no_header"}
    return kinds


def arrays(rng: np.random.Generator) -> Kinds:
    rgb = rng.integers(0, 256, (SIDE, LENGTH, 3)).astype(np.uint8)
    wide = rng.integers(0, 65536, (SIDE, LENGTH, 3)).astype(np.uint16)
    narrow = np.rint(wide / 257).astype(np.uint8)
    bomb = (
        b"\x93NUMPY\1\0"
        + struct.pack("<H", 118)
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (20000, 20000), }"
    )
    unit = (rgb / np.float32(255)).astype(np.float32)
    return {
        "gray": (npy(rgb[..., 0]), grays(rgb[..., 0])),
        "rgb": (npy(rgb), rgb),
        "bands_first": (npy(np.ascontiguousarray(np.moveaxis(rgb, -1, 0))), rgb),
        "by_columns": (npy(np.asfortranarray(rgb)), rgb),
        "one_band": (npy(rgb[..., :1]), grays(rgb[..., 0])),
        "16_bits": (npy(wide[..., 0]), grays(narrow[..., 0])),
        "16_bits_big_endian": (npy(wide.astype(">u2")), narrow),
        "float": (npy(unit), rgb),
        "float_64": (npy(unit.astype(np.float64)), rgb),
        "bool": (npy(rgb[..., 0] > 127), grays(np.where(rgb[..., 0] > 127, 255, 0))),
        "huge": (npy(unit[..., 0].astype(np.float64) * 1e300), "not finite"),
        "5_bands": (npy(rng.integers(0, 256, (SIDE, LENGTH, 5)).astype(np.uint8)), "5 channels"),
        "images": (npy(np.stack([rgb, rgb])), "--source.name arrays"),
        "words": (npy(np.array(["a", "b"])), "expected (H, W)"),
        "cut": (npy(rgb)[:-1], "cut"),
        "bomb": (bomb.ljust(127) + b"\n" + bytes(300), "20,000 x 20,000 pixels"),
    }


def phones(rng: np.random.Generator) -> Kinds:
    """AVIF and HEIC files, where the libraries that write them are installed."""
    rgb = smooth(rng)
    image = Image.fromarray(rgb)
    ten = rng.integers(0, 1024, (SIDE, LENGTH, 3)).astype(np.uint16)
    narrow = np.rint(ten / 1023 * 255).astype(np.uint8)
    kinds: Kinds = {}
    if HAS_AVIF:
        lossy: dict[str, Any] = {"quality": 95, "subsampling": "4:4:4"}
        plain = encoded(image, "AVIF", **lossy)
        kinds |= {
            "lossy.avif": (plain, rgb),
            "lossy_turned.avif": (encoded(image, "AVIF", exif=exif(6, BIG), **lossy), turned(rgb, 6)),
            "bomb.avif": (sized(plain, 16_000, 15_000), "16,000 x 15,000 pixels"),
            "cut.avif": (plain[: len(plain) // 2], "AVIF"),
        }
        if find_spec("imagecodecs"):
            codecs: Any = import_module("imagecodecs")
            deep = codecs.avif_encode(ten, level=100, bitspersample=10, pixelformat="444")
            kinds["10_bits.avif"] = bytes(deep), narrow
    if find_spec("pillow_heif"):
        kinds |= {
            "plain.heic": (heif(image), rgb),
            "10_bits.heic": (heif(ten), narrow),
            "cut.heic": (heif(image)[:-300], "HEIF"),
        }
    return kinds


def deep(rng: np.random.Generator) -> Kinds:
    """JPEG and JPEG 2000 files of more than 8 bits, where imagecodecs is installed, which writes them."""
    if not find_spec("imagecodecs"):
        return {}
    codecs: Any = import_module("imagecodecs")
    rgb = smooth(rng)
    twelve = rgb.astype(np.uint16) * 16
    scaled = np.rint(twelve / 4095 * 255)
    wide = rng.integers(0, 65536, (SIDE, LENGTH, 3)).astype(np.uint16)
    narrow = np.rint(wide / 257).astype(np.uint8)
    jpeg = bytes(codecs.jpeg8_encode(twelve, level=97, bitspersample=12, subsampling="444"))
    gray = bytes(codecs.jpeg8_encode(twelve[..., 0].copy(), level=97, bitspersample=12))
    about = segment(0xE1, b"Exif\0\0" + exif(5, LITTLE))
    return {
        "lossy_12_bits.jpg": (jpeg, scaled),
        "lossy_12_bits_gray.jpg": (gray, grays(scaled[..., 0])),
        "lossy_12_bits_turned.jpg": (jpeg[:2] + about + jpeg[2:], turned(scaled, 5)),
        "12_bits_cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "16_bits.jp2": (bytes(codecs.jpeg2k_encode(wide, reversible=True, level=0)), narrow),
        "16_bits_cut.jp2": (bytes(codecs.jpeg2k_encode(wide, reversible=True, level=0))[:4000], "JPEG 2000"),
        "12_bits.jp2": (
            bytes(codecs.jpeg2k_encode(wide >> 4, reversible=True, level=0, bitspersample=12)),
            np.rint((wide >> 4) / 4095 * 255),
        ),
    }


def bands(rng: np.random.Generator) -> Kinds:
    """TIFF files that Pillow does not read."""
    wide = rng.integers(0, 65536, (SIDE, LENGTH, 4)).astype(np.uint16)
    rgb = wide[..., :3]
    narrow = np.rint(rgb / 257).astype(np.uint8)
    unit = (rgb / np.float32(65535)).astype(np.float32)
    kinds: Kinds = {
        "planar_16": (tiff(rgb, planar=True), narrow),
        "planar_16_big_endian": (tiff(rgb, planar=True, order=BIG), narrow),
        "float_rgb": (tiff(unit), narrow),
        "float_planar": (tiff(unit, planar=True), narrow),
        "float_64": (tiff(unit[..., :1].astype(np.float64)), grays(narrow[..., 0])),
        "three_bands": (tiff(rgb, photometric=1), narrow),
        "rgb_and_one": (tiff(wide, photometric=2), narrow),
        "cut_planar": (tiff(rgb, planar=True)[:8000], "TIFF"),
    }
    if not find_spec("tifffile"):
        return {name: (content, "pip install tifffile") for name, (content, _) in kinds.items()}
    return kinds


def rare_kinds() -> Kinds:
    """Files of all of these kinds by name, of fresh content."""
    rng = np.random.default_rng()
    kinds: Kinds = {}
    made = ((gifs, ".gif"), (dicoms, ".dcm"), (arrays, ".npy"), (phones, ""), (deep, ""), (bands, ".tif"))
    for make, suffix in made:
        kinds |= {
            f"{make.__name__}_{name}{suffix}": cast("tuple[bytes, Array | str]", k) for name, k in make(rng).items()
        }
    return kinds
