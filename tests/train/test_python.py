"""``sslx.pretrain``: what the command does, from a program, with images that the program has."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sslx
from kit.checkpoints import equal
from kit.errors import raises_one_line
from kit.loaders import Backend, assert_same, every_backend, take, training_loader
from kit.processes import pretrain as tiny
from kit.python import python
from kit.sources import in_memory
from sslx import cli, config
from sslx.data.sources import Context, dataset
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.runs import checkpoint


class Items:
    """A Dataset of pictures in every form that there is."""

    classes = ("cat", "dog")

    def __init__(self, pixels: list[Any], folder: Path | None = None) -> None:
        self.pixels, self.folder = pixels, folder
        self.targets = [i % 2 for i in range(len(pixels))]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> object:
        import torch

        pixels = self.pixels[row]
        picture = Image.fromarray(pixels)
        if self.folder and row % 5 == 4:
            picture.save(self.folder / f"{row}.png")
            return self.folder / f"{row}.png", "a label"
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        return (pixels, (picture, 1), {"image": tensor}, tensor / 255)[row % 4]


@pytest.fixture
def pixels() -> list[Any]:
    random = np.random.default_rng()
    return [random.integers(0, 256, (*random.integers(20, 40, 2), 3), dtype=np.uint8) for _ in range(24)]


def options(folder: Path, **others: Any) -> dict[str, Any]:
    """The options of ``kit.processes.pretrain`` as keywords."""
    tree = json.loads(config.dump(config.load(tiny(folder)[1:])))
    kept = ("encoder", "method", "optim", "data", "batch_size", "device", "precision", "runs", "name")
    tree = {name: tree[name] for name in kept} | {"online.every": 0, "log": {"every": 1}, "steps": 2}
    return {**tree, **others}


@pytest.mark.soak
def test_it_does_what_the_command_does(tmp_path: Path) -> None:
    assert cli.main(tiny(tmp_path / "command")) == 0
    settings = config.load(tiny(tmp_path / "config")[1:])
    trained = [
        sslx.pretrain(**options(tmp_path / "call", source={"name": "synthetic", "num_samples": 64})),
        sslx.pretrain(settings),
    ]
    for one in trained:
        assert one.step == 2
        for part in ("method", "optimizer"):
            assert equal(checkpoint.load(one.folder)[part], checkpoint.load(tmp_path / "command" / "r")[part])


def test_it_trains_on_a_dataset_in_any_thread_and_goes_on(tmp_path: Path, pixels: list[Any]) -> None:
    changed = {
        "checkpoint": {"every": 1},
        "data": {"backend": "torchvision", "size": 16, "threads": 0},
        "batch_size": 8,
    }
    found = list[Any]()

    def train() -> None:
        found.append(sslx.pretrain(dataset=Items(pixels), **options(tmp_path, **changed)))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    (trained,) = found
    assert trained.embed(Items(pixels)).shape == (24, trained.dim)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step_2")  # as if it had been killed
    with raises_one_line(DataError, "other images"):
        sslx.pretrain(dataset=Items(pixels[::-1]), **options(tmp_path, **changed, resume="auto"))
    again = sslx.pretrain(dataset=Items(pixels), **options(tmp_path, **changed, resume="auto"))
    assert equal(dict(again.weights), dict(trained.weights))
    with raises_one_line(MissingInput, "came from a Python program"):
        trained.settings.source.build("train", Context())


@every_backend
def test_a_dataset_gives_the_batches_of_its_pixels(pixels: list[Any], backend: Backend, tmp_path: Path) -> None:
    array = np.empty(24, dtype=object)
    array[:] = pixels
    dataset.use(Items(pixels, tmp_path))
    try:
        source = dataset.Config().build("pretrain", Context())
    finally:
        dataset.use(None)
    assert source.facts.classes == ("cat", "dog")
    assert source.describe() == "a Items: 24 images, 2 classes (cat, dog)"
    specs = [ViewSpec(size=16, augment=Augment())]
    expected = training_loader(in_memory(array, source.facts.labels), backend, specs)
    assert_same(take(training_loader(source, backend, specs), 4), take(expected, 4))


def test_what_cannot_be_trained_on_is_one_line(tmp_path: Path, pixels: list[Any]) -> None:
    for wrong, words in (
        (iter(pixels), "expected a Dataset with __len__ and __getitem__, got list_iterator"),
        (Items([]), "the Items is empty"),
        ([3, 4], "item 0 of the list is no picture: expected images as paths, PIL images"),
    ):
        with raises_one_line((ConfigError, DataError), words):
            sslx.pretrain(dataset=wrong, **options(tmp_path))
    with raises_one_line(ConfigError, "start the script by torchrun --nproc-per-node N instead of ranks=N"):
        sslx.pretrain(dataset=Items(pixels), **options(tmp_path, ranks=2))
    with raises_one_line(ConfigError, "wrong options for sslx.pretrain"):
        sslx.pretrain(**options(tmp_path, stepps=2))
    with raises_one_line(ConfigError, "batch size 64 is more than the 24 images"):
        sslx.pretrain(dataset=Items(pixels), **options(tmp_path, batch_size=64))
    assert not (tmp_path / "r").exists()


SCRIPT = """
import sys
import numpy as np
import sslx

images = list(np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3), dtype=np.uint8))
if __name__ == "__main__":
    print(sslx.pretrain(sys.argv[1], dataset=images, **eval(sys.argv[2])).step, "steps on a rank", flush=True)
"""


@pytest.mark.slow
def test_a_script_under_torchrun_trains_on_its_dataset(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = config.load([*tiny(tmp_path)[1:], "--batch-size", "8", "--data.backend", "torchvision"])
    (tmp_path / "base.json").write_text(config.dump(settings))
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "script.py"]
    out = python(*argv, tmp_path / "base.json", {"runs": str(tmp_path), "name": "r"}).stdout
    assert out.count("2 steps on a rank") == 2
    assert sslx.load(tmp_path / "r").settings.source.name == "dataset"
