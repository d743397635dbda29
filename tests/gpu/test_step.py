"""On a GPU: a step waits for nothing, views are those of the CPU, and ``--deterministic`` repeats the last bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.processes import TINY
from kit.sources import in_memory
from sslx import config, distributed, methods
from sslx.data.backends.resident import Resident
from sslx.data.order import Sequential
from sslx.data.planner import Planner
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks
from sslx.runs import checkpoint, log
from sslx.train import finite
from sslx.train.build import build
from sslx.train.step import cached_step, train_step
from sslx.train.verify import ENCODERS

pytestmark = [pytest.mark.gpu]
CASES = [(name, encoder) for name in methods.available() for encoder in methods.encoders(name)]
SMALL = [
    "--source.name", "digits", "--data.size", "32", "--batch-size", "32", "--online.every", "0",
    "--data.backend", "resident",
]  # fmt: skip


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU; whatever a test sets of torch is as it was afterwards."""
    yield torch.device("cuda", 0)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def steps_without_a_wait(settings: config.PretrainConfig, device: torch.device, number: int) -> list[float]:
    """Losses of so many steps, of which all but the first two must not make the host wait for the GPU."""
    parts = build(settings, Ranks(device=device), lambda _: None)
    replace(parts.plan.schedule, peak_lr=0.01, warmup=0.0).apply(parts.optimizer, 0.0)
    meter, losses = log.Meter(), list[torch.Tensor]()
    step = cached_step if settings.num_grad_cache_chunks > 1 else train_step
    batches = [next(parts.loader) for _ in range(settings.batches_per_step)]
    for done in range(number):
        if done == 2 and device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        metrics = step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast, settings.optim.clip)
        meter.add(finite.counted(metrics))
        losses.append(metrics["loss"])
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    parts.loader.close()
    return torch.stack(losses).tolist()


@pytest.mark.parametrize(("name", "encoder"), CASES)
def test_no_method_waits_for_the_gpu_in_a_step(name: str, encoder: str, device: torch.device) -> None:
    settings = config.load([*SMALL, "--method.name", name, *ENCODERS[encoder], "--compile", "off"])
    losses = steps_without_a_wait(settings, device, 4)
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [
        ["simclr_cifar10", "--compile", "on"],
        ["simclr_cifar10", "--compile", "off", "--num-grad-cache-chunks", "2"],
        ["simclr_cifar10", "--compile", "on", "--batch-norm", "sync", "--optim.name", "lars"],
    ],
)
def test_nor_does_it_compiled_cached_or_with_sync_batch_norm(flags: list[str], device: torch.device) -> None:
    losses = steps_without_a_wait(config.load([*flags, *SMALL, *ENCODERS["resnet"]]), device, 5)
    assert all(0 < loss < 20 for loss in losses)


def test_a_planted_wait_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    counted = finite.counted
    monkeypatch.setattr(finite, "counted", lambda metrics: [float(metrics["loss"]), counted(metrics)][1])
    settings = config.load([*SMALL, *ENCODERS["resnet"], "--compile", "off"])
    with pytest.raises(RuntimeError, match="synchroniz"):
        steps_without_a_wait(settings, device, 3)


def test_the_loader_of_images_in_memory_waits_for_nothing(device: torch.device) -> None:
    settings = config.load(["simclr_cifar10", *SMALL, *ENCODERS["resnet"], "--compile", "off"])
    loader = build(settings, Ranks(device=device), lambda _: None).loader
    for _ in range(3):
        next(loader)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        assert next(loader).views[0].device.type == device.type
    loader.close()


@pytest.mark.parametrize("size", [32, 48])
def test_views_are_those_of_the_cpu(size: int, device: torch.device, generator: torch.Generator) -> None:
    """All operations at once; hue turns where rounding decides, so it is left out."""
    pixels = torch.randint(0, 256, (16, 40, 40, 3), generator=generator, dtype=torch.uint8).numpy()
    source = in_memory(pixels, size=40)
    recipe = Augment(jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.0, gray=0.3, blur=0.5)
    spec = ViewSpec(size=size, augment=recipe)
    views: list[torch.Tensor] = []
    for place in (torch.device("cpu"), device):
        backend = Resident(source, [spec], device=place, num_threads=1)
        planner = Planner(order=Sequential(num_samples=16, per_rank=16), specs=[spec], seed=1)
        (view,) = next(backend.stream(planner, 0)).views
        views.append(view.float().cpu())
    assert (views[0] - views[1]).abs().max() < 2e-2  # a level is 1 / 255 / 0.225 = 0.017


def run(folder: Path, device: torch.device, *flags: str) -> dict[str, Any]:
    """The last checkpoint of a run in a process of its own."""
    argv = [sys.executable, "-m", "sslx", "pretrain", *TINY, "--runs", str(folder), "--name", "r", "--resume", "auto"]
    argv += ["--device", device.type, "--precision", "auto", "--source.name", "digits", "--data.backend", "resident"]
    done = subprocess.run([*argv, *flags], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 75), done.stderr
    steps = sorted((folder / "r" / "checkpoints").glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    return checkpoint.load(steps[-1])


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_deterministic_run_repeats_and_resumes_to_the_last_bit(
    tmp_path: Path, device: torch.device, compiled: str
) -> None:
    """Twice from the start, and once more from the checkpoint of the middle."""
    flags = ["--deterministic", "--compile", compiled, "--steps", "30", "--checkpoint.every", "15"]
    flags += ["--checkpoint.keep", "3"]
    first, again = (run(tmp_path / name, device, *flags) for name in ("a", "b"))
    assert first["step"] == 30
    assert all(torch.equal(first["method"][name], again["method"][name]) for name in first["method"])
    folder = tmp_path / "b" / "r"
    shutil.rmtree(folder / "checkpoints" / "step_30")
    resumed = run(tmp_path / "b", device, *flags)
    assert all(torch.equal(first["method"][name], resumed["method"][name]) for name in first["method"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_train_like_one() -> None:
    argv = [sys.executable, "-m", "sslx", "verify", "simclr", "byol", "--ranks", "2", "--device", "cuda"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ranks_take_the_gpu_that_is_theirs() -> None:
    ranks = distributed.init("cuda")
    assert ranks.device == torch.device("cuda", 0)
