"""The three formats of files of features, as the libraries that they are for read them."""

import csv
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from sslx.embed import tables
from sslx.embed.tables import Rows
from sslx.errors import ConfigError

STRANGE = ["a,b.png", 'quoted "name".png', "line\nbreak.png", os.fsdecode(b"not\xffUTF-8.png"), "ä/ö 日本.png"]


def random_rows(num_parts: int, num: int, dim: int, dtype: npt.DTypeLike, labeled: bool) -> list[Rows]:
    generator = np.random.default_rng()
    parts: list[Rows] = []
    for part in range(num_parts):
        index = np.arange(part * num, (part + 1) * num)
        vectors = generator.standard_normal((num, dim)).astype(dtype)
        labels = generator.integers(0, 3, num) if labeled else None
        classes = None if labels is None else ["cat", "dog", ""] * (num // 3) + ["owl"] * (num % 3)
        parts.append(Rows(index, [STRANGE[i % len(STRANGE)] for i in index], labels, classes, lambda v=vectors: v))
    return parts


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".safetensors"])
@pytest.mark.parametrize("labeled", [True, False])
def test_the_libraries_read_every_row(tmp_path: Path, suffix: str, dtype: str, labeled: bool) -> None:
    parts = random_rows(3, 7, 5, dtype, labeled)
    file = tmp_path / f"vectors{suffix}"
    (tmp_path / "parts").mkdir()
    tables.write(file, tmp_path / "parts", lambda: iter(parts), 21, 5, dtype)
    assert not any((tmp_path / "parts").iterdir())
    vectors = np.concatenate([rows.read() for rows in parts])
    labels = None if not labeled else np.concatenate([rows.labels for rows in parts if rows.labels is not None])
    classes = [name for rows in parts for name in rows.classes or []]
    paths = [path for rows in parts for path in rows.paths]
    read: npt.NDArray[Any]
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(file)
        assert table.column_names == ["index", "path", "label", "class", "vector"]
        read = table["vector"].combine_chunks().flatten().to_numpy().reshape(21, 5)
        assert table["label"].to_pylist() == ([None] * 21 if labels is None else labels.tolist())
        assert table["class"].to_pylist() == (classes or [None] * 21)
        assert table["index"].to_pylist() == list(range(21))
        assert table["path"].to_pylist() == [path.replace("\udcff", r"\xff") for path in paths]
    else:
        with open(tmp_path / "vectors.csv", newline="", encoding="utf-8", errors="surrogateescape") as opened:
            lines = list(csv.DictReader(opened))
        assert [line["path"] for line in lines] == paths
        assert [line["index"] for line in lines] == [str(i) for i in range(21)]
        assert [line["label"] for line in lines] == ([""] * 21 if labels is None else [str(label) for label in labels])
        assert [line["class"] for line in lines] == (classes or [""] * 21)
        if suffix == ".npy":
            read = np.load(file)
        else:
            tensors = load_file(file)
            read = tensors.pop("vector")
            assert np.array_equal(tensors.pop("index"), np.arange(21))
            assert (labels is None and not tensors) or np.array_equal(tensors.pop("label"), labels)
    assert read.dtype == np.dtype(dtype)
    assert np.array_equal(read, vectors)


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".safetensors"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
    num, dim, num_parts = 1024, 512, 25  # 50 MiB
    vectors = np.random.default_rng().standard_normal((num, dim), dtype=np.float32)

    def parts() -> Iterator[Rows]:
        for part in range(num_parts):
            index = np.arange(part * num, (part + 1) * num)
            yield Rows(index, [f"images/{i}.png" for i in index], index % 7, None, lambda: vectors + np.float32(1))

    tracemalloc.start()
    tables.write(tmp_path / f"v{suffix}", tmp_path, parts, num * num_parts, dim, np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / f"v{suffix}").stat().st_size > num_parts * vectors.nbytes * 0.8
    assert peak < 8 * vectors.nbytes
    if suffix == ".parquet":
        assert arrow.default_memory_pool().max_memory() < 16 * vectors.nbytes


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vectors\.h5 must end in \.parquet, \.npy or \.safetensors"):
        tables.check(tmp_path / "vectors.h5")
