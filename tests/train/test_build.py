"""What a run is built of: the same schedule at any world size, and what a method cannot train on refused at once."""

import sys
from pathlib import Path

import pytest
import torch

from kit.sources import noise
from sslx import encoders
from sslx.config import load
from sslx.distributed import Ranks
from sslx.errors import ConfigError
from sslx.train.build import build, check_tools, compilation, compiles, online_probe, precision

CPU = torch.device("cpu")
ALONE = Ranks(device=CPU)
SMALL = ["--data.size", "16", "--encoder.layers", *"1111", "--encoder.channels", "8", "8", "8", "16"]


def silent(_: str) -> None:
    pass


def test_steps_and_learning_rates_are_functions_of_the_global_batch():
    """solo-learn #262: a schedule that counts the steps of a rank is another one on several."""
    config = load(["simclr_digits", *SMALL, "--batch-size", "96"])
    made = [build(config, Ranks(device=CPU, world_size=size), silent) for size in (1, 2, 3)]
    steps = len(made[0].source) // 96
    assert {(parts.plan.schedule.peak_lr, parts.plan.steps_per_epoch) for parts in made} == {
        (config.optim.lr * 96 / 256, steps)
    }
    assert {parts.plan.total_steps for parts in made} == {steps * config.epochs}


@pytest.mark.parametrize("folder", [".", "photos"])  # one subfolder is no class
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method.name", "supcon"], "supcon needs a source with labels"),
        (["--method.name", "siamese", "--method.pairs", "labels"], "take views"),
        (["--batch-size", "1"], "2 samples or more, got a batch of 1"),
        (["--batch-size", "4", "--num-micro-batches", "4"], "2 samples or more, got a batch of 1"),
    ],
)
def test_what_a_method_cannot_train_on_is_refused_before_anything_is_read(
    flags: list[str], words: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoders, "build", lambda *_: pytest.fail("an encoder was built"))
    noise(tmp_path / folder, 300)
    config = load([*SMALL, "--source.root", str(tmp_path), *flags])
    with pytest.raises(ConfigError, match=words) as error:
        build(config, ALONE, silent)
    assert "\n" not in str(error.value)


def test_the_side_of_the_views_is_said_where_nobody_has_set_it(tmp_path: Path):
    small = [flag for flag in SMALL if flag not in ("--data.size", "16")] + ["--encoder.channels", "8", "8", "8", "16"]
    flags = ["--source.root", str(noise(tmp_path, 8, 64)), *small, "--device", "cpu"]
    for more, expected in (([], 1), (["--data.size", "32"], 0)):
        lines = list[str]()
        build(load([*flags, *more]), ALONE, lines.append)
        assert sum("views of 64 px, because most images are no larger" in line for line in lines) == expected, lines


def test_images_that_fill_no_batch_are_refused_before_an_encoder_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoders, "build", lambda *_, **__: pytest.fail("an encoder was built"))
    too_few = "the source has 1 image, too few to train on: a batch of this run needs 2 or more"
    for number, words in ((6, "batch size 16 is more than the 6 images"), (1, too_few)):
        root = noise(tmp_path / str(number), number, 32)
        with pytest.raises(ConfigError, match=words):
            build(load(["--source.root", str(root), *SMALL, "--batch-size", "16"]), ALONE, silent)


@pytest.mark.parametrize(("num_classes", "probed"), [(12, False), (2, True)])
def test_classes_of_one_image_are_not_probed(num_classes: int, probed: bool, tmp_path: Path):
    for label in range(num_classes):
        noise(tmp_path / str(label), 12 // num_classes, 32)
    config = load(["--source.root", str(tmp_path), *SMALL])
    assert (online_probe(config, ALONE, build(config, ALONE, silent), silent) is not None) == probed


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_is_taken_where_it_is_fast_and_refused_where_it_is_wrong(
    bf16: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sslx.train.build._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("sslx.train.build._is_avx512_bf16_supported", lambda: bf16)
    half = (torch.float32, torch.bfloat16)
    assert precision(load(["simclr_digits"]), CPU) == (half if amx else (torch.float32, None))
    asked = load(["simclr_digits", "--precision", "bf16"])
    if bf16 and not amx:
        with pytest.raises(ConfigError, match="without AMX is slower than fp32"):
            precision(asked, CPU)
    else:
        assert precision(asked, CPU) == half
    assert precision(load(["simclr_digits", "--precision", "fp32"]), CPU) == (torch.float32, None)


def test_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load(["simclr_digits", *SMALL, "--compile", "on"])
    with pytest.raises(ConfigError, match="or use --compile off"):
        build(config, ALONE, silent)


def test_a_gpu_machine_without_a_compiler_goes_on_uncompiled_and_says_so(monkeypatch: pytest.MonkeyPatch):
    """Triton builds its launcher with a C compiler, also where all else comes from wheels."""
    auto, on, off = (load(["simclr_digits", "--compile", choice]) for choice in ("auto", "on", "off"))
    cuda = torch.device("cuda")
    monkeypatch.setenv("CC", sys.executable)  # any program that there is
    monkeypatch.setattr("sslx_kernels.toolchain.Path.exists", lambda _: True)
    assert (compiles(auto, cuda), compiles(on, cuda), compiles(off, cuda), compiles(auto, CPU)) == (1, 1, 0, 0)
    assert compilation(auto, cuda) == ["compiles in the first step"]
    check_tools(on, cuda)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert (compiles(auto, cuda), compiles(off, cuda)) == (False, False)
    for config in (auto, off):
        check_tools(config, cuda)
        without = "without a C compiler nothing is compiled and no loss is fused, which is slower"
        assert compilation(config, cuda) == [f"{without}: apt install gcc python3-dev"]
    with pytest.raises(ConfigError, match=r"^--compile on needs a C compiler: apt install gcc python3-dev, or use "):
        check_tools(on, cuda)
    monkeypatch.setattr("sslx_kernels.toolchain.Path.exists", lambda _: False)
    with pytest.raises(ConfigError, match=r"needs a C compiler and Python's headers \(Python\.h\): apt install"):
        check_tools(on, cuda)
