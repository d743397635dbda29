"""Looks at the features during a run: no effect on it or its throughput, and a collapse that is told or ends it."""

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kit.processes import TINY, is_one_line, metrics, outside
from sslx import cli
from sslx.monitor.health import Health
from sslx.runs import checkpoint, records

Run = Callable[..., tuple[int, str]]
NAMES = {"feature_rank", "feature_std", "feature_alignment", "feature_uniformity"}
SIMSIAM = (
    "simsiam_digits --data.size 8 --data.threads 1 --encoder.layers 1 1 1 1 --encoder.channels 8 8 16 16 "
    "--method.hidden-dim 32 --method.projection-dim 32 --method.bottleneck-dim 8 --batch-size 64 --steps 60 "
    "--optim.lr 0.4 --online.every 0 --health.every 60 --device cpu --precision fp32"
).split()


def simsiam(folder: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a short run in this process."""
    capfd.readouterr()
    code = cli.main(["pretrain", *SIMSIAM, "--runs", str(folder), "--name", "r", *flags])
    return code, *capfd.readouterr()


def test_a_run_that_is_looked_at_ends_in_the_same_weights(here: Run, tmp_path: Path):
    for name, every in (("off", "0"), ("on", "1")):
        assert here("--steps", "4", "--name", name, "--health.every", every) == (0, "")
    off, on = (checkpoint.load(tmp_path / name) for name in ("off", "on"))
    assert any("running_mean" in name for name in off["method"])
    for part in ("method", "optimizer"):
        torch.testing.assert_close(on[part], off[part], rtol=0, atol=0)
    assert on["loader"] == off["loader"]
    off, on = (metrics(tmp_path / name) for name in ("off", "on"))
    assert [line["loss"] for line in on] == [line["loss"] for line in off]
    assert all(line.keys() >= NAMES for line in on)
    assert not any(line.keys() & NAMES for line in off)


def test_looks_are_left_out_of_the_throughput(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def slow(*_: object, **__: object) -> dict[str, float]:
        time.sleep(1)
        return {}

    monkeypatch.setattr(Health, "look", slow)
    assert here("--steps", "3", "--health.every", "1") == (0, "")
    for before, line in pairwise(metrics(tmp_path / "r")):  # a line a step of 16
        assert 16 / line["samples_per_s"] < line["time"] - before["time"] - 0.5


def test_simsiam_does_not_collapse(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    code, out, err = simsiam(tmp_path, capfd, "--health.on-collapse", "stop")
    assert (code, err) == (0, "")
    assert "collapse at" not in out
    assert metrics(tmp_path / "r")[-1].keys() >= NAMES


@pytest.mark.parametrize("seed", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_simsiam_without_stop_gradient_collapses_and_is_told(
    seed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code, out, err = simsiam(tmp_path, capfd, "--method.no-stop-gradient", "--seed", seed)
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if "collapse at" in line)
    assert line.startswith("collapse at step 60, at the first look: std 0.")
    assert "stop-gradient" in line


def test_a_collapse_stops_the_run_where_asked_for(here: Run, tmp_path: Path):
    """Of the run's own files the last checkpoint from before is left, and status.json says why it ended."""
    stop = ["--method.name", "simsiam", "--method.bottleneck-dim", "4", "--batch-norm", "group", "--optim.lr", "0.3"]
    stop += ["--steps", "30", "--optim.warmup", "0", "--health.every", "20", "--health.on-collapse", "stop"]
    code, err = here(*stop, "--checkpoint.every", "10")
    assert code == 77
    is_one_line(err, "collapse at step 20", "is below 0.5", "the last checkpoint, step 10, is perhaps from after")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("failed", 20)
    assert "collapse at step 20" in status.reason
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_10"]
    code, _ = here(*stop, "--checkpoint.every", "10", "--resume", "auto", "--health.on-collapse", "warn")
    assert code == 0  # how to look may differ when resumed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_whose_weights_are_useless_is_told_so_at_its_end(
    optimizer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """At a learning rate at which nothing is infinite, and before the first look that would be due."""
    flags = [*TINY, "--steps", "40", "--runs", str(tmp_path), "--optim.name", optimizer, "--optim.weight-decay", "1e-6"]
    flags += ["--method.temperature", "0.1"]
    for name, lr, told in (("wild", "1e6", True), ("calm", "0.01", False)):
        capfd.readouterr()
        assert cli.main(["pretrain", *flags, "--name", name, "--optim.lr", lr]) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if "useless" in line]
        assert len(lines) == told
        assert all(line.startswith("this run's weights are useless at its end, step 40: ") for line in lines)
        assert metrics(tmp_path / name)[-1].keys() >= NAMES


@pytest.mark.slow
def test_two_ranks_look_together(tmp_path: Path):
    code, out, err = outside(tmp_path, "--ranks", "2", "--health.every", "1", "--health.num-samples", "6")
    assert (code, err) == (0, "")
    assert all(line.keys() >= NAMES for line in metrics(tmp_path / "r"))
    assert sum("feature_rank" in line for line in out.splitlines() if line.startswith("step")) == 2
