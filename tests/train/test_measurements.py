"""A measurement never costs the run: what cannot be measured is left out with a line, after all else is saved."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.processes import is_one_line, pretrain
from kit.runs import Run, status_of
from sslx import cli
from sslx.runs import checkpoint

COLORS = {"cat": (1.0, 0.2, 0.2), "dog": (0.2, 1.0, 0.2), "rare": (0.2, 0.2, 1.0)}


def images(root: Path, **numbers: int) -> Path:
    """Random pictures of a tint a class, below ``root``: ``SPLIT__CLASS=number`` or ``CLASS=number``."""
    rng = np.random.default_rng()
    for name, number in numbers.items():
        kind = name.rpartition("__")[2]
        folder = root / name.replace("__", "/").replace("rare", "[rare]")
        folder.mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (24, 24, 3)) * np.array(COLORS[kind])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def on(root: Path) -> list[str]:
    """The flags of a run on images."""
    source = f"--source.name folder --source.root {root} --data.backend torchvision --data.threads 0"
    return [*source.split(), "--batch-size", "4", "--online.every", "15"]


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two classes of 30 images and one of a single image."""
    folder = tmp_path_factory.mktemp("rare")
    numbers = {"train__cat": 30, "train__dog": 30, "train__rare": 1, "test__cat": 8, "test__dog": 8, "test__rare": 1}
    assert cli.main(pretrain(folder, *on(images(folder / "images", **numbers)), "--steps", "15")) == 0
    return folder / "r"


def test_four_labeled_images_make_a_run(here: Run, tmp_path: Path) -> None:
    assert here(*on(images(tmp_path / "images", cat=2, dog=2))) == (0, "")
    (line,) = [line for line in here.out.splitlines() if "no online probe" in line]
    assert "4 training images are too few" in line
    assert checkpoint.load(tmp_path / "r")["step"] == 2
    assert status_of(tmp_path).state == "done"


def test_an_online_probe_that_fails_ends_no_run(here: Run, tmp_path: Path) -> None:
    root = images(tmp_path / "images", train__cat=6, train__dog=6, test__cat=3, test__dog=3)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    assert here(*on(root), "--steps", "3") == (0, "")
    assert "no online probe this time: " in here.out
    assert checkpoint.load(tmp_path / "r")["step"] == 3


@pytest.mark.soak
def test_a_rare_class_ends_no_probe(rare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", str(rare), "--probe.num-draws", "2", "--no-baselines"]) == 0
    out = capfd.readouterr().out
    assert "no probe with 5 labels per class: class [rare] has 1 training image\n" in out
    assert "kNN with at most 20 neighbors, not 100, 200" in out
    assert "1 label" in out
    (score,) = json.loads((rare / "probe.json").read_text())["scores"]
    assert ([*score["knn_held_out"]], *score["low_shot"]) == (["5", "10", "20"], "1")
    assert score["knn"] is not None
    assert score["linear"] is not None


def test_a_probe_that_cannot_be_written_is_printed(rare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (rare / "probe.json").unlink(missing_ok=True)
    (rare / "probe.json").mkdir()
    try:
        assert cli.main(["probe", str(rare), "--probe.num-draws", "2", "--no-baselines"]) == 74
    finally:
        (rare / "probe.json").rmdir()
    out, err = capfd.readouterr()
    assert "pretrained encoder" in out
    is_one_line(err, "probe.json")


@pytest.mark.slow
def test_a_folder_without_a_test_split_is_drawn(here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert here(*on(images(tmp_path / "images", cat=8, dog=8)))[0] == 0
    assert cli.main(["plot", str(tmp_path / "r")]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "no test split: 14 of the 16 training images are held out in its place" in out
    for name in ("loss.png", "tsne.png"):
        assert (tmp_path / "r" / name).read_bytes().startswith(b"\x89PNG")
    other = images(tmp_path / "other", cat=4)
    assert cli.main(["plot", str(tmp_path / "r"), "--source.test-root", str(other)]) == 0
    assert "test split: " in capfd.readouterr().out


def test_what_cannot_be_drawn_is_left_out(here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "images", cat=8, dog=8)
    assert here(*on(root))[0] == 0
    run = tmp_path / "r"
    root.rename(tmp_path / "gone")
    assert cli.main(["plot", str(run)]) == 0
    out = capfd.readouterr().out
    assert (run / "loss.png").is_file()
    assert not (run / "tsne.png").exists()
    assert "left out: " in out
    (run / "metrics.jsonl").unlink()
    assert cli.main(["plot", str(run)]) == 66
    is_one_line(capfd.readouterr().err)
