"""Image files of every kind, each with the picture that it was made from or the words that it is refused with."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE, LENGTH = 40, 52
"""Height and width of the pictures: not square, so that a turn shows in their shapes too."""
Array = npt.NDArray[Any]
Order = Literal["<", ">"]
LITTLE: Order = "<"
BIG: Order = ">"


def encoded(image: Image.Image | Array, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(pixels: Array, bits: int, color_type: int, *, before: bytes = b"", behind: bytes = b"") -> bytes:
    """pixels: (H, W, bands), of 8 or 16 bits.  before, behind: chunks around the pixels' own."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(f">u{bits // 8}").tobytes() for line in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(lines)) + behind + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(pixels: Array, *, order: Order = LITTLE, photometric: int | None = None, planar: bool = False) -> bytes:
    """pixels: (H, W, bands) of any type.  Not compressed, one strip a plane."""
    height, width, bands = pixels.shape
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    data = (stored.transpose(2, 0, 1) if planar else stored).tobytes()
    strips = bands if planar else 1
    size = len(data) // strips
    photometric = (2 if bands == 3 else 1) if photometric is None else photometric
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = [(256, 3, [width]), (257, 3, [height]), (258, 3, [pixels.dtype.itemsize * 8] * bands), (259, 3, [1])]
    tags += [(262, 3, [photometric]), (273, 4, [8 + i * size for i in range(strips)]), (277, 3, [bands])]
    tags += [(278, 3, [height]), (279, 4, [size] * strips), (284, 3, [1 + planar]), (339, 3, [sample_format] * bands)]
    entries, behind = b"", b""
    start = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", start + len(behind)), behind + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == LITTLE else b"MM\0*"
    head = magic + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + behind


