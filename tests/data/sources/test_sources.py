"""Sources: what is found where, with which labels, and what a user reads when it is not there."""

import hashlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits
from torchvision import datasets

from kit.errors import raises_one_line
from kit.sources import folder, pixels_of, relative
from sslx.data import sources
from sslx.data.sources import build, cifar10, digits, fashion_mnist, stl10, synthetic
from sslx.data.sources.folder import Config as Folder
from sslx.errors import ConfigError, MissingInput

Picture = Callable[[int, int, int], npt.NDArray[np.uint8]]
Make = Callable[..., Path]


# ---- the bundled ones


def test_digits_are_cut_class_by_class_into_disjoint_splits() -> None:
    train, test = build(digits.Config(), "train"), build(digits.Config(), "test")
    assert train.facts.labels is not None
    assert test.facts.labels is not None
    assert pixels_of(train).shape == (len(train), 8, 8, 3)
    assert pixels_of(train).dtype == np.uint8
    assert pixels_of(train).max() == 255
    assert len(train) + len(test) == 1797
    assert train.facts.classes == test.facts.classes == tuple("0123456789")
    every = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(test.facts.labels), every // 5)
    np.testing.assert_array_equal(np.bincount(train.facts.labels), every - every // 5)
    np.testing.assert_array_equal(pixels_of(build(digits.Config(), "pretrain")), pixels_of(train))
    # The same images with the same labels as scikit-learn's, none twice: the splits are disjoint.
    ours = [(p[..., 0].tobytes(), y) for s in (train, test) for p, y in zip(pixels_of(s), s.facts.labels, strict=True)]  # pyright: ignore[reportArgumentType]
    scaled = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(ours) == sorted((p.tobytes(), y) for p, y in zip(scaled, load_digits().target, strict=True))


def test_synthetic_images_are_the_same_each_time() -> None:
    config = synthetic.Config(num_samples=130)
    first, again, test = build(config, "train"), build(config, "train"), build(config, "test")
    assert pixels_of(first).shape == (130, 64, 64, 3)
    np.testing.assert_array_equal(pixels_of(first), pixels_of(again))
    np.testing.assert_array_equal(first.facts.labels, np.arange(130) % 10)
    assert (pixels_of(first) != pixels_of(test)).mean() > 0.5
    assert len(np.unique(pixels_of(first).reshape(130, -1), axis=0)) == 130
    more = build(synthetic.Config(num_samples=200), "train")
    np.testing.assert_array_equal(pixels_of(more)[:130], pixels_of(first))
    with pytest.raises(ConfigError, match=r"num-samples must be at least 1, not 0"):
        build(synthetic.Config(num_samples=0), "train")


def test_digits_are_read_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    read = digits._read()
    assert "sklearn" not in sys.modules
    for array, expected in zip(read, load_digits(return_X_y=True), strict=True):
        np.testing.assert_array_equal(array, expected)


# ---- folders


def test_class_folders(make: Make) -> None:
    root = make("dog/2.JPG", "dog/1.png", "cat/x.JPEG", "cat/deep/er/y.PNG", "cat/notes.txt", "zebra/.hidden.jpg")
    make(".cache/thumb.jpg", "dog/.DS_Store", "cat/.trash/z.jpg")
    source = build(folder(root), "train")
    assert relative(source, root) == ["cat/deep/er/y.PNG", "cat/x.JPEG", "dog/1.png", "dog/2.JPG"]
    assert source.facts.classes == ("cat", "dog")
    np.testing.assert_array_equal(source.facts.labels, [0, 0, 1, 1])
    assert source.facts.labels is not None
    assert source.facts.labels.dtype == np.int64
    assert source.describe() == f"{root}: 4 images, 2 classes (cat, dog)"
    part = source.take(np.array([3, 0]))
    assert relative(part, root) == ["dog/2.JPG", "cat/deep/er/y.PNG"]
    np.testing.assert_array_equal(part.facts.labels, [1, 0])


def test_images_right_in_the_folder_are_unlabeled(make: Make) -> None:
    root = make("b.jpg", "a.png", "sub/c.jpg")
    source = build(folder(root), "pretrain")
    assert relative(source, root) == ["a.png", "b.jpg", "sub/c.jpg"]
    assert source.facts.labels is None
    assert source.facts.classes is None
    assert "3 images, unlabeled: 2 images such as a.png lie beside the folders" in source.describe()


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_split_subfolders(make: Make, held_out: str) -> None:
    root = make("train/cat/1.jpg", "train/dog/2.jpg", "train/owl/3.jpg")
    make(f"{held_out}/owl/4.jpg", f"{held_out}/cat/5.jpg")
    config = folder(root)
    train = build(config, "train")
    assert relative(train, root) == ["train/cat/1.jpg", "train/dog/2.jpg", "train/owl/3.jpg"]
    assert relative(build(config, "pretrain"), root) == relative(train, root)
    test = build(config, "test", training=train)
    assert relative(test, root) == [f"{held_out}/cat/5.jpg", f"{held_out}/owl/4.jpg"]
    assert test.facts.classes == train.facts.classes == ("cat", "dog", "owl")
    np.testing.assert_array_equal(test.facts.labels, [0, 2])


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_test_folder_beside_the_classes_is_not_trained_on(make: Make, held_out: str) -> None:
    root = make("cat/1.jpg", "dog/2.jpg", f"{held_out}/cat/3.jpg")
    config = folder(root)
    train = build(config, "pretrain")
    assert relative(train, root) == ["cat/1.jpg", "dog/2.jpg"]
    assert train.facts.classes == ("cat", "dog")
    assert relative(build(config, "test", training=train), root) == [f"{held_out}/cat/3.jpg"]


def test_a_test_root_of_its_own(make: Make, tmp_path: Path) -> None:
    root = make("cat/1.jpg", "dog/2.jpg", "../held_out/dog/3.jpg")
    source = build(folder(root, test_root=tmp_path / "held_out"), "test", training=build(folder(root), "train"))
    np.testing.assert_array_equal(source.facts.labels, [1])
    with raises_one_line(MissingInput, str(tmp_path / "nowhere"), "--source.test-root"):
        build(folder(root, test_root=tmp_path / "nowhere"), "test")
    with raises_one_line(MissingInput, str(root), "no folder named test", "--source.test-root"):
        build(folder(root), "test")


def test_folders_that_are_not_there_or_hold_nothing(make: Make, tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "no" / "where", tmp_path / "empty"
    empty.mkdir()
    texts = make("../texts/readme.txt", "../texts/notes/a.md").parent / "texts"
    with raises_one_line(MissingInput, str(nowhere), f"nearest existing folder: {tmp_path})", "--source.root"):
        build(folder(nowhere), "train")
    with raises_one_line(MissingInput, str(empty), "found no files", "--source.root"):
        build(folder(empty), "train")
    with raises_one_line(MissingInput, str(empty), "--source.test-root"):
        build(folder(make("cat/1.jpg"), test_root=empty), "test")
    with raises_one_line(MissingInput, str(texts), ".md: 1 (notes/a.md); .txt: 1 (readme.txt)", "--source.root"):
        build(folder(texts), "train")
    with raises_one_line(ConfigError, "--source.root"):
        build(Folder(), "train")


def test_links_are_followed_but_not_in_circles(make: Make, tmp_path: Path) -> None:
    root = make("cat/1.jpg", "../elsewhere/2.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "zebra").symlink_to(tmp_path / "elsewhere")  # the same images are read once, under the first name
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "again").symlink_to(root)  # two circles: 2^40 ways to go round before the system stops it
    source = build(folder(root), "train")
    assert relative(source, root) == ["cat/1.jpg", "dog/2.jpg"]


# ---- torchvision's data sets, in torchvision's own files


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def dump(path: Path, content: dict[str, Any]) -> tuple[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return path.name, digest(path)


def rows(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """CIFAR's: all of a row's red, then green, then blue values."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(name: Any, kind: Any, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.stack([picture(i, 32, 32) for i in range(8)])
    labels = [3, 0, 2, 1, 1, 0, 3, 2]
    classes = ["airplane", "apple", "cat", "owl"]
    base, ten = tmp_path / kind.base_folder, name == "cifar10"
    key = "labels" if ten else "fine_labels"
    parts = {"data_batch_1": (0, 4), "data_batch_2": (4, 6)} if ten else {"train": (0, 6)}
    parts["test_batch" if ten else "test"] = (6, 8)
    written = [dump(base / n, {"data": rows(images[a:b]), key: labels[a:b]}) for n, (a, b) in parts.items()]
    meta = dump(base / kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "train_list", [list(part) for part in written[:-1]])
    monkeypatch.setattr(kind, "test_list", [list(written[-1])])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": meta[1]})
    config = sources.config(name)(name=name, root=tmp_path)
    for split, chosen in (("pretrain", slice(0, 6)), ("train", slice(0, 6)), ("test", slice(6, 8))):
        source = build(config, split)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(pixels_of(source), images[chosen])
        np.testing.assert_array_equal(source.facts.labels, labels[chosen])
        assert source.facts.classes == tuple(classes)
        assert source.facts.size == 32


def test_fashion_mnist(tmp_path: Path, picture: Picture) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    gray = np.stack([picture(i, 28, 28)[..., 0] for i in range(7)])
    labels = np.array([9, 0, 1, 5, 5, 2, 8], dtype=np.uint8)
    for name, part in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        number = len(labels[part])
        header = struct.pack(">IIII", 0x803, number, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + gray[part].tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, number) + labels[part].tobytes())
    config = fashion_mnist.Config(root=tmp_path)
    train, test = build(config, "pretrain"), build(config, "test")
    np.testing.assert_array_equal(pixels_of(train), np.repeat(gray[:5, ..., None], 3, axis=-1))
    np.testing.assert_array_equal(test.facts.labels, labels[5:])
    assert train.facts.size == 32
    assert train.facts.classes is not None
    assert train.facts.classes[9] == "Ankle boot"


def test_stl10(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / datasets.STL10.base_folder
    base.mkdir()
    images = np.stack([picture(i, 96, 96) for i in range(6)])
    labels = np.array([1, 10, 4], dtype=np.uint8)  # from 1 in the files
    binary = images.transpose(0, 3, 2, 1)  # by columns
    files = {
        "train_X.bin": binary[:2].tobytes(),
        "train_y.bin": labels[:2].tobytes(),
        "unlabeled_X.bin": binary[2:5].tobytes(),
        "test_X.bin": binary[5:].tobytes(),
        "test_y.bin": labels[2:].tobytes(),
        "class_names.txt": "\n".join(f"class{i}" for i in range(10)).encode(),
    }
    for name, content in files.items():
        (base / name).write_bytes(content)
    for member in ("train_list", "test_list"):
        listed = [[n, digest(base / n)] for n, _ in getattr(datasets.STL10, member)]
        monkeypatch.setattr(datasets.STL10, member, listed)
    config = stl10.Config(root=tmp_path)
    pretrain, train, test = (build(config, split) for split in ("pretrain", "train", "test"))
    np.testing.assert_array_equal(pixels_of(pretrain), images[:5])
    assert pretrain.facts.labels is None
    np.testing.assert_array_equal(pixels_of(train), images[:2])
    np.testing.assert_array_equal(train.facts.labels, [0, 9])
    np.testing.assert_array_equal(pixels_of(test), images[5:])
    np.testing.assert_array_equal(test.facts.labels, [3])
    assert train.facts.size == 96
    assert train.facts.classes == test.facts.classes == tuple(f"class{i}" for i in range(10))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "stl10"])
def test_a_data_set_that_is_not_there(name: Any, tmp_path: Path) -> None:
    for split in ("pretrain", "train", "test"):
        with raises_one_line(MissingInput, name, str(tmp_path / "data"), "--source.root", "--source.download"):
            build(sources.config(name)(name=name, root=tmp_path / "data"), split)


def test_a_damaged_data_set_is_not_read(tmp_path: Path) -> None:
    dump(tmp_path / "cifar-10-batches-py" / "data_batch_1", {"data": [], "labels": []})
    with raises_one_line(MissingInput, str(tmp_path), "--source.root"):
        build(cifar10.Config(root=tmp_path), "train")
