"""A thousand odd image files for ``bench_odd_files``: those that other packages ship for their tests, and made ones.

None of them is in this repository: Pillow's come with its source distribution, pydicom's with the installed package.
"""

import io
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

Array = npt.NDArray[Any]
_HEIGHT, _WIDTH = 45, 64
_SHIPPED = "Tests/images/"
_TIFF_CODINGS = (None, "lzw", "deflate", "packbits", "zstd")


def pillow_tests(place: Path) -> list[Path]:
    """Download Pillow's source distribution, of the installed version, and return the files of its tests."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow"]
    subprocess.run([*command, "--dest", str(place), f"pillow=={version('pillow')}"], check=True)
    (archive,) = place.glob("[Pp]illow-*.tar.gz")
    folder = place / "pillow"
    with tarfile.open(archive) as members:
        for member in members:
            _, _, name = member.name.partition(_SHIPPED)
            if name and member.isreg():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = members.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    return sorted(path for path in folder.rglob("*") if path.is_file())


def pydicom_tests() -> list[Path]:
    """Return the files of the installed pydicom's tests."""
    found = find_spec("pydicom")
    assert found is not None
    assert found.origin is not None
    return sorted(path for path in (Path(found.origin).parent / "data" / "test_files").rglob("*") if path.is_file())


def made(place: Path, seed: int) -> list[Path]:
    """Write files of all kinds, and damaged copies of each; return their paths."""
    rng = np.random.default_rng(seed)
    place.mkdir()
    for name, content in _good(rng):
        stem, _, suffix = name.rpartition(".")
        (place / name).write_bytes(content)
        for number in range(2):
            at = int(rng.integers(1, len(content)))
            (place / f"{stem}_cut_{number}.{suffix}").write_bytes(content[:at])
        for number in range(3):
            flipped = bytearray(content)
            for at in rng.integers(0, len(content), 1 + 3 * number):
                flipped[at] ^= 1 << int(rng.integers(8))
            (place / f"{stem}_flipped_{number}.{suffix}").write_bytes(flipped)
        (place / f"{stem}_named_wrongly.{'png' if suffix != 'png' else 'jpg'}").write_bytes(content)
    for name, content in _extremes(rng):
        (place / name).write_bytes(content)
    return sorted(place.iterdir())


def _good(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of undamaged files."""
    for kinds in (_of_pillow, _tiffs, _arrays, _dicoms, _by_other_libraries):
        yield from kinds(rng)


def _photo(rng: np.random.Generator, dtype: Any = np.uint8, bands: int = 3) -> Array:
    """Return (45, 64, bands) values over the whole range of an integer type, smooth with some noise."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    waves = [np.sin(x / rng.uniform(3, 20) + band) * np.cos(y / rng.uniform(3, 20)) for band in range(bands)]
    values = np.stack(waves, axis=-1) + rng.normal(0, 0.05, (_HEIGHT, _WIDTH, bands))
    values = (values - values.min()) / (values.max() - values.min())
    if np.dtype(dtype).kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return (limits.min + values * (float(limits.max) - limits.min)).astype(dtype)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _of_pillow(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    rgb = Image.fromarray(_photo(rng))
    for orientation in range(1, 9):
        about = Image.Exif()
        about[0x112] = orientation
        for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
            yield f"turned_{orientation}_{kind}.{suffix}", _saved(rgb, kind, exif=about)
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "YCbCr"):
        image = rgb.convert(mode)
        for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("BMP", "bmp")):
            try:
                yield f"{mode}_{kind}.{suffix}", _saved(image, kind)
            except (OSError, KeyError):  # a mode that the format does not have
                continue
    yield "progressive.jpg", _saved(rgb, "JPEG", progressive=True, quality=60)
    yield "palette.gif", _saved(rgb.quantize(40), "GIF")
    yield "frames.gif", _saved(rgb.quantize(40), "GIF", save_all=True, append_images=[rgb.rotate(180).quantize(9)])
    yield "lossless.webp", _saved(rgb, "WEBP", lossless=True)
    yield "reversible.jp2", _saved(rgb, "JPEG2000", irreversible=False)
    yield "irreversible.jp2", _saved(rgb, "JPEG2000", irreversible=True, quality_layers=[20])
    for bits in (1, 2, 4):
        yield f"palette_of_{bits}_bits.png", _saved(rgb.quantize(2**bits), "PNG", bits=bits)
    yield "gray_16_bits.png", _saved(Image.fromarray(_photo(rng, np.uint16, 1)[..., 0]), "PNG")
    for bands, color in ((2, 4), (3, 2), (4, 6)):
        yield f"{bands}_bands_16_bits.png", _png(_photo(rng, np.uint16, bands), color)
    if features.check("avif"):
        yield "lossy.avif", _saved(rgb, "AVIF", quality=80)
        yield "alpha.avif", _saved(rgb.convert("RGBA"), "AVIF", quality=80)


