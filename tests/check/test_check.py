"""``sslx data check`` on a folder with every fault that it looks for, and near copies against all pairs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kit.errors import raises_one_line
from sslx import cli
from sslx.check import similar
from sslx.errors import ConfigError


def picture(random: np.random.Generator, height: int = 80, width: int = 96) -> Image.Image:
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str], str]:
    """What is found by its name, the list of images to leave out, and what is printed."""
    files = ["-o", str(tmp_path / "found.json"), "--list", str(tmp_path / "list.txt")]
    assert cli.main(["data", "check", str(folder), *files]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    names = [Path(line).name for line in (tmp_path / "list.txt").read_text().splitlines()]
    return found, names, capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 images of two classes, and one image or two for each fault."""
    random, root = np.random.default_rng(), tmp_path / "images"
    for split in ("train", "test"):
        for i in range(24 if split == "train" else 6):
            path = root / split / "ab"[i % 2] / f"{split}{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(random).save(path, quality=92)
    train = root / "train" / "a"
    shutil.copy(train / "train00.jpg", train / "copy.jpg")
    with Image.open(train / "train02.jpg") as image:
        image.resize((60, 50)).save(train / "near.png")
    with Image.open(root / "test" / "a" / "test00.jpg") as image:
        image.save(train / "leaked.jpg", quality=80)
    picture(random).save(train / "misnamed.jpg", "PNG")
    picture(random, 10, 12).save(train / "tiny.png")
    picture(random, 400, 400).save(train / "huge.png")
    picture(random, 40, 200).save(train / "narrow.png")
    Image.new("RGB", (90, 90), (3, 4, 5)).save(train / "plain.png")
    Image.fromarray(random.integers(0, 65536, (60, 70), dtype=np.uint16)).save(train / "deep.png")
    (train / "bad.jpg").write_bytes((train / "train00.jpg").read_bytes()[:900])
    rare = root / "train" / "c" / "rare.jpg"
    rare.parent.mkdir()
    picture(random).save(rare)
    return root


def test_each_fault_is_found_and_nothing_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, left_out, out = check(folder, tmp_path, capsys)
    images = {one["name"]: {Path(path).name for path in one["images"]} for one in found["findings"]}
    assert images == {
        "unreadable": {"bad.jpg"},
        "also in the test split, or nearly": {"leaked.jpg"},
        "copies, byte by byte": {"copy.jpg", "train00.jpg"},
        "near copies, by their looks": {"near.png", "train02.jpg"},
        "a single color": {"plain.png"},
        "tiny": {"tiny.png"},
        "huge": {"huge.png"},
        "long and narrow": {"narrow.png"},
        "another format than their name says": {"misnamed.jpg"},
        "classes of fewer than 5 images": {"rare.jpg"},
    }
    assert sorted(left_out) == sorted({"bad.jpg", "leaked.jpg", "plain.png", "tiny.png", "train00.jpg", "train02.jpg"})
    assert found["num_images"] == 35
    assert found["kinds"]["JPEG RGB"] == 27
    assert found["kinds"]["PNG 16-bit"] == 1
    assert found["classes"] == {"a": 22, "b": 12, "c": 1}
    assert (found["width"]["min"], found["height"]["max"]) == (12, 400)
    assert "images/s on one core" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line), out


def test_mean_and_deviation_are_those_of_all_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng()
    pixels = random.integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / "images" / f"{i}.png")
    found, left_out, out = check(tmp_path / "images", tmp_path, capsys)
    np.testing.assert_allclose(found["mean"], (pixels / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["std"], (pixels / 255).std((0, 1, 2)), rtol=1e-6)
    assert not left_out
    assert "nothing was found to be wrong" in out


def test_near_copies_are_those_of_all_pairs() -> None:
    random = np.random.default_rng()
    hashes = random.integers(0, 2**64, (300, similar.NUM_WORDS), dtype=np.uint64)
    thumbnails = random.integers(0, 256, (300, 8, 8), dtype=np.uint8)
    for row in range(100, 300):  # changed copies of others, near and not so near
        original = int(random.integers(0, row))
        bits = np.unpackbits(hashes[original].view(np.uint8))
        bits[random.permutation(256)[: random.integers(0, 16)]] ^= 1
        hashes[row] = np.packbits(bits).view(np.uint64)
        noise = random.normal(0, random.choice([1, 8]), (8, 8))
        thumbnails[row] = (thumbnails[original] + noise).round().clip(0, 255)

    def near(a: int, b: int) -> bool:
        distance = int(np.unpackbits((hashes[a] ^ hashes[b]).view(np.uint8)).sum())
        difference: npt.NDArray[np.float64] = thumbnails[a].astype(float) - thumbnails[b]
        return distance <= 10 and float((difference**2).mean()) <= 16

    together = {
        frozenset((a, b)) for group in similar.groups(hashes, thumbnails) for a in group for b in group if a < b
    }
    reached = {row: {row} for row in range(300)}  # by brute force
    for a in range(300):
        for b in range(a):
            if near(a, b) and reached[a] is not reached[b]:
                reached[a] |= reached[b]
                for row in reached[a]:
                    reached[row] = reached[a]
    assert together == {frozenset((a, b)) for a in range(300) for b in range(a) if b in reached[a]}
    assert len(together) > 20


def test_another_word_is_one_line() -> None:
    with raises_one_line(ConfigError, "sslx data has the commands check and stats, not chekc"):
        from sslx.commands import data

        data.main(["chekc"])
