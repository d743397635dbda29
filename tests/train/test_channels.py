"""Runs on images of five channels of 16 bits, and of one: restarts, ranks, and all that follows a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import sslx
from kit.checkpoints import equal
from kit.errors import raises_one_line
from kit.full_batch import RunOnRanks
from kit.runs import Run
from sslx import cli, encoders, rng, trained
from sslx.config import load
from sslx.data import statistics
from sslx.data.facts import Channels
from sslx.data.sources import arrays, build
from sslx.distributed import Ranks
from sslx.encoders import state_dicts
from sslx.errors import ConfigError
from sslx.export import exporter
from sslx.runs import checkpoint
from sslx.train import verify

ANY = ["--augment.saturation", "0", "--augment.hue", "0", "--augment.gray", "0", "--data.size", "16"]
FP64 = (
    "--method.name simclr --precision fp64 --optim.name sgd --optim.lr 0.1 --batch-norm sync --batch-size 16 "
    "--augment.min-scale 0.3 --compile off --device cpu"
).split()
KINDS = pytest.mark.parametrize(
    ("num", "backend"), [(5, "resident"), pytest.param(1, "torchvision", marks=pytest.mark.slow)]
)


def images(folder: Path, num: int, number: int = 40) -> Path:
    """12-bit images with labels, of so many channels of different mean."""
    random = np.random.default_rng()
    labels = np.arange(number) % 2
    level = 400 * (1 + np.arange(num)) + 300 * labels[:, None, None, None]
    pixels = random.integers(0, 1200, (number, 20, 24, num)) + level
    pixels.flat[0] = 4095
    file = folder / "x.npz"
    np.savez(file, images=pixels.astype(np.uint16), labels=labels)
    return file


def flags_of(file: Path, num: int, backend: str) -> list[str]:
    flags = ["--source.name", "arrays", "--source.root", str(file), "--data.backend", backend, "--data.threads", "0"]
    return [*flags, "--data.channels", str(num), *ANY]


def stored(file: Path) -> npt.NDArray[np.uint16]:
    return np.load(file)["images"]


@KINDS
def test_a_run_goes_on_exactly_and_embeds_as_it_was_trained(
    here: Run, tmp_path: Path, num: int, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = images(tmp_path, num)
    flags = [*flags_of(file, num, backend), "--checkpoint.every", "1", "--steps", "3"]
    assert here(*flags)[0] == 0
    assert "normalized by the mean and standard deviation of 40 images (--data.mean 0." in here.out
    whole, last = checkpoint.load(tmp_path / "r"), tmp_path / "r" / "checkpoints" / "step_3"
    shutil.rmtree(last)  # as if it had been killed
    assert here(*flags, "--resume", "auto")[0] == 0
    again = checkpoint.load(tmp_path / "r")
    assert equal(whole["method"], again["method"])
    assert equal(whole["optimizer"], again["optimizer"])

    run = sslx.load(tmp_path / "r")
    assert run.encoder.recipe.channels == num
    assert run.view.channels == Channels(num=num, is_rgb=False, dtype="uint16", full_scale=4095)
    source = build(arrays.Config(root=file), "pretrain", trained.Trained.reading(run, config_of(run)))
    found = statistics.normalization(source, config_of(run))
    assert (run.view.mean, run.view.std) == (found.mean, found.std)
    vectors = run.embed(source)
    pixels = stored(file)
    torch.testing.assert_close(run.embed(list(pixels)), vectors, rtol=1e-5, atol=1e-6)
    chw = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]
    assert torch.equal(run.embed(chw), run.embed(list(pixels)))
    x = torch.from_numpy(pixels.astype(np.float64) / 4095)[:, :, 2:22].permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(numbers).double()[:, None, None] for numbers in (run.view.mean, run.view.std))
    with torch.no_grad():
        want = run.encoder(((x - mean) / std).float())
    torch.testing.assert_close(vectors, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.transform(pixels[3])[None], ((x[3:4] - mean) / std).float(), rtol=1e-5, atol=1e-5)

    capfd.readouterr()
    assert cli.main(["embed", str(run.folder), "-o", str(tmp_path / "out.npy"), "--device", "cpu"]) == 0
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), vectors, rtol=1e-4, atol=1e-5)


def config_of(run: trained.Trained) -> Any:
    return run.settings.data


@pytest.mark.slow
def test_ranks_train_as_one_with_five_channels(ranks: RunOnRanks, tmp_path: Path) -> None:
    flags = [*verify.ENCODERS["resnet"], *flags_of(images(tmp_path, 5), 5, "torchvision"), *FP64]
    one, two = (ranks(world_size, steps, flags)[0] for world_size in (1, 2))
    for part in ("loss", "gradients", "parameters"):
        assert verify.worst(two[part], one[part], 1e-3)[0] < 1e-9, part


def steps(flags: list[str]) -> verify.State:
    from sslx import distributed

    torch.set_num_threads(1)
    torch._C._set_mkldnn_enabled(False)
    here = Ranks(device=torch.device("cpu"), rank=distributed.rank(), world_size=distributed.world_size())
    settings = load(flags)
    return verify.train(replace(settings, method=verify.narrow(settings.method)), here, 2)


@pytest.mark.slow
def test_commands_after_a_run_take_such_images(here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = images(tmp_path, 5)
    flags = [*flags_of(file, 5, "resident"), "--encoder.stem", "imagenet"]
    assert here(*flags)[0] == 0
    run = str(tmp_path / "r")
    for argv in (
        ["probe", run, "--device", "cpu", "--probe.shots", "1", "--no-baselines"],
        ["look", *flags, "-o", str(tmp_path / "look.png"), "--device", "cpu"],
        ["export", run, "--to", "timm", "-o", str(tmp_path / "timm")],
        ["export", run, "--to", "safetensors", "-o", str(tmp_path / "safetensors")],
    ):
        capfd.readouterr()
        assert cli.main(argv) == 0, capfd.readouterr().err
    assert (tmp_path / "look.png").stat().st_size > 1000
    pixels = list(stored(file)[:6])
    before, after = sslx.load(run), sslx.load(tmp_path / "timm")
    torch.testing.assert_close(after.embed(pixels), before.embed(pixels), rtol=1e-4, atol=1e-5)
    card = (tmp_path / "timm" / "README.md").read_text()
    code = card.split("```python\n")[2].split("```")[0]
    space: dict[str, Any] = {"array": pixels[2]}
    exec(code, space)
    torch.testing.assert_close(space["images"], before.transform(pixels[2])[None], rtol=1e-5, atol=1e-5)
    with raises_one_line(ConfigError, "5 channels of 16 bits", "--to timm"):
        exporter.export(before, "hf", tmp_path / "hf")


@pytest.mark.slow
def test_the_pictures_of_a_run_on_five_channels(here: Run, tmp_path: Path) -> None:
    assert here(*flags_of(images(tmp_path, 5), 5, "resident"))[0] == 0
    assert cli.main(["plot", str(tmp_path / "r"), "--device", "cpu"]) == 0
    for name in ("views", "neighbors", "tsne"):
        assert (tmp_path / "r" / f"{name}.png").stat().st_size > 1000


def test_color_operations_are_refused_before_an_encoder_is_built(here: Run, tmp_path: Path) -> None:
    code, err = here(*flags_of(images(tmp_path, 5), 5, "resident"), "--augment.hue", "0.1", "--augment.gray", "0.2")
    assert code == 64
    assert len(err.splitlines()) == 1
    assert "add --augment.hue 0 --augment.gray 0" in err


def test_stats_are_flags_for_a_run(here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, output = images(tmp_path, 5), tmp_path / "stats.json"
    argv = ["data", "stats", str(file), "--source.name", "arrays", "--data.channels", "5", "-o", str(output)]
    capfd.readouterr()
    assert cli.main(argv) == 0
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("--data.mean"))
    facts = json.loads(output.read_text())
    scaled = stored(file).astype(np.float64) / 4095
    np.testing.assert_allclose(facts["mean"], scaled.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(facts["std"], scaled.std((0, 1, 2)), rtol=1e-9)
    known = {name: facts[name] for name in ("num_images", "channels", "dtype", "range", "width")}
    width = {"min": 24, "median": 24, "max": 24}
    assert known == {"num_images": 40, "channels": 5, "dtype": "uint16", "range": [0, 4095], "width": width}
    assert here(*flags_of(file, 5, "resident"), *line.split(), "--steps", "1")[0] == 0
    assert sslx.load(tmp_path / "r").view.mean == tuple(float(f"{x:.4g}") for x in facts["mean"])
    code, err = here(*flags_of(file, 5, "resident"), "--data.mean", "0.1", "--data.std", "0.2", "--name", "other")
    assert code == 64
    assert "has 5 channels, and --data.mean and --data.std give 1 numbers" in err


@pytest.mark.parametrize("num", [1, 5])
def test_weights_for_rgb_are_adapted_as_timm_does(tmp_path: Path, num: int) -> None:
    import timm

    trunk = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    rng.seed_torch(int(np.random.default_rng().integers(1 << 30)))
    rgb = encoders.build(encoders.Config(**trunk, stem="imagenet"), 32)
    torch.save(rgb.trunk.state_dict(), tmp_path / "rgb.pt")
    said = list[str]()
    settings = encoders.Config(**trunk, stem="imagenet", weights=str(tmp_path / "rgb.pt"))
    encoder = encoders.build(settings, 32, channels=num, say=said.append)
    assert f"adapted from 3 to {num} input channels" in said[0]
    want = timm.models.adapt_input_conv(num, rgb.trunk.state_dict()["conv1.weight"])
    assert torch.equal(encoder.trunk.state_dict()["conv1.weight"], want)
    other = {k: v for k, v in encoder.trunk.state_dict().items() if k != "conv1.weight"}
    assert all(torch.equal(value, rgb.trunk.state_dict()[name]) for name, value in other.items())
    torch.save(encoder.trunk.state_dict(), tmp_path / "same.pt")
    again = encoders.build(replace(settings, weights=str(tmp_path / "same.pt")), 32, channels=num)
    state_dicts.load(again, encoder.state_dict(), "itself")
    assert equal(dict(again.state_dict()), dict(encoder.state_dict()))


class Items:
    """A Dataset of arrays of five channels."""

    def __init__(self, pixels: npt.NDArray[np.uint16]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> dict[str, object]:
        picture = self.pixels[row]
        return {"image": torch.from_numpy(picture).permute(2, 0, 1) if row % 2 else picture}


@pytest.mark.slow
def test_a_dataset_of_arrays_of_five_channels(tmp_path: Path) -> None:
    pixels = np.random.default_rng().integers(0, 60_000, (24, 18, 18, 5)).astype(np.uint16)
    run = sslx.pretrain(
        dataset=Items(pixels),
        name="r",
        runs=str(tmp_path),
        steps=2,
        batch_size=8,
        device="cpu",
        precision="fp32",
        **{"online.every": 0, "data.size": 16, "data.threads": 0, "log.every": 1},
        encoder={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
        method={"hidden-dim": 16, "projection-dim": 8},
        augment={"saturation": 0.0, "hue": 0.0, "gray": 0.0},
    )
    assert run.view.channels == Channels(num=5, is_rgb=False, dtype="uint16", full_scale=65535)
    torch.testing.assert_close(run.embed(Items(pixels)), run.embed(list(pixels)))