def _png(pixels: Array, color: int) -> bytes:
    """Return a PNG of 16 bits, which Pillow does not write in colors."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _tiffs(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    tifffile: Any = import_module("tifffile")
    number = 0
    for dtype in (np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64):
        for bands in (1, 2, 3, 4, 5, 12):
            for planar in ("contig", "separate") if bands > 1 else ("contig",):
                pixels = _photo(rng, dtype, bands)
                stored = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar == "separate" else pixels
                number += 1
                file = io.BytesIO()
                tifffile.imwrite(
                    file, stored if bands > 1 else pixels[..., 0], planarconfig=planar if bands > 1 else None,
                    photometric="rgb" if bands == 3 else "minisblack", byteorder="<>"[number % 2],
                    compression=_TIFF_CODINGS[number % len(_TIFF_CODINGS)],
                    tile=(16, 32) if number % 3 == 0 else None,
                )  # fmt: skip
                yield f"{np.dtype(dtype).name}_{bands}_{planar}.tif", file.getvalue()
    file = io.BytesIO()
    tifffile.imwrite(file, _photo(rng, np.uint16, 4), photometric="separated")
    yield "cmyk_16_bits.tif", file.getvalue()
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for _ in range(3):
            writer.write(_photo(rng, np.uint16), photometric="rgb")
    yield "pages.tif", file.getvalue()


def _arrays(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for dtype in (np.uint8, np.uint16, np.int16, np.float32, np.float64):
        for bands in (1, 3, 7):
            file = io.BytesIO()
            pixels = _photo(rng, dtype, bands)
            np.save(file, pixels[..., 0] if bands == 1 else pixels)
            yield f"{np.dtype(dtype).name}_{bands}.npy", file.getvalue()


def _dicoms(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    pydicom: Any = import_module("pydicom")
    uid: Any = import_module("pydicom.uid")
    for dtype, bands, rescale in (
        (np.uint8, 1, None), (np.uint8, 3, None), (np.uint16, 1, None), (np.uint16, 1, (1, -1024)),
        (np.int16, 1, None), (np.int16, 1, (0.37, 12.5)), (np.uint16, 3, None),
    ):  # fmt: skip
        pixels = _photo(rng, dtype, bands)
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = uid.SecondaryCaptureImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid.generate_uid()
        dataset.Modality, dataset.Rows, dataset.Columns = "CT", *pixels.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = bands, "RGB" if bands == 3 else "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
        dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
        if bands == 3:
            dataset.PlanarConfiguration = 0
        if rescale:
            dataset.RescaleSlope, dataset.RescaleIntercept = rescale
        dataset.PixelData = pixels.tobytes()
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        yield f"{np.dtype(dtype).name}_{bands}_{'rescaled' if rescale else 'stored'}.dcm", file.getvalue()


def _by_other_libraries(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    codecs: Any = import_module("imagecodecs")
    twelve = _photo(rng, np.uint16) >> 4
    yield "12_bits.jpg", bytes(codecs.jpeg8_encode(twelve, level=95, bitspersample=12))
    yield "12_bits_gray.jpg", bytes(codecs.jpeg8_encode(twelve[..., 0].copy(), level=95, bitspersample=12))
    for bands in (1, 3):
        pixels = _photo(rng, np.uint16, bands)
        pixels = pixels[..., 0].copy() if bands == 1 else pixels
        yield f"{bands}_bands_16_bits.jp2", bytes(codecs.jpeg2k_encode(pixels, reversible=True, level=0))
    for bits in (10, 12):
        deep = _photo(rng, np.uint16) >> (16 - bits)
        yield f"{bits}_bits.avif", bytes(codecs.avif_encode(deep, level=95, bitspersample=bits, pixelformat="444"))
    if find_spec("pillow_heif"):
        heif: Any = import_module("pillow_heif")
        for name, image in (
            ("8_bits", heif.from_pillow(Image.fromarray(_photo(rng)))),
            ("10_bits", heif.from_bytes("RGB;16", (_WIDTH, _HEIGHT), _photo(rng, np.uint16).tobytes())),
        ):
            file = io.BytesIO()
            image.save(file, quality=-1, chroma=444)
            yield f"{name}.heic", file.getvalue()


def _extremes(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield images of 1 pixel and of 30,000 x 1, files of zeros and of nothing, and bombs."""
    writers: dict[str, Callable[[Image.Image], bytes]] = {
        kind: lambda image, kind=kind: _saved(image, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "JPEG2000")
    }
    for width, height in ((1, 1), (30_000, 1), (1, 30_000), (7, 3)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for kind, write in writers.items():
            yield f"{width}x{height}_{kind}", write(image)
    for size in (0, 1, 64, 5000):
        yield f"{size}_zeros.png", bytes(size)
    png = bytearray(_png(_photo(rng, np.uint16), 2))
    png[16:24] = struct.pack(">II", 40_000, 40_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    yield "bomb.png", bytes(png)
    image = Image.fromarray(_photo(rng))
    for kind, at, packed in (
        ("GIF", 6, struct.pack("<HH", 60_000, 60_000)),
        ("BMP", 18, struct.pack("<ii", 40_000, 40_000)),
    ):
        content = bytearray(writers[kind](image))
        content[at : at + len(packed)] = packed
        yield f"bomb.{kind.lower()}", bytes(content)
    jpeg = bytearray(writers["JPEG"](image))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    yield "bomb.jpg", bytes(jpeg)
    file = io.BytesIO()
    np.save(file, np.zeros((9, 9), np.uint8))
    yield "bomb.npy", file.getvalue().replace(b"(9, 9)", b"(99999, 99999)").replace(b" " * 12, b" " * 4, 1)
