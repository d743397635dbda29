"""Looks at the features during a run: no effect on it or its throughput, and a collapse that is told or ends it."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from kit.checkpoints import same_training
from kit.processes import is_one_line, metrics, outside
from kit.runs import Run, status_of
from sslx.monitor.health import Health
from sslx.runs import checkpoint

NAMES = {"feature_rank", "feature_std", "feature_alignment", "feature_uniformity"}
SIMSIAM = (
    "--source.name digits --data.backend auto --method.name simsiam --data.size 8 --data.threads 1 "
    "--encoder.channels 8 8 16 16 --method.hidden-dim 32 --method.projection-dim 32 --method.bottleneck-dim 8 "
    "--augment.min-scale 0.5 --augment.flip 0 --augment.jitter 0.8 --augment.brightness 0.4 --augment.contrast 0.4 "
    "--augment.saturation 0 --augment.hue 0 --augment.gray 0 --augment.blur 0 --optim.weight-decay 1e-4 "
    "--batch-size 64 --steps 60 --optim.lr 0.4 --optim.warmup 0.1 --log.every 20 --health.every 60"
).split()


def test_a_run_that_is_looked_at_ends_in_the_same_weights(here: Run, tmp_path: Path):
    for name, every in (("off", "0"), ("on", "1")):
        assert here("--steps", "4", "--name", name, "--health.every", every) == (0, "")
    assert same_training(tmp_path / "on", tmp_path / "off")
    assert any("running_mean" in name for name in checkpoint.load(tmp_path / "off")["method"])
    off, on = (metrics(tmp_path / name) for name in ("off", "on"))
    assert [line["loss"] for line in on] == [line["loss"] for line in off]
    assert all(line.keys() >= NAMES for line in on)
    assert not any(line.keys() & NAMES for line in off)


@pytest.mark.soak
def test_looks_are_left_out_of_the_throughput(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def slow(*_: object, **__: object) -> dict[str, float]:
        time.sleep(1)
        return {}

    monkeypatch.setattr(Health, "look", slow)
    assert here("--steps", "3", "--health.every", "1") == (0, "")
    for before, line in pairwise(metrics(tmp_path / "r")):  # a line a step of 16
        assert 16 / line["samples_per_s"] < line["time"] - before["time"] - 0.5


@pytest.mark.slow
def test_simsiam_does_not_collapse(here: Run, tmp_path: Path):
    assert here(*SIMSIAM, "--health.on-collapse", "stop") == (0, "")
    assert "collapse at" not in here.out
    assert metrics(tmp_path / "r")[-1].keys() >= NAMES


@pytest.mark.soak
@pytest.mark.parametrize("seed", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_simsiam_without_stop_gradient_collapses_and_is_told(seed: str, here: Run):
    assert here(*SIMSIAM, "--method.no-stop-gradient", "--seed", seed) == (0, "")
    (line,) = (line for line in here.out.splitlines() if "collapse at" in line)
    assert line.startswith("collapse at step 60, at the first look: std 0.")
    assert "stop-gradient" in line


def test_a_collapse_stops_the_run_where_asked_for(here: Run, tmp_path: Path):
    """Of the run's own files the last checkpoint from before is left, and status.json says why it ended."""
    stop = ["--method.name", "simsiam", "--method.bottleneck-dim", "4", "--batch-norm", "group", "--optim.lr", "0.3"]
    stop += ["--steps", "30", "--optim.warmup", "0", "--health.every", "20", "--health.on-collapse", "stop"]
    code, err = here(*stop, "--checkpoint.every", "10")
    assert code == 77
    is_one_line(err, "collapse at step 20", "is below 0.5", "the last checkpoint, step 10, is perhaps from after")
    status = status_of(tmp_path)
    assert (status.state, status.step) == ("failed", 20)
    assert "collapse at step 20" in status.reason
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_10"]
    code, _ = here(*stop, "--checkpoint.every", "10", "--resume", "auto", "--health.on-collapse", "warn")
    assert code == 0  # how to look may differ when resumed


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_run_whose_weights_are_useless_is_told_so_at_its_end(optimizer: str, here: Run, tmp_path: Path):
    """At a learning rate at which nothing is infinite, and before the first look that would be due."""
    flags = ["--steps", "40", "--optim.name", optimizer, "--optim.weight-decay", "1e-6", "--method.temperature", "0.1"]
    for name, lr, told in (("wild", "1e6", True), ("calm", "0.01", False)):
        assert here(*flags, "--name", name, "--optim.lr", lr)[0] == 0
        lines = [line for line in here.out.splitlines() if "useless" in line]
        assert len(lines) == told
        assert all(line.startswith("this run's weights are useless at its end, step 40: ") for line in lines)
        assert metrics(tmp_path / name)[-1].keys() >= NAMES


@pytest.mark.slow
def test_two_ranks_look_together(tmp_path: Path):
    code, out, err = outside(tmp_path, "--ranks", "2", "--health.every", "1", "--health.num-samples", "6")
    assert (code, err) == (0, "")
    assert all(line.keys() >= NAMES for line in metrics(tmp_path / "r"))
    assert sum("feature_rank" in line for line in out.splitlines() if line.startswith("step")) == 2
