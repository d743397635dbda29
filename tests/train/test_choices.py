"""Choices of ``sslx pretrain`` that have a world of their own behind them: a compiler, wandb."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from kit.checkpoints import equal
from kit.processes import metrics, pretrain
from sslx import cli
from sslx.machine import compiler
from sslx.runs import checkpoint
from sslx.trained import load


def losses(runs: Path, name: str, *flags: str) -> list[float]:
    assert cli.main(pretrain(runs, "--precision", "fp64", "--name", name, *flags)) == 0
    return [line["loss"] for line in metrics(runs / name)]


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_cpp() is None, reason="Inductor needs a C++ compiler")
def test_compiled_ranks_train_as_eager_ones_do_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """In fp64: in fp32 a single value may round to the other side of a ReLU, a tenth of so small a net's gradient."""
    flags = ("--steps", "4", "--ranks", "2", "--checkpoint.every", "2", "--encoder.layers", "0", "0", "1", "1")
    eager, compiled = (losses(tmp_path, choice, "--compile", choice, *flags) for choice in ("off", "on"))
    assert len(eager) == 4
    assert compiled == pytest.approx(eager, rel=1e-9)
    load(tmp_path / "on")  # the names of its weights are an eager one's
    last, _ = checkpoint.newest(tmp_path / "on")
    assert last is not None
    weights = checkpoint.load(last)["method"]
    shutil.rmtree(last)  # as if killed before the last step
    assert losses(tmp_path, "on", "--compile", "on", *flags, "--resume", "auto") == compiled
    assert equal(checkpoint.load(tmp_path / "on")["method"], weights)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_wandb_run_and_event_files(tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--steps", "4", "--checkpoint.every", "2", "--log.wandb", "offline", "--log.project", "tests")
    flags += ("--log.tensorboard",)
    whole = losses(tmp_path, "r", *flags)
    last, _ = checkpoint.newest(tmp_path / "r")
    assert last is not None
    shutil.rmtree(last)  # as if killed before the last step
    assert losses(tmp_path, "r", *flags, "--resume", "auto") == whole
    logs = [path.name for path in (tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb")]
    assert len(logs) == 2
    assert len(set(logs)) == 1, "both under one run id"
    events = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(whole, 1)]
