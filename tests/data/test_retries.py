"""Reads that fail for the storage's sake are waited out: the same sample comes, and its place is named once."""

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kit.errors import raises_one_line
from kit.loaders import assert_same, take, training_loader
from sslx.data import retries, waiting
from sslx.data.sources import Encoded, Files
from sslx.data.views import Augment, ViewSpec
from sslx.errors import StorageError

SPECS = (ViewSpec(size=16, augment=Augment()),)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retries, "_named", set[str]())
    monkeypatch.setattr(retries, "_last_said_s", -1e9)


class Failing:
    """A reader of files whose every ``period``-th read fails, in all processes together."""

    def __init__(self, paths: list[str], period: int, code: int) -> None:
        self.paths, self.period, self.code = paths, period, code
        self.count: Any = multiprocessing.get_context("fork").Value("q", 0)

    def read(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        with self.count.get_lock():
            self.count.value += 1
            fails = self.count.value % self.period == 0
        if fails:
            raise OSError(self.code, os.strerror(self.code))
        return [Path(self.paths[row]).read_bytes() for row in rows]

    def where(self, row: int) -> str:
        return f"failing {row}"


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_a_reader_that_fails_now_and_then_changes_no_batch(files: Files, backend: str) -> None:
    reader = Failing(list(files.paths), 3, errno.EIO)
    source = Encoded(name="failing", facts=files.facts, reader=reader)
    settings: dict[str, Any] = {"threads": 2} if backend == "torchvision" else {}
    lines: list[str] = []
    loader = training_loader(source, backend, SPECS, say=lines.append, **settings)
    assert_same(take(loader, 6), take(training_loader(files, backend, SPECS, **settings), 6))
    assert reader.count.value > 6
    assert not loader.bad
    named = [line for line in lines if "cannot be read for now ([Errno 5] Input/output error)" in line]
    assert 1 <= len(named) <= 2, "once in each process that reads"
    assert named[0].startswith("failing ")


def test_files_on_a_disk_that_fails_are_waited_for_and_missing_ones_replaced(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(training_loader(files, "torchvision", SPECS), 6)
    opened, number = os.open, [0]

    def failing(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith((".png", ".jpg")):
            number[0] += 1
            if number[0] % 3 == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    loader = training_loader(files, "torchvision", SPECS)
    assert_same(take(loader, 6), expected)
    assert not loader.bad
    monkeypatch.undo()
    Path(files.paths[3]).unlink()
    loader = training_loader(files, "torchvision", SPECS, max_bad=0.5)
    take(loader, 8)
    assert [*loader.bad] == [3]


@pytest.mark.parametrize("threads", [0, 1])
def test_a_storage_that_stays_away_ends_the_run_in_one_line(files: Files, threads: int) -> None:
    source = Encoded(name="gone", facts=files.facts, reader=Failing(list(files.paths), 1, errno.ETIMEDOUT))
    loader = training_loader(replace(source, timeout_s=0.5), "torchvision", SPECS, threads=threads, timeout_s=2.0)
    started = time.monotonic()
    with raises_one_line(StorageError, "failing ", "could not be read for 0 s", "--data.timeout-s 0.5"):
        next(loader)
    assert time.monotonic() - started < 1.9
    assert not loader.bad


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whichever it is)
        act()
    return caught.value


def test_which_errors_may_pass() -> None:
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            super().__init__(status)
            self.status = status

    for error in (TimeoutError(), ConnectionResetError(), OSError(errno.EIO, "x"), Answer(503), Answer(429)):
        assert retries.may_pass(error), error
    missing = raised(lambda: Path("/no/such").read_bytes())
    for error in (missing, PermissionError(), Answer(404), Answer(403), KeyError("x"), OSError("cannot decode")):
        assert not retries.may_pass(error), error
    said: list[str] = []
    waiting.report_to(said.append)
    tries = iter([ConnectionError("one"), TimeoutError(), None, ConnectionError("two"), None])

    def read() -> int:
        if (error := next(tries)) is not None:
            raise error
        return 5

    for _ in range(2):
        assert retries.until_read(read, lambda: "there", 10.0) == 5
    assert said == ["there cannot be read for now (one): tries again until it can"]
    assert raised(lambda: retries.until_read(lambda: [][1], lambda: "there", 10.0)).__class__ is IndexError
    waiting.report_to(waiting.no_word)
