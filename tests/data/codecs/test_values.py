"""What a file holds, before it becomes RGB of 8 bits: any number of bands, at the file's own depth, of any page."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.image_files import BIG, LENGTH, LITTLE, SIDE, Array, Order, tiff
from kit.loaders import AS_STORED, Backend, evaluation_loader, every_backend
from kit.rare_files import dicom, npy
from kit.sources import folder
from sslx.data import Config, sources
from sslx.data.codecs import formats
from sslx.data.codecs.headers import Unreadable
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError

TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.float32, np.float64)


def noise(dtype: Any, *shape: int) -> Array:
    """Random values over the whole range of a type, or from -1 to 1."""
    rng = np.random.default_rng()
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-1, 1, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_tiff_of_any_bands_and_type_is_read_as_it_was_written(dtype: Any, bands: int) -> None:
    pytest.importorskip("tifffile")
    pixels = noise(dtype, SIDE, LENGTH, bands)
    orders: tuple[Order, ...] = (LITTLE, BIG)
    for planar in (False, True)[: 1 + (bands > 1)]:
        for order in orders:
            content = tiff(pixels, planar=planar, order=order, photometric=1)
            array = formats.values(content).array
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, pixels[..., 0] if bands == 1 else pixels)
            assert formats.size(content) == (SIDE, LENGTH, 1)
    expected = {"u": f"{8 * pixels.itemsize}-bit", "i": f"signed {8 * pixels.itemsize}-bit", "f": "float"}
    kind = None if dtype == np.uint8 else expected[pixels.dtype.kind]
    assert formats.values(content).kind == formats.kind_of(content) == kind


@pytest.mark.parametrize("order", [LITTLE, BIG])
@pytest.mark.parametrize("dtype", [*TYPES, np.int32])
def test_a_compressed_tiff_is_read_as_it_was_written(dtype: Any, order: Order) -> None:
    """Pillow 13 silently swaps the bytes of big-endian ones with a sign or a fraction, and cannot read 3 x 16 bits."""
    tifffile: Any = pytest.importorskip("tifffile")
    for bands in (1, 3):
        pixels, file = noise(dtype, SIDE, LENGTH, bands), io.BytesIO()
        stored = pixels if bands == 3 else pixels[..., 0]
        tifffile.imwrite(file, stored, photometric="rgb" if bands == 3 else None, byteorder=order, compression="zlib")
        array = formats.values(file.getvalue()).array
        np.testing.assert_array_equal(array, stored)


@pytest.mark.parametrize("shape", [(SIDE, LENGTH), (SIDE, LENGTH, 3), (SIDE, LENGTH, 7), (7, SIDE, LENGTH)])
@pytest.mark.parametrize("dtype", TYPES)
def test_an_npy_file_is_read_as_it_was_written(dtype: Any, shape: tuple[int, ...]) -> None:
    pixels = noise(dtype, *shape)
    array = formats.values(npy(pixels)).array
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, np.moveaxis(pixels, 0, -1) if shape[0] == 7 else pixels)
    assert formats.size(npy(pixels)) == (SIDE, LENGTH, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_fourth_band_is_kept_and_left_out_of_rgb(dtype: Any) -> None:
    """Near infrared beside RGB, as geographic programs write it: a TIFF does not say that it is no alpha channel."""
    pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    pixels = noise(dtype, SIDE, LENGTH, 4)
    content = tiff(pixels, photometric=2)
    values = formats.values(content)
    np.testing.assert_array_equal(values.array, pixels)
    assert values.alpha_unstated
    levels = formats.Levels(chosen=(0, np.iinfo(dtype).max))
    expected = np.rint(pixels[..., :3] * (255 / np.iinfo(dtype).max))
    assert np.abs(formats.read(content, levels) - expected).max() <= 1


def two_pages(first: Array, second: Array) -> bytes:
    """A TIFF of two pages."""
    tifffile: Any = pytest.importorskip("tifffile")
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in (first, second):
            writer.write(page, photometric="rgb" if page.shape[-1] == 3 else "minisblack", planarconfig="contig")
    return file.getvalue()


@pytest.mark.parametrize(("dtype", "bands"), [(np.uint8, 3), (np.uint16, 3), (np.uint16, 6), (np.float32, 2)])
def test_a_page_is_chosen_and_one_that_is_not_there_is_named(dtype: Any, bands: int) -> None:
    pages = [noise(dtype, SIDE, LENGTH, bands) for _ in range(2)]
    content = two_pages(*pages)
    for number, page in enumerate(pages):
        np.testing.assert_array_equal(formats.values(content, number).array, page)
    assert formats.size(content) == (SIDE, LENGTH, 2)
    with pytest.raises(Unreadable, match=r"it has 2 pages, of which --data\.page 2 is none"):
        formats.values(content, 2)


def test_a_frame_of_a_dicom_file_is_chosen() -> None:
    pytest.importorskip("pydicom")
    frames = noise(np.uint16, 3, SIDE, LENGTH)
    content = dicom(frames, rescale=(2, -7))
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(formats.values(content, number).array, frame.astype(np.int64) * 2 - 7)
    assert formats.size(content) == (SIDE, LENGTH, 3)
    with pytest.raises(Unreadable, match=r"it has 3 frames, of which --data\.page 3 is none"):
        formats.values(content, 3)


def test_hounsfield_units_stay_whole_numbers_of_16_bits() -> None:
    pytest.importorskip("pydicom")
    stored = noise(np.uint16, SIDE, LENGTH) >> 4
    values = formats.values(dicom(stored, stored=12, rescale=(1, -1024), modality="CT"))
    assert (values.array.dtype, values.kind, values.stated) == (np.int16, "DICOM CT", None)
    np.testing.assert_array_equal(values.array, stored.astype(np.int16) - 1024)


@every_backend
def test_every_backend_reads_the_chosen_page(backend: Backend, tmp_path: Path) -> None:
    pages = [noise(np.uint8, SIDE, SIDE, 3) for _ in range(2)]
    (tmp_path / "a.tif").write_bytes(two_pages(*pages))
    said: list[str] = []
    for number, page in enumerate(pages):
        source = sources.build(folder(tmp_path), "pretrain", Config(page=number), say=said.append)
        assert "a.tif holds several pages" in "\n".join(source.notes)
        (batch,) = evaluation_loader(source, backend, ViewSpec(size=SIDE, **AS_STORED))
        assert np.abs(batch.views[0][0].permute(1, 2, 0).numpy() - page).max() <= 0.51
    with pytest.raises(ConfigError, match=r"--data\.page must be 0"):
        Config(page=-1)


@pytest.mark.parametrize(
    ("module", "content"),
    [
        ("pydicom", dicom(np.arange(12, dtype=np.uint8).reshape(3, 4))),
        ("pillow_heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)),
        ("tifffile", tiff(np.ones((3, 4, 5), np.uint16))),
    ],
)
def test_a_missing_library_is_named_with_the_command(
    module: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as Python marks what cannot be imported
    with pytest.raises(Unreadable, match=f"pip install {module.replace('_', '-')}"):
        formats.read(content)
