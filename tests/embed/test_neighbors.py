"""``sslx neighbors``: the nearest images are those of all similarities, on any number of ranks."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

from conftest import RunOnRanks
from kit.sources import in_memory
from sslx import cli, data, distributed
from sslx.console.bars import Bars
from sslx.embed import neighbors
from sslx.trained import load

READ = ["--data.backend", "torchvision", "--data.threads", "0", "--data.max-bad", "0.2"]


def found_on_a_rank(trained: Path, pixels: Any, k: int) -> list[neighbors.Near]:
    run, ranks = load(trained), distributed.init("cpu")
    settings = data.Config(backend="torchvision", threads=0)
    batches = data.evaluation(settings, in_memory(pixels), run.view, batch_size=7, ranks=ranks, dtype=torch.float32)
    return neighbors.search(run, batches, run.embed(pixels[:3]), k, Bars(Console(), False))


def test_they_are_the_largest_of_all_similarities(ranks: RunOnRanks, trained: Path) -> None:
    pixels = np.random.default_rng().integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    pixels[30] = pixels[11] = pixels[1]
    unit = F.normalize(load(trained).embed(pixels).double(), dim=1)
    similarity = unit[:3] @ unit.T
    expected = similarity.sort(dim=1, descending=True).values
    for found in (found_on_a_rank(trained, pixels, 6), *ranks(2, found_on_a_rank, trained, pixels, 6)):
        for query, near in enumerate(found):
            np.testing.assert_allclose(near.similarity, expected[query, :6], atol=1e-5)
            np.testing.assert_allclose(similarity[query, near.index], expected[query, :6], atol=1e-5)
        # Equal images may differ in the last bit of their features, which depends on their places in the batch.
        assert set(found[1].index[:3]) == {1, 11, 30}
    assert len(found_on_a_rank(trained, pixels, 99)[0].index) == 40


def test_the_command_prints_and_draws_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of an image is its nearest neighbor, and neither the image itself nor a damaged one is any."""
    photos = tmp_path / "photos"
    for i, color in enumerate(("red", "red", "blue", "yellow", "green", "white")):
        path = photos / ("warm" if color in ("red", "yellow") else "cold") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (20, 24), color)
        image.putpixel((10, 10), (0, 0, 0))
        image.save(path)
    broken = photos / "cold" / "2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    argv = ["neighbors", str(trained), str(photos / "warm" / "0.png"), str(photos / "warm" / "3.png"), *READ]
    assert cli.main([*argv, "--source.root", str(photos), "--num-neighbors", "9"]) == 0
    out = capsys.readouterr().out
    parts = re.split(rf"^(?={photos}/warm/\d.png$)", out, flags=re.MULTILINE)
    first, second = (part.splitlines()[1:] for part in parts[1:])
    rows = [re.fullmatch(r" +(-?[\d.]+)  (\S+)  (warm|cold)", line) for line in first]
    assert all(rows)
    assert next(row[2] for row in rows if row) == str(photos / "warm" / "1.png")
    assert next(row[1] for row in rows if row) == "1.000"
    assert {Path(row[2]).name for row in rows if row} == {"1.png", "3.png", "4.png", "5.png"}
    similarities = [float(row[1]) for row in rows if row]
    assert similarities == sorted(similarities, reverse=True)
    assert len(second) == 5, "with the line about the picture"
    with Image.open(trained / "nearest.png") as picture:
        assert min(picture.size) > 300
    head = (trained / "nearest.png").read_bytes()[:24]
    assert struct.unpack(">II", head[16:24]) == picture.size


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("text")
    for argv, code, words in (
        ([], 64, "sslx neighbors needs images to find neighbors of"),
        ([str(tmp_path / "none.png")], 66, "none.png does not exist"),
        ([str(tmp_path / "text.png")], 65, "text.png cannot be read"),
        ([str(tmp_path / "text.png"), "-o", "x.txt"], 64, "must end in .png or .svg"),
        ([str(tmp_path / "text.png"), "--num-neighbors", "0"], 64, "--num-neighbors must be at least 1"),
    ):
        assert cli.main(["neighbors", str(trained), *argv]) == code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
