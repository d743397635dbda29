"""Runs of older versions are read and go on.  ``format_1`` is a run of sslx 0.1 at step 2 of 4."""

import shutil
from pathlib import Path

import pytest
import torch

from kit.checkpoints import equal
from sslx import cli
from sslx.runs import checkpoint
from sslx.runs.state import RESUME
from sslx.trained import load

SAVED = Path(__file__).parent / "format_1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "r"))


def test_its_checkpoint_is_read(run: Path) -> None:
    saved = torch.load(run / "checkpoints" / "step_2" / "state.pt", weights_only=True)
    state = checkpoint.load(run, needs=(*RESUME, "encoder"))
    assert state["step"] == 2
    assert equal(state["method"], dict(saved["method"]))
    assert {f"encoder.{name}" for name in state["encoder"]} == {k for k in saved["method"] if k.startswith("encoder.")}


def test_its_encoder_is_loaded(run: Path) -> None:
    weights = torch.load(run / "checkpoints" / "step_2" / "state.pt", weights_only=True)["method"]
    encoder = load(run).encoder.state_dict()
    assert equal(encoder, {name: weights[f"encoder.{name}"] for name in encoder})


def test_it_goes_on_in_the_new_format(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", str(run)]) == 0
    assert "shuffled the images in another way" in capfd.readouterr().out
    names = {path.name for path in (run / "checkpoints" / "step_4").iterdir()}
    assert names == {"encoder.safetensors", "facts.json", "loader.pt", "manifest.json", "method.pt", "optimizer.pt"}
    assert checkpoint.load(run)["step"] == 4
