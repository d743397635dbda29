"""The benchmark of odd files finds pictures that are wrong, and processes that die."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import bench_odd_files
import numpy as np
import pytest

from kit.image_files import Array

RNG = np.random.default_rng()


def test_values_that_are_cut_or_wrap_around_are_found_and_scaled_ones_are_not() -> None:
    deep = RNG.integers(0, 65536, (20, 20)).astype(np.uint16)
    rgb = RNG.integers(0, 256, (20, 20, 3)).astype(np.uint8)

    def gray(picture: Array) -> Array:
        return np.repeat(picture[..., None], 3, axis=-1).astype(np.float32)

    differs = bench_odd_files._differs
    assert not differs(gray(np.rint(deep / 257)), deep)
    assert not differs(gray(np.rint((deep // 300 - 20.0) / 198 * 255)), deep // 300)
    assert differs(gray(deep & 255), deep)
    assert differs(gray(deep.clip(0, 255)), deep)
    assert differs(gray(255 - np.rint(deep / 257)), deep)
    assert not differs(rgb.astype(np.float32), rgb)
    assert differs(rgb[..., ::-1].astype(np.float32), rgb)
    assert differs(rgb[:, ::-1].astype(np.float32), rgb)


def test_every_way_to_be_wrong_is_a_verdict() -> None:
    picture = RNG.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    read, refused = {"shape": [9, 9]}, {"refused": "a JPEG that cannot be decoded"}

    def verdict(one: dict[str, Any], other: dict[str, Any], reference: dict[str, Any], /, **pictures: Array) -> str:
        reports = {"torchvision": one, "dali": other, "reference": reference}
        return bench_odd_files._verdict(reports, lambda kind: pictures.get(kind, picture), ("torchvision", "dali"))[0]

    assert verdict(read, read, read) == "equal to the reference"
    assert verdict(read, read, read, reference=255 - picture) == "differs from the reference"
    assert verdict(read, read, read, dali=255 - picture) == "backends differ"
    assert verdict(read, refused, read) == "backends disagree"
    assert verdict({"died": -11}, read, read) == "crashed"
    assert verdict(refused, refused, refused) == "named as unreadable"
    assert verdict(refused, refused, read) == "named as not supported"


def die_at_the_second(_: str, path: Path, __: Path) -> dict[str, Any]:
    if path.name == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"refused": path.name}


def test_a_file_at_which_a_process_dies_is_named_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = multiprocessing.get_context("fork")  # so that the child has the reader of this test
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: real)
    monkeypatch.setattr(bench_odd_files, "_reference", die_at_the_second)
    paths = [tmp_path / str(number) for number in range(3)]
    reports = bench_odd_files._outcomes("reference", paths, tmp_path / "good", tmp_path / "reference")
    assert reports == [{"refused": "0"}, {"died": -signal.SIGKILL}, {"refused": "2"}]