def without(jpeg: bytes, marker: int) -> bytes:
    """A JPEG without the segments of one kind."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
        kept += b"" if jpeg[at + 1] == marker else jpeg[at:end]
        at = end
    return kept + jpeg[at:]


def exif(orientation: int, order: Order) -> bytes:
    """A TIFF directory with an orientation alone."""
    magic = b"II*\0" if order == LITTLE else b"MM\0*"
    return magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def turned(pixels: Array, orientation: int) -> Array:
    """What a viewer shows of stored pixels, by the table in the EXIF standard: where the 0th row and column are."""
    turns: dict[int, Callable[[Array], Array]] = {
        2: lambda p: p[:, ::-1],
        3: lambda p: np.rot90(p, 2),
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }
    return turns.get(orientation, lambda p: p)(pixels)


Kinds = dict[str, tuple[bytes, Array | str]]


def smooth(rng: np.random.Generator) -> Array:
    """A picture that JPEG hardly changes."""
    y, x = np.mgrid[0:SIDE, 0:LENGTH] / LENGTH
    a, b, c = rng.uniform(60, 250, 3)
    return np.stack([a * x, b * (1 - y), c * (x + y) / 2], axis=-1).astype(np.uint8)


def grays(gray: Array) -> Array:
    return np.repeat(gray[..., None], 3, axis=-1)


def jpegs(rng: np.random.Generator) -> Kinds:
    rgb = smooth(rng)
    image = Image.fromarray(rgb)
    good: dict[str, Any] = {"quality": 96, "subsampling": 0}
    plain = encoded(image, "JPEG", **good)
    inks = np.asarray(image.convert("CMYK"))
    kinds: Kinds = {
        "plain": (plain, rgb),
        "less_color": (encoded(image, "JPEG", quality=96, subsampling=2), rgb),
        "progressive": (encoded(image, "JPEG", progressive=True, **good), rgb),
        "gray": (encoded(image.convert("L"), "JPEG", quality=96), grays(np.asarray(image.convert("L")))),
        "cmyk_of_adobe": (encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=96), rgb),
        "cmyk": (without(encoded(Image.fromarray(255 - inks, "CMYK"), "JPEG", quality=96), 0xEE), rgb),
        "rgb_not_ycbcr": (encoded(image, "JPEG", keep_rgb=True, **good), rgb),
        "restarts": (encoded(image, "JPEG", restart_marker_rows=1, **good), rgb),
        "trailing": (plain + rng.bytes(500), rgb),
        "long_header": (plain[:2] + segment(0xEC, rng.bytes(60000)) * 3 + plain[2:], rgb),
        "2_bits": (plain.replace(segment(0xC0, b"")[:2] + b"\0\x11\x08", b"\xff\xc0\0\x11\x02"), "2-bit"),
        "cut": (plain[: len(plain) * 2 // 3], "truncated"),
        "header_only": (plain[:300], "JPEG"),
    }
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
    kinds["turned_by_xmp"] = plain[:2] + segment(0xE1, xmp % 6) + plain[2:], turned(rgb, 6)
    for orientation in range(10):  # 0 and 9 are not allowed, and met
        order: Order = BIG if orientation % 2 else LITTLE
        about = segment(0xE1, b"Exif\0\0" + exif(orientation, order))
        kinds[f"turned_{orientation}"] = plain[:2] + about + plain[2:], turned(rgb, orientation)
    about = segment(0xE1, b"Exif\0\0" + exif(8, BIG)) + segment(0xE1, xmp % 6)  # EXIF comes first
    kinds["turned_by_exif_not_xmp"] = plain[:2] + about + plain[2:], turned(rgb, 8)
    return kinds


def pngs(rng: np.random.Generator) -> Kinds:
    rgb = rng.integers(0, 256, (SIDE, LENGTH, 3)).astype(np.uint8)
    image = Image.fromarray(rgb)
    gray = rgb[..., 0]
    alpha = rng.integers(0, 256, (SIDE, LENGTH, 1)).astype(np.uint8)
    wide = rng.integers(0, 65536, (SIDE, LENGTH, 4)).astype(np.uint16)
    narrow = np.rint(wide / 257).astype(np.uint8)
    palette = image.quantize(16)
    few = np.asarray(palette.convert("RGB"))
    late = chunk(b"eXIf", exif(8, BIG))
    huge = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    plain = encoded(image, "PNG")
    return {
        "plain": (plain, rgb),
        "gray": (encoded(gray, "PNG"), grays(gray)),
        "alpha": (encoded(np.concatenate([rgb, alpha], axis=-1), "PNG"), rgb),
        "gray_alpha": (png(np.concatenate([gray[..., None], alpha], axis=-1), 8, 4), grays(gray)),
        "color_key": (encoded(image, "PNG", transparency=tuple(rgb[0, 0].tolist())), rgb),
        "palette": (encoded(palette, "PNG"), few),
        "palette_of_4_bits": (encoded(palette, "PNG", bits=4), few),
        "transparent_palette": (encoded(palette, "PNG", transparency=bytes(range(16))), few),
        "1_bit": (encoded(gray > 127, "PNG"), grays(np.where(gray > 127, 255, 0))),
        "16_bits": (png(wide[..., :1], 16, 0), grays(narrow[..., 0])),
        "16_bits_alpha": (png(wide[..., :2], 16, 4), grays(narrow[..., 0])),
        "16_bits_rgb": (png(wide[..., :3], 16, 2), narrow[..., :3]),
        "16_bits_rgba": (png(wide, 16, 6), narrow[..., :3]),
        "frames": (encoded(image, "PNG", save_all=True, append_images=[Image.fromarray(255 - rgb)]), rgb),
        "turned": (png(rgb, 8, 2, before=chunk(b"eXIf", exif(6, LITTLE))), turned(rgb, 6)),
        "turned_late": (png(rgb, 8, 2, behind=late), turned(rgb, 8)),
        "trailing": (plain + b"more", rgb),
        "cut": (plain[:-400], "PNG"),
        "no_end": (plain[:-12], rgb),
        "wrong": (plain[:1000] + bytes(60) + plain[1060:], "PNG"),
        "bomb": (plain[:8] + chunk(b"IHDR", huge) + plain[33:], "50,000 x 50,000 pixels"),
    }


def tiffs(rng: np.random.Generator) -> Kinds:
    byte = rng.integers(0, 256, (SIDE, LENGTH, 8)).astype(np.uint8)
    rgb = np.ascontiguousarray(byte[..., :3])
    gray = byte[..., :1]
    gray[0, :2, 0] = 0, 255  # the range, of which levels are measured
    image = Image.fromarray(rgb)
    wide = rng.integers(0, 65536, (SIDE, LENGTH, 3)).astype(np.uint16)
    narrow = np.rint(wide / 257).astype(np.uint8)
    unit = (gray / np.float32(255)).astype(np.float32)
    nan = unit.copy()
    nan[3, 5] = np.nan
    expected = grays(gray[..., 0])
    kinds: Kinds = {
        "gray": (tiff(gray), expected),
        "white_first": (tiff(255 - gray, photometric=0), expected),
        "rgb": (tiff(rgb), rgb),
        "big_endian": (tiff(wide, order=BIG), narrow),
        "16_bits": (tiff(wide[..., :1]), grays(narrow[..., 0])),
        "16_bits_white_first": (tiff(wide[..., :1], photometric=0), grays(255 - narrow[..., 0])),
        "16_bits_rgb": (tiff(wide), narrow),
        "signed_8": (tiff((gray.astype(np.int16) - 128).astype(np.int8)), expected),
        "signed_16": (tiff((gray.astype(np.int32) * 256 - 32768).astype(np.int16)), expected),
        "32_bits": (tiff(gray.astype(np.uint32)), expected),
        "signed_32": (tiff(gray.astype(np.int32)), expected),
        "float": (tiff(unit), expected),
        "float_big_endian": (tiff(unit, order=BIG), expected),
        "planar": (tiff(rgb, planar=True), rgb),
        "1_bit": (encoded(gray[..., 0] > 127, "TIFF"), grays(np.where(gray[..., 0] > 127, 255, 0))),
        "palette": (encoded(image.quantize(16), "TIFF"), np.asarray(image.quantize(16).convert("RGB"))),
        "cmyk": (encoded(image.convert("CMYK"), "TIFF"), np.asarray(image.convert("CMYK").convert("RGB"))),
        "alpha": (encoded(np.concatenate([rgb, gray], axis=-1), "TIFF"), rgb),
        "pages": (encoded(image, "TIFF", save_all=True, append_images=[Image.fromarray(255 - rgb)]), rgb),
        "turned": (encoded(image, "TIFF", tiffinfo={0x112: 6}), turned(rgb, 6)),
        "2_bands": (tiff(byte[..., :2]), "2 channels"),
        "5_bands": (tiff(byte[..., :5], photometric=2), "5 channels"),
        "8_bands": (tiff(byte), "8 channels"),
        "nan": (tiff(nan), "not finite"),
        "cut": (tiff(rgb)[:1000], "TIFF"),
        "more_rows_than_strips": (
            tiff(rgb).replace(length := struct.pack("<HHIH", 257, 3, 1, SIDE), length[:8] + b"\xe8\x03"),
            "strips",
        ),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        kinds[compression] = encoded(image, "TIFF", compression=compression), rgb
    for compression in ("lzma", "zstd"):
        with contextlib.suppress(OSError):  # not every build of Pillow has them: 10.0 lacks one
            kinds[compression] = encoded(image, "TIFF", compression=compression), rgb
    return kinds


def bmp_of_16_bits(rgb: Array) -> bytes:
    """A BMP with 5, 6 and 5 bits of red, green and blue, which takes an even width."""
    height, width, _ = rgb.shape
    red, green, blue = (rgb[::-1].astype(np.uint16) >> (3, 2, 3)).transpose(2, 0, 1)
    pixels = (red << 11 | green << 5 | blue).astype("<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    return b"BM" + struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66) + head + masks + pixels


def others(rng: np.random.Generator) -> Kinds:
    rgb = rng.integers(0, 256, (SIDE, LENGTH, 3)).astype(np.uint8)
    image = Image.fromarray(rgb)
    later = [Image.fromarray(255 - rgb)]
    about = Image.Exif()
    about[0x112] = 5
    return {
        "lossless.webp": (encoded(image, "WEBP", lossless=True), rgb),
        "frames.webp": (encoded(image, "WEBP", lossless=True, save_all=True, append_images=later), rgb),
        "turned.webp": (encoded(image, "WEBP", lossless=True, exif=about), turned(rgb, 5)),
        "rgb.bmp": (encoded(image, "BMP"), rgb),
        "gray.bmp": (encoded(rgb[..., 0], "BMP"), grays(rgb[..., 0])),
        "palette.bmp": (encoded(image.quantize(16), "BMP"), np.asarray(image.quantize(16).convert("RGB"))),
        "16_bits.bmp": (bmp_of_16_bits(rgb), (rgb >> (3, 2, 3)) * (255 / np.array([31, 63, 31]))),
        "jpeg2000.jpg": (encoded(image, "JPEG2000", irreversible=False), rgb),
        "png.jpg": (encoded(image, "PNG"), rgb),
        "film.jpg": (b"\0\0\0\x20ftypisom" + rng.bytes(400), "a video"),
        "noise_behind_brand.jpg": (b"\0\0\0\x20ftypavif" + rng.bytes(400), "an AVIF"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "empty.jpg": (b"", "an empty file"),
        "noise.jpg": (b"\x01" + rng.bytes(700), "not an image"),
        "noise_behind_magic.jpg": (b"\xff\xd8\xff" + rng.bytes(700), "JPEG"),
        "noise_behind_magic.png": (b"\x89PNG\r\n\x1a\n" + rng.bytes(700), "PNG"),
        "noise_behind_magic.tif": (b"II*\0" + rng.bytes(700), "TIFF"),
        "noise_behind_magic.webp": (b"RIFF" + rng.bytes(4) + b"WEBP" + rng.bytes(700), "WebP"),
        "noise_behind_magic.bmp": (b"BM" + rng.bytes(700), "BMP|pixels"),
    }


def all_kinds() -> Kinds:
    rng = np.random.default_rng()  # fresh content: printed by a failing assertion
    found: Kinds = {}
    for make, suffix in ((jpegs, ".jpg"), (pngs, ".png"), (tiffs, ".tif"), (others, "")):
        found |= {f"{make.__name__}_{name}{suffix}": kind for name, kind in make(rng).items()}
    return found
