"""``sslx bench``: the arms do what they are named after, the limit is named, and what may help is tried."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslx import config
from sslx.bench import advice, measure
from sslx.data import sources
from sslx.data.sources import Pixels
from sslx.distributed import Ranks, init
from sslx.train import resuming

TINY = (
    "--source.name synthetic --source.num-samples 64 --data.size 16 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --device cpu --precision fp32 --compile off"
).split()
FOUND = {"end to end": 90.0, "step alone": 100.0, "loader alone": 400.0, "augmentation alone": 500.0}


@pytest.fixture
def ranks() -> Ranks:
    return init("cpu")


def test_the_arms_run_and_leave_the_weights_alone(ranks: Ranks) -> None:
    recipe = advice.Recipe(config.load(TINY), ranks, window_s=0.05)
    before = [p.clone() for p in recipe.parts.method.parameters()]
    found = measure.take_turns(recipe.arms(), 2)
    assert tuple(found) == advice.ARMS
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())
    assert all(map(torch.equal, before, recipe.parts.method.parameters()))
    assert 0 <= recipe.data_wait(2) <= 1
    assert recipe.views == 2
    assert recipe.flops() > 1e6
    recipe.close()


def test_what_was_prefetched_is_used_up_but_a_slow_loader_not_waited_for(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """640 samples/s in batches of 256 on 16 cores: 34 batches before every window were 14 s."""
    recipe = advice.Recipe(config.load([*TINY, "--data.threads", "16"]), ranks, window_s=0.05)
    clock, taken = 0.0, 0
    monkeypatch.setattr("time.perf_counter", lambda: clock)

    def loader(batch_s: float) -> Iterator[int]:
        nonlocal clock, taken
        taken = 0
        while True:
            clock += batch_s
            taken += 1
            yield taken

    for batch_s, number in ((0.001, 34), (0.4, 7), (9.0, 2)):
        recipe._drain(loader(batch_s))  # pyright: ignore[reportPrivateUsage, reportArgumentType]
        assert taken == number
    recipe.close()


def test_flops_of_a_step_by_hand(ranks: Ranks) -> None:
    settings = config.load([*TINY, "--method.hidden-dim", "32"])
    wide, narrow = (advice.Recipe(s, ranks) for s in (settings, config.load(TINY)))
    rows, features, out = 2 * 16, 8, 8  # both views; of a two-layer head only the hidden width differs
    expected = 3 * 2 * rows * (32 - 16) * (features + out)  # forward, and two products backward
    assert wide.flops() - narrow.flops() == expected


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_decoded_images_of_many_sizes_go_through_the_loader(tmp_path: Path, ranks: Ranks, backend: str) -> None:
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (20 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    flags = [*TINY, "--source.name", "folder", "--source.root", str(tmp_path), "--data.backend", backend]
    settings = config.load([*flags, "--data.threads", "0" if backend == "torchvision" else "1"])
    source = sources.build(settings.source, "pretrain")
    held = advice.decoded(source, 32)
    assert len(held) == 32
    assert isinstance(held, Pixels)
    assert np.array_equal(held.pixels[0], np.asarray(Image.open(tmp_path / "00.png")))
    assert held.pixels[21] is held.pixels[1]
    recipe = advice.Recipe(settings, ranks, window_s=0.02)
    assert recipe.arms()["augmentation alone"]() > 0


def test_the_limit_is_the_slower_part_or_both() -> None:
    assert advice.limit(FOUND).startswith("the training step. Data loading does not slow it down: a run reaches 90 %")
    assert advice.limit(FOUND | {"loader alone": 91.0}).startswith("the loader. The training step waits for it: a run")
    assert "compete for the same cores" in advice.limit(FOUND | {"end to end": 60.0})


def test_what_is_tried_depends_on_the_limit(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    settings = config.load([*TINY, "--data.threads", "2", "--data.backend", "torchvision"])
    gpu = dataclasses.replace(ranks, device=torch.device("cuda"))
    starving = {**FOUND, "loader alone": 50.0}
    assert list(advice.candidates(settings, ranks, starving, small=True)) == [
        "--data.backend resident",
        "--data.threads 4",
        "--data.backend auto",
    ]
    monkeypatch.setattr("sslx.train.build._is_amx_tile_supported", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    tried = ["--data.backend resident", "--data.threads 1"]
    assert list(advice.candidates(settings, ranks, FOUND, small=True)) == tried
    monkeypatch.setenv("CXX", f"{sys.executable} --flag")  # any program that there is
    tried.append("--compile on")
    assert list(advice.candidates(settings, ranks, FOUND, small=True)) == tried
    monkeypatch.setattr("sslx.train.build._is_amx_tile_supported", lambda: True)
    tried.insert(2, "--precision bf16")
    assert list(advice.candidates(settings, ranks, FOUND, small=True)) == tried
    assert list(advice.candidates(settings, ranks, FOUND, small=False)) == tried[1:]
    fast = ["--precision bf16", "--compile on", "--batch-size 32"]
    assert list(advice.candidates(settings, gpu, FOUND, small=True)) == fast
    tried = advice.candidates(settings, gpu, FOUND, small=True)["--batch-size 32"]
    assert resuming.differences(tried, settings) == ["--batch-size 16 -> 32"]


@pytest.mark.slow
def test_the_command_says_what_limits_a_recipe_and_what_to_take() -> None:
    command = [sys.executable, "-m", "sslx", "bench", *TINY]
    here = os.environ | {"CXX": "none"}  # compiling takes a minute, and is tested with the training
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False, env=here)
    assert done.returncode == 0, done.stderr
    assert "end to end" in done.stdout
    assert "bottleneck: " in done.stdout
    assert "keep the settings" in done.stdout or "take --" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("tried ")]) >= 1
