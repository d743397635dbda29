"""How much memory a step takes is known before it is taken, and said where it is more than there is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kit.full_batch import RunOnRanks
from sslx import distributed, encoders, methods
from sslx.config import load
from sslx.train import build as builds
from sslx.train import step_memory

GIB = 2.0**30
FLAGS = (
    "--source.name synthetic --source.num-samples 384 --data.size 32 --data.backend synthetic --device cpu "
    "--precision fp32 --batch-size 64 --data.threads 0"
).split()

TAKEN = """
import re, sys, torch
from sslx import config, distributed
from sslx.train import step_memory
from sslx.train.build import build
from sslx.train.step import train_step
found = []
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
real = step_memory.step_bytes
step_memory.step_bytes = lambda *given: found.append(real(*given)) or found[-1]
before = peak()
parts = build(config.load(sys.argv[1:]), distributed.init("cpu"), lambda _: None)
batches = [next(parts.loader)]
for _ in range(2):
    train_step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast)
print(found[0], peak() - before)
"""


VIT = "--encoder.name vit_tiny_patch16_224 --encoder.patch 4 --encoder.layers 4 --encoder.channels 64 --batch-size 384"


@pytest.mark.parametrize("flags", [VIT, "--method.name byol"])  # which is on a ResNet-50
@pytest.mark.slow
def test_the_estimate_is_what_a_step_takes(flags: str) -> None:
    argv = [sys.executable, "-c", TAKEN, *FLAGS, *flags.split()]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    estimate, taken = map(float, done.stdout.split())
    taken -= 0.3 * GIB  # timm, DALI and the rest, before the first step
    assert 0.6 * taken < estimate < 1.6 * taken, (estimate / GIB, taken / GIB)


def test_the_method_and_the_random_state_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for estimate in (step_memory.step_bytes, lambda *_: 0.0):
        monkeypatch.setattr(step_memory, "step_bytes", estimate)
        parts = builds.build(load([*FLAGS, "--batch-size", "8"]), distributed.init("cpu"), lambda _: None)
        weights.append({**parts.method.state_dict(), "drawn": torch.rand(4)})
        parts.loader.close()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_too_much_is_said_with_what_to_do() -> None:
    assert step_memory.memory_warning(1 * GIB, 8 * GIB, 64, 2) == []
    (line,) = step_memory.memory_warning(10.1 * GIB, 7.2 * GIB, 256, 1)
    assert line.startswith("memory: a step takes about 10.1 GiB, and 7.2 GiB are free: ")
    assert "--num-grad-cache-chunks 4" in line
    assert "--batch-size 64" in line
    assert "on each of 2 ranks" in step_memory.memory_warning(4 * GIB, 8 * GIB, 64, 2)[0]


def test_what_is_free_is_less_than_the_machine_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    free = step_memory.free_bytes(torch.device("cpu"))
    assert 0 < free < float(total.split()[1]) * 1024


def estimate_alone(batch_norm: str) -> float:
    """On rank 0 only: with norms over all ranks it would wait for the other for ever."""
    if distributed.rank():
        return 0.0
    config = load([*FLAGS, "--encoder.layers", *"1111", "--encoder.channels", *"8888"])
    method = methods.build(config.method, encoders.build(config.encoder, 32, norm=batch_norm))
    specs = config.method.inputs(config.augment, 32).views
    return step_memory.step_bytes(method, specs, 64, "sgd", None)


def test_a_rank_estimates_alone_whatever_the_norm(ranks: RunOnRanks) -> None:
    plain, synced = (ranks(2, estimate_alone, norm)[0] for norm in ("batch", "sync"))
    assert synced == pytest.approx(plain, rel=0.02)
