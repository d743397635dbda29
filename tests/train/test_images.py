"""What a run says of its images before it claims its folder, and which images it goes on with."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kit.processes import TINY, is_one_line
from kit.runs import Run
from kit.sources import noise
from sslx import cli


def data(root: Path, *folders: str) -> list[str]:
    """Images in folders below root, and the flags for them."""
    for folder in folders:
        noise(root / folder, 6, 8)
    return ["--source.name", "folder", "--source.root", str(root), "--batch-size", "4"]


CLASSIFIES_OTHERS = "the online probe classifies training images instead"
SPLITS = {
    "Train/cat Train/dog Test/cat Test/dog": [
        "{root}/Train: 12 images, 2 classes (cat, dog)",
        "held out, not trained on: Test/ in {root}",
        "to probe on: {root}/Test: 12 images, 2 classes (cat, dog)",
    ],
    "train/cat train/dog test/cat test/wolf": [
        "6 test images are left out: the training images lack their class, 'wolf'"
    ],
    "train/cat train/dog test/wolf": ["the test classes are 'wolf'", CLASSIFIES_OTHERS],
    "train/cat train/dog test": [
        f"to probe on: {{root}}/test: 6 images, unlabeled: no class folders; {CLASSIFIES_OTHERS}\n"
    ],
}


@pytest.mark.parametrize("folders", SPLITS)
def test_splits_are_told_before_the_first_step_and_end_no_run(here: Run, tmp_path: Path, folders: str):
    root = tmp_path / "data"
    assert here(*data(root, *folders.split()), "--online.every", "2") == (0, "")
    before, trained = here.out.split("step 1/2")
    for word in SPLITS[folders]:
        assert word.format(root=root) in before
    assert "knn" in trained


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
    here: Run, tmp_path: Path, folders: list[str], flags: list[str], code: int, words: str
):
    came, err = here(*data(tmp_path / "data", *folders), *flags)
    assert came == code, err
    is_one_line(err, words)
    assert not (tmp_path / "r").exists()


def test_a_resume_on_other_images_is_refused_and_on_moved_ones_goes_on(here: Run, tmp_path: Path):
    assert here(*data(tmp_path / "before", "cat", "dog"))[0] == 0
    moved = (tmp_path / "before").rename(tmp_path / "moved")
    assert here(*data(moved), "--resume", "auto") == (0, "")
    assert "has already finished" in here.out
    (moved / "cat" / "000.png").rename(moved / "dog" / "a.png")
    code, err = here(*data(moved), "--resume", "auto")
    assert code == 65
    is_one_line(err, "trained on other images (1 new, 1 gone, the first new one dog/a.png)")


def test_the_pictures_of_a_run_are_not_its_data(here: Run, tmp_path: Path):
    flags = data(tmp_path, "cat", "dog")  # where the run goes too
    assert here(*flags)[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "r" / "tsne.png")
    assert here(*flags, "--resume", "auto") == (0, "")
    assert "12 images, 2 classes (cat, dog)" in here.out
    assert "not taken: run folders of sslx: 1 (r/)" in here.out


def test_a_source_that_is_not_named_is_the_folder_of_the_root(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    root = tmp_path / "data"
    _, _, *flags = data(root, "cat", "dog")
    assert TINY[:4:2] == ["--source.name", "--source.num-samples"]
    assert cli.main(["pretrain", *TINY[4:], *flags, "--runs", str(tmp_path / "runs")]) == 0
    assert f"{root}: 12 images, 2 classes (cat, dog)" in capfd.readouterr().out
    config = json.loads((tmp_path / "runs" / "simclr_folder" / "config.json").read_text())
    assert config["source"]["name"] == "folder"
