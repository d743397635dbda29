"""Batches ahead of training: no more than the user allows, and the same ones with any number."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kit.errors import raises_one_line
from kit.loaders import assert_same, take, training_loader
from sslx.data import Config
from sslx.data.codecs.formats import Levels
from sslx.data.sources import Encoded, Files
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError

SPECS = (ViewSpec(size=16, augment=Augment()),)


class Counted:
    """A reader of files that counts the images it reads, in all processes together."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.count: Any = multiprocessing.get_context("fork").Value("q", 0)

    def read(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        with self.count.get_lock():
            self.count.value += len(rows)
        return [Path(self.paths[row]).read_bytes() for row in rows]

    def where(self, row: int) -> str:
        return f"counted {row}"

    def settled(self) -> int:
        """The number of images read once no more are for a while."""
        before = -1
        while before != (before := self.count.value):
            time.sleep(0.1)
        return before


@pytest.mark.parametrize(
    ("backend", "threads", "prefetch", "ahead"),
    [
        ("torchvision", 2, 1, 1),
        ("torchvision", 2, 7, 6),
        ("dali", 1, 4, 7),
    ],
)
def test_no_more_batches_are_prepared_than_allowed(
    files: Files, backend: str, threads: int, prefetch: int | None, ahead: int
) -> None:
    """ahead: what may be read besides the batches taken; for DALI, two more whose bytes wait for it."""
    reader = Counted(list(files.paths))
    source = Encoded(name="counted", facts=files.facts, reader=reader, levels=Levels())
    loader = training_loader(source, backend, SPECS, threads=threads, prefetch=prefetch)
    batches = take(loader, 3)
    num_ahead = reader.settled() / 6 - 3
    assert num_ahead == ahead if backend == "torchvision" else 1 <= num_ahead <= ahead
    assert_same(batches, take(training_loader(files, backend, SPECS, threads=threads), 3))


def test_impossible_numbers_are_one_line() -> None:
    for number in (0, -1, 1001):
        with raises_one_line(ConfigError, "--data.prefetch must be from 1 to 1000", str(number)):
            Config(prefetch=number)
