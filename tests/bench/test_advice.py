"""``sslx bench``: the arms do what they are named after, the limit is named, and what may help is tried."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.processes import TINY as RUN
from kit.python import python
from sslx import config
from sslx.bench import advice, measure
from sslx.data import sources
from sslx.data.sources import Pixels
from sslx.distributed import Ranks, init
from sslx.train import resuming

TINY = [*RUN[: RUN.index("--steps")], *"--data.backend auto --device cpu --precision fp32 --compile off".split()]
RATES = {"end to end": 90.0, "step alone": 100.0, "loader alone": 400.0, "augmentation alone": 500.0}


@pytest.fixture
def ranks() -> Ranks:
    return init("cpu")


@pytest.mark.soak
def test_the_arms_run_and_leave_the_weights_alone(ranks: Ranks) -> None:
    workload = advice.Workload(config.load(TINY), ranks, window_s=0.05)
    before = [p.clone() for p in workload.parts.method.parameters()]
    figures = measure.take_turns(workload.arms(), 2)
    assert tuple(figures) == advice.ARMS
    assert all(len(values) == 2 and min(values) > 0 for values in figures.values())
    assert all(map(torch.equal, before, workload.parts.method.parameters()))
    assert 0 <= workload.data_wait(2) <= 1
    assert workload.num_views == 2
    assert workload.flops() > 1e6
    workload.close()


def test_what_was_prefetched_is_used_up_but_a_slow_loader_not_waited_for(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """640 samples/s in batches of 256 on 16 cores: 34 batches before every window were 14 s."""
    workload = advice.Workload(config.load([*TINY, "--data.threads", "16"]), ranks, window_s=0.05)
    clock, num_taken = 0.0, 0
    monkeypatch.setattr("time.perf_counter", lambda: clock)

    def loader(batch_s: float) -> Iterator[int]:
        nonlocal clock, num_taken
        num_taken = 0
        while True:
            clock += batch_s
            num_taken += 1
            yield num_taken

    for batch_s, number in ((0.001, 34), (0.4, 7), (9.0, 2)):
        workload._drain(loader(batch_s))  # pyright: ignore[reportPrivateUsage, reportArgumentType]
        assert num_taken == number
    workload.close()


def test_flops_of_a_step_by_hand(ranks: Ranks) -> None:
    settings = config.load([*TINY, "--method.hidden-dim", "32"])
    wide, narrow = (advice.Workload(s, ranks) for s in (settings, config.load(TINY)))
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
    workload = advice.Workload(settings, ranks, window_s=0.02)
    assert workload.arms()["augmentation alone"]() > 0


def test_the_limit_is_the_slower_part_or_both() -> None:
    assert advice.limit(RATES).startswith("the training step. Data loading does not slow it down: a run reaches 90 %")
    assert advice.limit(RATES | {"loader alone": 91.0}).startswith("the loader. The training step waits for it: a run")
    assert "compete for the same cores" in advice.limit(RATES | {"end to end": 60.0})


def test_what_is_tried_depends_on_the_limit(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    settings = config.load([*TINY, "--data.threads", "2", "--data.backend", "torchvision"])
    gpu = dataclasses.replace(ranks, device=torch.device("cuda"))
    starving = {**RATES, "loader alone": 50.0}
    trials = ["--data.backend resident", "--data.threads 4", "--data.backend auto"]
    assert list(advice.candidates(settings, ranks, starving, small=True)) == trials
    trials = ["--data.backend resident", "--data.threads 1"]
    compiler = f"{sys.executable} --flag"  # any program that there is
    for has_amx, cxx, more in (
        (False, "no-such-compiler", []),
        (False, compiler, ["--compile on"]),
        (True, compiler, ["--precision bf16", "--compile on"]),
    ):
        monkeypatch.setattr("sslx.train.build._is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        monkeypatch.setenv("CXX", cxx)
        assert list(advice.candidates(settings, ranks, RATES, small=True)) == [*trials, *more]
    assert list(advice.candidates(settings, ranks, RATES, small=False)) == [trials[1], *more]
    fast = ["--precision bf16", "--compile on", "--batch-size 32"]
    assert list(advice.candidates(settings, gpu, RATES, small=True)) == fast
    trials = advice.candidates(settings, gpu, RATES, small=True)["--batch-size 32"]
    assert resuming.differences(trials, settings) == ["--batch-size 16 -> 32"]


@pytest.mark.slow
def test_the_command_says_what_limits_a_recipe_and_what_to_take() -> None:
    # compiling takes a minute, and is tested with the training
    short = "from sslx.bench import advice; advice.Workload.__init__.__defaults__ = (0.2,)"
    code = f"{short}; import sys; from sslx import cli; sys.exit(cli.main(['bench', *sys.argv[1:]]))"
    out = python("-c", code, *TINY, CXX="none").stdout
    assert "end to end" in out
    assert "bottleneck: " in out
    assert "keep the settings" in out or "take --" in out
    assert "\ntried " in out
