"""Which images are trained on and which are held out, by the names of folders: nothing lost or mixed up in silence."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import raises_one_line
from kit.sources import folder, in_memory, relative
from sslx.data.sources import Source, build, cifar10
from sslx.data.sources.splits import kind_of, kinds_of
from sslx.errors import ConfigError, DataError, MissingInput

Make = Callable[..., Path]


def trained_on(root: Path, **settings: Any) -> Source:
    return build(folder(root, **settings), "pretrain")


def classes(*names: str) -> Source:
    """A training split with one image of each class."""
    return in_memory(np.zeros((len(names), 8, 8, 3), dtype=np.uint8), np.arange(len(names)), names=names)


def refused(root: Path, error: type[Exception], *parts: str, **settings: Any) -> None:
    with raises_one_line(error, *parts):
        trained_on(root, **settings)


@pytest.mark.parametrize(
    ("kind", "spelled"),
    [
        ("train", "train Train TRAIN training Training train2017 train_set training_set train_images images_train"),
        ("train", "trainval"),
        ("test", "test Test TEST testing test2019 test_set testset test-images"),
        ("val", "val Val valid VALID validation Validation dev eval evaluation val2017 holdout held_out Held-Out"),
        (None, "cat trains trainer testament value validity developer evaluate 2017 set bus contest pretrain"),
        (None, "my_test_x"),
    ],
)
def test_the_usual_names_of_splits(kind: str | None, spelled: str) -> None:
    assert {name: kind_of(name) for name in spelled.split()} == dict.fromkeys(spelled.split(), kind)


USUAL = (
    "Train Test, training validation, train valid, TRAIN VAL, train2017 val2017, training_set test_set, "
    "data/train data/dev, images/train images/val, ILSVRC2012_img_train ILSVRC2012_img_val, Dogs-Train dogs-test, "
    "deep/down/trn deep/down/tst"
).split(", ")


@pytest.mark.parametrize("pair", USUAL)
def test_splits_by_any_usual_name(make: Make, pair: str) -> None:
    train, held_out = pair.split()
    root = make(*(f"{split}/{label}/{i}.png" for split in (train, held_out) for label in ("cat", "dog") for i in "01"))
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "0.txt").write_text("0 0.5 0.5 1 1")
    source = trained_on(root)
    assert relative(source, root) == [f"{train}/{label}/{i}.png" for label in ("cat", "dog") for i in "01"]
    assert source.facts.classes == ("cat", "dog")
    assert any("held out" in note and f"{Path(held_out).name}/" in note for note in source.notes)
    test = build(folder(root), "test", training=source)
    assert relative(test, root) == [f"{held_out}/{label}/{i}.png" for label in ("cat", "dog") for i in "01"]
    np.testing.assert_array_equal(test.facts.labels, source.facts.labels)


def test_a_name_that_only_holds_such_a_word_is_a_class(make: Make) -> None:
    every = [f"{name}/1.png" for name in ("crash_test", "express_train", "steam_train", "stress_test")]
    assert kinds_of([name.partition("/")[0] for name in every]) == {}
    assert relative(trained_on(make(*every)), make()) == every


def test_a_test_split_beside_the_root_is_named(make: Make) -> None:
    root = make("train/cat/1.png", "valid/cat/2.png") / "train"
    with raises_one_line(MissingInput, "(beside it is valid): give the folder with --source.test-root"):
        build(folder(root), "test")


def test_a_class_named_train_is_asked_about(make: Make) -> None:
    every = ["bus/1.png", "car/1.png", "train/1.png", "train/2.png"]
    root = make(*every)
    refused(root, ConfigError, str(root), "train/", "bus/ and car/", "--source.splits folders", "--source.splits none")
    source = trained_on(root, splits="none")
    assert relative(source, root) == every
    assert source.facts.classes == ("bus", "car", "train")
    source = trained_on(root, splits="folders")
    assert relative(source, root) == every[2:]
    assert any("not trained on" in note and "bus/ and car/" in note for note in source.notes)


def test_a_class_named_valid_is_asked_about(make: Make) -> None:
    root = make("invalid/1.png", "valid/2.png")
    refused(root, ConfigError, "valid/", "--source.splits folders", "--source.splits none")
    assert trained_on(root, splits="none").facts.classes == ("invalid", "valid")
    assert relative(trained_on(root, splits="folders"), root) == ["invalid/1.png"]
    with pytest.raises(MissingInput, match=r"--source\.splits none holds no images out"):
        build(folder(root, splits="none"), "test")
    root = make("../pets/cat/1.png", "../pets/dog/2.png", "../pets/valid/cat/3.png").parent / "pets"
    assert relative(trained_on(root), root) == ["cat/1.png", "dog/2.png"]  # it holds classes itself: held out


def test_images_beside_the_splits_are_asked_about(make: Make) -> None:
    root = make("train/cat/1.png", "test/cat/2.png", "preview.png")
    refused(root, ConfigError, "train/", "images such as preview.png", "--source.splits folders")
    assert relative(trained_on(root, splits="folders"), root) == ["train/cat/1.png"]


def test_held_out_images_alone_are_not_trained_on_unasked(make: Make) -> None:
    root = make("Test/cat/1.png", "Test/dog/2.png")
    (root / "train").mkdir()
    refused(root, ConfigError, "Test/", "held out", "--source.splits none")
    assert len(trained_on(root, splits="none")) == 2


def test_two_training_splits_are_asked_about(make: Make) -> None:
    root = make("train2014/1.png", "train2017/2.png", "val2017/3.png")
    refused(root, ConfigError, "train2014/ and train2017/", "--source.root")
    assert relative(trained_on(root / "train2014"), root) == ["train2014/1.png"]


@pytest.mark.parametrize("deep", ["", "parts/"])
def test_splits_within_class_folders_are_asked_about(make: Make, deep: str) -> None:
    root = make("one/1.png", f"bottle/{deep}train/2.png", f"bottle/{deep}test/3.png", "cable/4.png")
    refused(root, ConfigError, f"bottle/{deep}test", "--source.splits none", str(root / "bottle" / deep))
    assert len(trained_on(root, splits="none")) == 4
    assert relative(trained_on(root / "bottle"), root) == [f"bottle/{deep}train/2.png"]


def test_a_held_out_name_further_down_is_told(make: Make) -> None:
    root = make("cat/1.png", "dog/test/2.png")
    source = trained_on(root)
    assert relative(source, root) == ["cat/1.png", "dog/test/2.png"]
    assert "trained on, although named like held-out images: dog/test" in source.notes


def test_the_labeled_test_split_is_probed_on(make: Make) -> None:
    root = make("train/cat/1.png", "test/2.png", "val/cat/3.png")
    test = build(folder(root), "test", training=classes("cat"))
    assert relative(test, root) == ["val/cat/3.png"]
    assert relative(trained_on(root), root) == ["train/cat/1.png"]


@pytest.mark.parametrize("splits", ["auto", "none", "folders"])
def test_a_named_test_split_is_never_trained_on(make: Make, splits: Any) -> None:
    root = make("cat/1.png", "dog/2.png", "extra/cat/3.png", "extra/dog/4.png")
    settings = {"test_root": root / "extra", "splits": splits}
    assert relative(trained_on(root, **settings), root) == ["cat/1.png", "dog/2.png"]
    refused(root, ConfigError, "--source.test-root", str(root), test_root=root, splits=splits)
    refused(root / "cat", ConfigError, "--source.test-root", "holds the training images", test_root=root, splits=splits)


def test_no_link_leads_to_held_out_images(make: Make) -> None:
    root = make("train/cat/1.png", "test/cat/2.png", "test/dog/3.png")
    (root / "train" / "dog").symlink_to(root / "test" / "dog")
    (root / "train" / "more").symlink_to("../test")
    assert relative(trained_on(root), root) == ["train/cat/1.png"]
    other = make("../elsewhere/train/cat/1.png").parent / "elsewhere"
    (other / "test").symlink_to(other / "train")
    assert relative(trained_on(other), other) == ["train/cat/1.png"]
    assert "not a test split, but the training images under another name: test/" in trained_on(other).notes
    with pytest.raises(MissingInput, match=r"--source\.test-root"):
        build(folder(other), "test")


# ---- what is said of the rest


def test_a_stray_image_that_turns_labels_off_is_told(make: Make) -> None:
    source = trained_on(make("cat/1.png", "dog/2.png", "stray.png"))
    assert source.facts.labels is None
    assert source.describe().endswith("3 images, unlabeled: stray.png lies beside the folders")
    assert trained_on(make() / "cat").describe().endswith("1 image, unlabeled: no class folders")


def test_files_that_are_not_taken_are_told_with_the_reason(make: Make) -> None:
    root = make("cat/1.png", "cat/2.jfif", "cat/3.JPE", "cat/a.svg", "dog/b.svg", "dog/c.jxl", "dog/d", "dog/._e.png")
    make("@eaDir/1.png", "cat/@eaDir/2.png", "__MACOSX/3.png", ".thumbs/4.png")
    (root / "none").mkdir()
    os.mkfifo(root / "cat" / "pipe.png")
    source = trained_on(root)
    assert relative(source, root) == ["cat/1.png", "cat/2.jfif", "cat/3.JPE"]
    told = next(note for note in source.notes if note.startswith("not taken: ")).removeprefix("not taken: ").split("; ")
    assert told == [
        ".svg: 2 (such as cat/a.svg)",
        ".jxl: 1 (dog/c.jxl)",
        "folders of other programs: 3 (such as @eaDir)",
        "hidden: 2 (such as .thumbs)",
        "not regular files: 1 (cat/pipe.png)",
        "without a suffix: 1 (dog/d)",
    ]
    assert "not a class, since it holds no image: dog/ and 1 more" in source.notes


def test_one_folder_of_folders_is_told(make: Make) -> None:
    root = make("photos/cat/1.png", "photos/dog/2.png")
    assert f"one class: give {root / 'photos'}" in "\n".join(trained_on(root).notes)
    assert trained_on(make() / "photos").facts.classes == ("cat", "dog")


@pytest.mark.parametrize("marker", ["run_id", "status.json"])
def test_run_folders_of_sslx_are_no_images(make: Make, marker: str) -> None:
    root = make("cat/1.png", "dog/2.png", "runs/a/tsne.png", "runs/b/deep/x.png", "cat/config.json.png")
    for run in ("a", "b"):
        (root / "runs" / run / "config.json").write_text("{}")
        (root / "runs" / run / marker).write_text("x")
    (root / "cat" / "config.json").write_text("{}")  # alone it is anyone's
    source = trained_on(root)
    assert relative(source, root) == ["cat/1.png", "cat/config.json.png", "dog/2.png"]
    assert source.facts.classes == ("cat", "dog")
    assert "run folders of sslx: 2 (such as runs/a/)" in "\n".join(source.notes)
    refused(root / "runs" / "a", Exception, "no images", "run folders of sslx")


def test_names_of_any_bytes_are_read_and_shown_in_one_line(make: Make) -> None:
    root = make(os.fsdecode(b"caf\xe9/1.png"), "new\nline/2.png", "[red]x/3.png", "x/\u202eodd.svg")
    source = trained_on(root)
    assert source.facts.classes == ("[red]x", r"caf\xe9", r"new\nline")
    np.testing.assert_array_equal(source.facts.labels, [0, 1, 2])
    for line in (source.describe(), *source.notes):
        line.encode()
        assert line.isprintable()
    test = build(folder(root, test_root=root / "new\nline"), "test")
    assert test.describe().isprintable()


# ---- test images that training knows nothing of


def test_test_images_of_classes_that_training_lacks_are_left_out_and_told(make: Make) -> None:
    root = make("train/cat/1.png", "train/dog/2.png", "test/dog/3.png", "test/cat/4.png", "test/wolf/5.png")
    make("test/wolf/6.png", "test/aardvark/7.png")
    train = trained_on(root)
    test = build(folder(root), "test", training=train)
    assert relative(test, root) == ["test/cat/4.png", "test/dog/3.png"]
    np.testing.assert_array_equal(test.facts.labels, [0, 1])
    assert "3 test images are left out: the training images lack their class, 'aardvark' and 1 more" in test.notes
    with raises_one_line(DataError, "the test classes are 'aardvark' and 3 more", str(root / "test")):
        build(folder(root), "test", training=classes("cow"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("images.zip", ("an archive", "unpack it")),
        ("images.tar.gz", ("an archive", "unpack it")),
        ("list.csv", ("a .csv file", "--source.name list reads it")),
        ("images.tar", ("an archive", "--source.name tar reads it")),
        ("list.xlsx", ("a table", "folder of the images")),
        ("a.jpeg", ("one image", "folder that holds")),
        ("noext", ("a file", "folder of your images")),
    ],
)
@pytest.mark.parametrize("flag", ["root", "test_root"])
def test_a_root_that_is_no_folder_is_named(make: Make, name: str, words: Sequence[str], flag: str) -> None:
    root = make("cat/1.png")
    (root / name).write_bytes(b"x")
    settings = {"root": root, flag: root / name}
    refused(settings.pop("root"), DataError, f"--source.{flag.replace('_', '-')}", name, *words, **settings)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://example.org/images", "is an address"),
        ("s3://bucket/images", "is an address"),
        ("x" * 300, "File name too long"),
        ("a\0b", r"a\x00b"),
        ("link", "is a link to gone, which does not exist"),
    ],
)
def test_a_root_that_cannot_be_is_named(tmp_path: Path, path: str, words: str) -> None:
    os.symlink("gone", tmp_path / "link")
    refused(Path(path) if ":/" in path else tmp_path / path, Exception, words)


def test_a_data_set_of_torchvision_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"x")
    refused(tmp_path, Exception, "no images", "--source.name cifar10")


def test_images_in_place_of_a_data_set_are_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"cifar10 not found under .* or --source\.name folder to read the images"):
        build(cifar10.Config(root=make("cat/1.png")), "pretrain")
    with pytest.raises(MissingInput, match=r"cifar10 not found under .* --source\.download to fetch it$"):
        build(cifar10.Config(root=tmp_path / "nowhere"), "pretrain")


def test_a_long_listing_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslx.data.sources.listing._FIRST_MESSAGE_S", -1.0)
    lines: list[str] = []
    root = make("cat/1.png", "dog/2.png")
    build(folder(root), "pretrain", say=lines.append)
    assert lines
    assert all(line.startswith(f"listing {root}/: ") for line in lines)
