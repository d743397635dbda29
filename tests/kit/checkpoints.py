"""Checkpoints for tests: a state, a run folder with two of them, and how a stranger would forge one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslx.runs import checkpoint

State = dict[str, Any]


def make_state(value: float = 1.0) -> State:
    linear = nn.Linear(4, 3)
    nn.init.constant_(linear.weight, value)
    encoder = nn.Sequential(linear, nn.BatchNorm1d(3))
    return {
        "encoder": encoder.state_dict(),
        "queue": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "step": int(value),
        "lr": 0.1,
        "config": {"name": "simclr", "crops": [224, (0.2, 1.0)], "seed": None, "flip": True},
    }


def weight(state: dict[str, Any]) -> float:
    return state["encoder"]["0.weight"][0, 0].item()


def saved_run(folder: Path) -> Path:
    """A run folder with good checkpoints at steps 100 and 200, in whose states the step is the weight."""
    for step in (100, 200):
        checkpoint.save(folder, step, make_state(step), keep=3)
    return folder


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def reseal(folder: Path, step: int) -> None:
    """Write the manifest anew, as one who wants a changed state.pt to pass would."""
    data = (folder / "state.pt").read_bytes()
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": checkpoint.FORMAT, "step": step, "files": {"state.pt": digest}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
