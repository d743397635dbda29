"""A checkpoint knows which images it was trained on: others are refused with the difference, moved ones are not."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kit.errors import raises_one_line
from kit.loaders import training_loader
from kit.sources import folder, relative
from sslx.data import Loader
from sslx.data.sources import Context, Source, build, digits
from sslx.data.views import Augment, ViewSpec
from sslx.errors import DataError

SPECS = (ViewSpec(size=8, augment=Augment()),)
NUM = 150  # more than are looked into


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 files in two class folders, not to be written to."""
    root = tmp_path_factory.mktemp("identity") / "images"
    rng = np.random.default_rng()
    for i in range(NUM):
        path = root / ("cat", "dog")[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def copy(images: Path, tmp_path: Path) -> Path:
    """The same images elsewhere."""
    shutil.copytree(images, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def source(root: Path) -> Source:
    return build(folder(root), "pretrain")


def loader(source: Source, say: Callable[[str], None] = lambda _: None) -> Loader:
    return training_loader(source, "synthetic", SPECS, batch_size=10, say=say)


def saved(source: Source) -> dict[str, Any]:
    """The loader's state, as a checkpoint brings it back."""
    first = loader(source)
    next(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    assert len(file.getvalue()) < 5_000 + 5 * len(source)
    file.seek(0)
    return torch.load(file, weights_only=True)


def refused(state: dict[str, Any], source: Source, *words: str) -> None:
    with raises_one_line(DataError, *words, "restore the images, or start a new run with --encoder.weights"):
        loader(source).load_state_dict(state)


def test_the_same_images_elsewhere_go_on(images: Path, copy: Path) -> None:
    resumed = loader(source(copy))
    resumed.load_state_dict(saved(source(images)))
    assert resumed.delivered == 1
    copy.rename(copy.with_name("train"))
    resumed.load_state_dict(saved(source(copy.parent)))
    (copy.with_name("train") / "cat" / "notes.txt").write_text("no image")
    resumed.load_state_dict(saved(source(images)))


def test_other_images_of_the_same_number_are_refused(images: Path, copy: Path) -> None:
    state = saved(source(images))
    for path in sorted(copy.rglob("*.png")):
        path.rename(path.with_name(f"new{path.name}"))
    refused(state, source(copy), "trained on other images", "150 new, 150 gone, the first new one cat/new000.png")


@pytest.mark.parametrize("number", [0, 1, 77, NUM - 1])
def test_one_image_that_is_not_the_same_is_found(images: Path, copy: Path, number: int) -> None:
    state = saved(source(images))
    order = relative(source(copy), copy)
    path = copy / order[number]
    other = copy / ("dog" if order[number].startswith("cat") else "cat")
    moved = path.rename(other / path.name)
    words = f"1 new, 1 gone, the first new one {other.name}/{path.name}"
    refused(state, source(copy), "trained on other images", words)
    path.write_bytes(moved.read_bytes())
    refused(state, source(copy), "150 images, the source now has 151", f"1 new, the first new one {other.name}/")
    moved.unlink()
    loader(source(copy)).load_state_dict(state)
    path.unlink()
    place = f"after {order[number - 1]}" if number else "before all others"
    refused(state, source(copy), "150 images, the source now has 149", f"1 gone, the first one {place}")


def test_other_images_under_the_same_names_are_refused(images: Path, copy: Path) -> None:
    state = saved(source(images))
    for path in copy.rglob("*.png"):
        Image.open(path).rotate(180).save(path)
    refused(state, source(copy), "trained on other images", "64 of 64 compared files", "cat/000.png")


def test_a_file_that_cannot_be_read_for_now_is_not_another_one(images: Path, copy: Path) -> None:
    state, path = saved(source(images)), copy / "cat" / "000.png"
    path.unlink()
    path.symlink_to("gone")  # as a mount that is not there
    loader(source(copy)).load_state_dict(state)
    refused({**state, "num_samples": 151}, source(copy), "151 images, the source now has 150")


def test_labels_belong_to_the_images(images: Path) -> None:
    labeled = source(images)
    labels = labeled.facts.labels
    assert labels is not None
    state = saved(labeled)
    others = replace(labeled, facts=replace(labeled.facts, labels=1 - labels))
    refused(state, others, "trained on other images", "other labels")
    refused(state, replace(labeled, facts=replace(labeled.facts, labels=None, classes=None)), "other labels")


def test_images_in_memory(images: Path) -> None:
    pictures = digits.Config().build("pretrain", Context())
    state = saved(pictures)
    loader(build(digits.Config(), "pretrain")).load_state_dict(state)
    assert pictures.facts.labels is not None
    refused(state, replace(pictures, pixels=255 - pictures.pixels), "trained on other images")
    rolled = replace(pictures.facts, labels=np.roll(pictures.facts.labels, 1))
    refused(state, replace(pictures, facts=rolled), "trained on other images")
    refused(state, source(images), f"{len(pictures):,} images, the source now has 150")


def test_a_checkpoint_that_did_not_note_its_images_goes_on_with_a_word(images: Path) -> None:
    state = saved(source(images))
    del state["images"]
    lines: list[str] = []
    loader(source(images), lines.append).load_state_dict(state)
    assert len(lines) == 1
    assert "without its images' identity" in lines[0]
    refused({**state, "num_samples": 151}, source(images), "151 images, the source now has 150")


def test_the_identity_is_a_function_of_names_labels_and_contents(images: Path, copy: Path) -> None:
    one, two = source(images).identity(), source(copy).identity()
    assert one["digest"] == two["digest"]
    assert torch.equal(one["paths"], two["paths"])
    assert torch.equal(one["contents"], two["contents"])
    assert len(one["paths"]) == NUM
    assert len(one["contents"]) == 64
    assert source(copy).difference(one, two) == ""
