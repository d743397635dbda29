"""What a run says of its images before it claims its folder, and which images it goes on with."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kit.processes import TINY
from sslx import cli

Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """``train(root, "--flag", ...)`` -> (exit code, stdout, stderr) of a run on that folder, in this process."""

    def run(root: Path, *flags: str) -> tuple[int, str, str]:
        capfd.readouterr()
        given = ["--source.name", "folder", "--source.root", str(root), "--batch-size", "4", *flags]
        code = cli.main(["pretrain", *TINY, *given, "--runs", str(tmp_path / "runs"), "--name", "r"])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def images(root: Path, *folders: str, num: int = 6) -> Path:
    rng = np.random.default_rng()
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / folder / f"{i}.png")
    return root


def test_splits_are_told_before_the_first_step(train: Train, tmp_path: Path):
    root = images(tmp_path / "data", "Train/cat", "Train/dog", "Test/cat", "Test/dog")
    code, out, err = train(root, "--online.every", "2")
    assert (code, err) == (0, "")
    said, trained = out.split("step 1/2")
    assert f"{root}/Train: 12 images, 2 classes (cat, dog)" in said
    assert f"held out, not trained on: Test/ in {root}" in said
    assert f"to probe on: {root}/Test: 12 images, 2 classes (cat, dog)" in said
    assert "knn" in trained


def test_a_class_of_the_test_split_alone_does_not_end_pretraining(train: Train, tmp_path: Path):
    root = images(tmp_path / "data", "train/cat", "train/dog", "test/cat", "test/wolf")
    code, out, err = train(root, "--online.every", "2")
    assert (code, err) == (0, "")
    assert "6 test images are left out: the training images lack their class, 'wolf'" in out.split("step 1/2")[0]


def test_a_test_split_of_other_classes_does_not_end_pretraining(train: Train, tmp_path: Path):
    root = images(tmp_path / "data", "train/cat", "train/dog", "test/wolf")
    code, out, err = train(root, "--online.every", "2")
    assert (code, err) == (0, "")
    said = out.split("step 1/2")[0]
    assert "the test classes are 'wolf'" in said
    assert "the online probe classifies training images instead" in said


def test_a_test_split_without_labels_does_not_end_pretraining(train: Train, tmp_path: Path):
    root = images(tmp_path / "data", "train/cat", "train/dog", "test")
    code, out, err = train(root, "--online.every", "2")
    assert (code, err) == (0, "")
    probed = next(line for line in out.splitlines() if line.startswith("to probe on: "))
    assert probed.endswith("6 images, unlabeled: no class folders; the online probe classifies training images instead")


@pytest.mark.parametrize(
    ("folders", "flags", "code", "words"),
    [
        (["bus", "car", "train"], [], 64, "--source.splits none"),
        (["bus", "car"], ["--source.test-root", "gone"], 66, "--source.test-root"),
        (["bus", "car"], ["--batch-size", "64"], 64, "--batch-size 12 or less"),
        (["bus"], ["--batch-size", "2", "--method.name", "supcon"], 64, "supcon needs"),
    ],
)
def test_an_error_of_the_data_leaves_no_run_folder(
    train: Train, tmp_path: Path, folders: list[str], flags: list[str], code: int, words: str
):
    root = images(tmp_path / "data", *folders)
    ended, _, err = train(root, *flags)
    assert ended == code, err
    assert len(err.splitlines()) == 1
    assert words in err
    assert not (tmp_path / "runs").exists()


def test_one_image_cannot_be_trained_on(train: Train, tmp_path: Path):
    code, out, err = train(images(tmp_path / "data", "cat", num=1))
    assert code == 64
    assert "1 image, 1 class (cat)" in out
    assert err.startswith("error: the source has 1 image, too few to train on: a batch of this run needs 2 or more")


def test_a_resume_on_other_images_is_refused_and_on_moved_ones_goes_on(train: Train, tmp_path: Path):
    root = images(tmp_path / "before", "cat", "dog")
    assert train(root)[0] == 0
    moved = root.rename(tmp_path / "moved")
    code, out, err = train(moved, "--resume", "auto")
    assert (code, err) == (0, "")
    assert "has already finished" in out
    (moved / "cat" / "0.png").rename(moved / "dog" / "a.png")
    code, _, err = train(moved, "--resume", "auto")
    assert code == 65
    assert "trained on other images (1 new, 1 gone, the first new one dog/a.png)" in err


def test_the_pictures_of_a_run_are_not_its_data(train: Train, tmp_path: Path):
    root = images(tmp_path, "cat", "dog")  # where the runs go too
    assert train(root)[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "runs" / "r" / "tsne.png")
    code, out, err = train(root, "--resume", "auto")
    assert (code, err) == (0, "")
    assert "12 images, 2 classes (cat, dog)" in out
    assert "not taken: run folders of sslx: 1 (runs/r/)" in out


def test_a_source_that_is_not_named_is_the_folder_of_the_root(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    root = images(tmp_path / "data", "cat", "dog")
    assert TINY[:4:2] == ["--source.name", "--source.num-samples"]
    flags = ["--source.root", str(root), "--runs", str(tmp_path / "runs"), "--batch-size", "4"]
    assert cli.main(["pretrain", *TINY[4:], *flags]) == 0
    assert f"{root}: 12 images, 2 classes (cat, dog)" in capfd.readouterr().out
    config = json.loads((tmp_path / "runs" / "simclr_folder" / "config.json").read_text())
    assert config["source"]["name"] == "folder"
