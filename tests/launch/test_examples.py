"""Each example of launch/examples runs as its first lines say, on a run and images made here."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslx import cli, rng
from sslx.trained import load

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """``script(name, *argv)`` -> what ``python NAME ARGV ...`` prints: run as that is, in this process."""

    def run(name: str, *argv: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of different sizes, in two folders."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        place = folder / ("cats" if i % 2 else "dogs")
        place.mkdir(exist_ok=True)
        pixels = rng.words(i, "pixels", np.arange(40 + i), num=36 * 3).astype(np.uint8).reshape(-1, 36, 3)
        Image.fromarray(pixels).save(place / (f"{i}.png" if i % 3 else f"{i}.jpg"))
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step on the images."""
    flags = f"--source.root {images} --data.size 16 --encoder.layers 1 1 1 1 --encoder.channels 8 8 8 16 --steps 1"
    flags += f" --batch-size 4 --online.every 0 --health.every 0 --name run --runs {tmp_path_factory.mktemp('runs')}"
    assert cli.main(["pretrain", *flags.split()]) == 0
    return Path(flags.split()[-1]) / "run"


def test_embed(run: Path, images: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    out = script("embed.py", run, images, "vectors.npy")
    assert out == "12 images, 16 numbers each: vectors.npy\n"
    vectors, paths = np.load(tmp_path / "vectors.npy"), (tmp_path / "vectors.txt").read_text().splitlines()
    assert vectors.shape == (12, 16)
    assert len(np.unique(vectors, axis=0)) == 12
    np.testing.assert_allclose(vectors[5:6], load(run).embed([paths[5]]).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fine_tune(run: Path, images: Path, own: bool, script: Script):
    lines = script("fine_tune.py", run, *([images] if own else [])).splitlines()
    num_images = 2 if own else 359
    percent = [re.fullmatch(rf"epoch [123]: ([0-9.]+)% of {num_images} images", line) for line in lines]
    assert len(percent) == 3
    assert all(percent)
    if not own:  # ten classes, of which chance would find a tenth
        assert percent[-1] is not None
        assert float(percent[-1][1]) > 15


def test_export(run: Path, tmp_path: Path, script: Script):
    lines = script("export.py", run, tmp_path / "out", "safetensors", "timm").splitlines()
    assert lines[0] == f"safetensors: {tmp_path / 'out' / 'safetensors'}, features equal within 0e+00"
    assert lines[1].startswith("timm: timm has no resnet18 with a small stem, so it cannot load this encoder: use --to")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names == {"safetensors", "model.safetensors", "sslx.json", "README.md"}


@pytest.mark.parametrize(("name", "folder"), [("uniformity.py", "methods"), ("zip_images.py", "data")])
def test_a_method_and_a_source_are_those_of_the_readmes(name: str, folder: str):
    """Which tests/test_own_files.py trains with."""
    readme = (EXAMPLES.parents[1] / "sslx" / folder / "README.md").read_text()
    assert f"```python\n{(EXAMPLES / name).read_text()}```" in readme


def test_every_example_is_run():
    text = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text] == []
