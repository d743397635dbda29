"""Tables (Parquet, Arrow) and arrays (NPY, NPZ, HDF5): columns and keys, names of classes, bounded memory, refusals."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit import containers
from kit.containers import PER_SHARD
from kit.errors import raises_one_line
from kit.image_files import encoded
from kit.sources import pixels_of
from sslx.data.sources import Encoded, Source, arrays, build, parquet, row_groups
from sslx.errors import ConfigError, DataError, MissingInput


def images(number: int) -> list[bytes]:
    pixels = np.random.default_rng().integers(0, 256, (number, 20, 20, 3), dtype=np.uint8)
    return [encoded(Image.fromarray(image), "PNG") for image in pixels]


def read(source: Source, index: Any = None) -> list[bytes]:
    assert isinstance(source, Encoded)
    return list(source.files(np.arange(len(source)) if index is None else np.array(index)))  # pyright: ignore[reportArgumentType]


def built(root: Path, split: Any = "pretrain", **options: Any) -> Source:
    return build(parquet.Config(root=root, **options), split)


def test_a_folder_of_hugging_face_with_splits_and_names(tmp_path: Path) -> None:
    content = images(13)
    data, names = tmp_path / "data", ("owl", "cat", "dog")
    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(content)]
    (data / "9.png").parent.mkdir()
    (data / "9.png").write_bytes(content[9])
    structs[9]["bytes"] = None  # in the table's folder instead
    columns = {"image": structs, "label": [0, 2] * 6 + [0], "text": [f"caption {i}" for i in range(13)]}
    part = [{name: values[a:b] for name, values in columns.items()} for a, b in ((0, 6), (6, 12), (12, 13))]
    containers.parquet(data / "train-00000-of-00002.parquet", part[0], names)
    containers.parquet(data / "train-00001-of-00002.parquet", part[1], names)
    containers.parquet(data / "validation-00000-of-00001.parquet", part[2], names)
    containers.parquet(data / "test-00000-of-00001.parquet", part[2] | {"label": [-1]}, names)
    source = built(tmp_path)
    assert read(source) == content[:12]
    assert read(source, [11, 0, 7]) == [content[i] for i in (11, 0, 7)]
    assert source.facts.classes == names
    np.testing.assert_array_equal(source.facts.labels, [0, 2] * 6)
    np.testing.assert_array_equal(source.facts.blocks, [0, PER_SHARD, 6, 6 + PER_SHARD])
    assert source.facts.captions is not None
    assert source.facts.captions[11] == ("caption 11",)
    assert source.where(8).endswith("train-00001-of-00002.parquet[2]")
    test = build(parquet.Config(root=tmp_path), "test", training=source)
    assert read(test) == content[12:]
    assert test.facts.labels is not None, "the validation split, since the test split is not labeled"


def test_memory_for_groups_is_bounded_and_every_row_comes_all_the_same(tmp_path: Path) -> None:
    content = images(40)
    file = containers.parquet(tmp_path / "x.parquet", {"img": content})
    group = sum(map(len, content)) / 8
    source = built(file, cache_gb=2.5 * group / 1e9)
    assert source.describe().endswith("unlabeled: no column of labels, which --source.label names; others: none")
    assert any(note.startswith("slow, since batches take images from 16 groups") for note in source.notes)
    order = np.random.default_rng().permutation(40)
    assert read(source, order) == [content[i] for i in order]
    cache = row_groups._cache(os.getpid())
    assert sum(cache._bytes.values()) < 2.5 * group
    with raises_one_line(ConfigError, "groups of up to", "--source.cache-gb", "row_group_size"):
        built(file, cache_gb=0.5 * group / 1e9)
    containers.parquet(file, {"img": content[:39]})
    lines: list[str] = []
    with pytest.raises(Exception, match="its file has changed since the start"):
        read(source, [3])
    assert not lines


@pytest.mark.parametrize(
    ("columns", "options", "error", "words"),
    [
        ({"a": [b"x"], "b": [1]}, {}, DataError, ("no column of images", "'a', 'b'", "--source.image")),
        ({"image": [b"x"]}, {"label": "y"}, DataError, ("no column 'y' (--source.label)", "'image'")),
        ({"image": ["x"]}, {}, DataError, ("'image'", "of type string: expected the bytes of image files")),
        ({"image": [[b"x"]]}, {}, DataError, ("of type list", "expected the bytes")),
        ({"image": [b"x"], "label": [0.5]}, {}, DataError, ("x.parquet[0] is 0.5", "a whole number or the name")),
        ({"image": [], "label": []}, {}, DataError, ("of type null",)),
        ({"image": [b"x"]}, {"cache_gb": 0}, ConfigError, ("--source.cache-gb must be above 0",)),
    ],
)
def test_tables_that_cannot_be_used_are_refused(
    columns: dict[str, Any], options: dict[str, Any], error: type[Exception], words: tuple[str, ...], tmp_path: Path
) -> None:
    containers.parquet(tmp_path / "x.parquet", columns)
    with raises_one_line(error, *words):
        built(tmp_path, **options)


def test_damaged_and_unequal_tables_are_named(tmp_path: Path) -> None:
    file = containers.parquet(tmp_path / "a.parquet", {"image": images(20)})
    containers.parquet(tmp_path / "b.parquet", {"picture": images(2)})
    with raises_one_line(DataError, "b.parquet has not the same column 'image'", "'picture'"):
        built(tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with raises_one_line(DataError, "the table", "a.parquet cannot be read"):
        built(file)
    (tmp_path / "c.arrow").write_bytes(b"x" * 100)
    with raises_one_line(DataError, "holds files of .arrow and .parquet", "name one kind"):
        built(tmp_path)
    with raises_one_line(DataError, "c.arrow cannot be read"):
        built(tmp_path / "c.arrow")


# ---- arrays


def of_arrays(path: Path, split: Any = "pretrain", **options: Any) -> Source:
    return build(arrays.Config(root=path, **options), split)


@pytest.mark.skipif(find_spec("h5py") is None, reason="h5py is not installed")
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_hdf5(compression: str | None, tmp_path: Path) -> None:
    import h5py  # pyright: ignore[reportMissingImports]

    pixels = np.random.default_rng().integers(0, 256, (10, 16, 18, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=pixels, compression=compression)
        file.create_dataset("y", data=[b"owl", b"cat"] * 5)
        file.create_dataset("test/images", data=pixels[:3])
    source = of_arrays(tmp_path / "x.h5")
    np.testing.assert_array_equal(pixels_of(source), pixels)
    assert isinstance(pixels_of(source), np.memmap) == (compression is None)
    assert source.facts.classes == ("cat", "owl")
    np.testing.assert_array_equal(source.facts.labels, [1, 0] * 5)
    np.testing.assert_array_equal(pixels_of(of_arrays(tmp_path / "x.h5", "test")), pixels[:3])


@pytest.mark.skipif(find_spec("h5py") is not None, reason="h5py is installed")
def test_hdf5_without_h5py_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with raises_one_line(ConfigError, "x.h5 needs h5py: pip install h5py"):
        of_arrays(tmp_path / "x.h5")


def test_a_large_array_is_mapped_and_gray_takes_no_more_memory(tmp_path: Path) -> None:
    gray = np.random.default_rng().integers(0, 256, (9, 16, 12), dtype=np.uint8)
    np.save(tmp_path / "x.npy", gray)
    pixels = pixels_of(of_arrays(tmp_path / "x.npy"))
    assert pixels.shape == (9, 16, 12, 3)
    assert pixels.strides[-1] == 0
    np.testing.assert_array_equal(pixels, np.repeat(gray[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("stored", "options", "error", "words"),
    [
        ({"x": np.zeros((4, 8, 8, 3))}, {}, DataError, ("x of", "is of type float64: expected uint8")),
        ({"x": np.zeros((4, 8, 8), np.int16)}, {}, DataError, ("is of type int16", "uint16 or float32")),
        ({"x": np.zeros((4, 30, 40, 50), np.uint8)}, {}, DataError, ("(4, 30, 40, 50)", "--source.layout nhwc")),
        ({"x": np.zeros((4, 30), np.uint8)}, {}, DataError, ("shape (4, 30)",)),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8)}, {}, MissingInput, ("is empty",)),
        ({"foo": np.zeros((4, 8, 8), np.uint8)}, {}, DataError, ("its keys are 'foo'", "--source.image")),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(3)}, {}, DataError, ("4 images and 3 labels",)),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros((4, 2))}, {}, DataError, ("shape (4, 2): expected one",)),
        ({"x": np.zeros((4, 8, 8), np.uint8)}, {"split": "test"}, MissingInput, ("no test images", "'x'")),
        ({"x": np.zeros((4, 8, 8), np.uint8)}, {"layout": "nhwc"}, DataError, ("expected 4 dimensions, nhwc",)),
        ({"x": np.array([None, 3], dtype=object)}, {}, DataError, ("cannot be read",)),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(
    stored: dict[str, Any], options: dict[str, Any], error: type[Exception], words: tuple[str, ...], tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **stored)
    with raises_one_line(error, *words):
        of_arrays(tmp_path / "x.npz", **options)


def test_places_without_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and no more")
    with raises_one_line(DataError, "x.npz cannot be read"):
        of_arrays(tmp_path / "x.npz")
    with raises_one_line(MissingInput, "is a folder"):
        of_arrays(tmp_path)
    with raises_one_line(ConfigError, "--source.name arrays needs --source.root"):
        build(arrays.Config(), "pretrain")
