"""Checkpoints for tests: a state, a run folder with two of them, and how a stranger would forge one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslx.runs import checkpoint, checkpoint_files, manifest

State = dict[str, Any]


def make_state(value: float = 1.0) -> State:
    linear = nn.Linear(4, 3)
    nn.init.constant_(linear.weight, value)
    encoder = nn.Sequential(linear, nn.BatchNorm1d(3))
    method = {f"encoder.{name}": each for name, each in encoder.state_dict().items()}
    return {
        "method": method | {"queue": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)},
        "optimizer": {"state": {0: {"exp_avg": torch.full((2,), value)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "step": int(value),
        "lr": 0.1,
        "config": {"name": "simclr", "crops": [224, [0.2, 1.0]], "seed": None, "flip": True},
    }


def weight(state: dict[str, Any]) -> float:
    return state["method"]["encoder.0.weight"][0, 0].item()


def equal(a: Any, b: Any) -> bool:
    """Whether states are the same to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def same_training(run: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs are the same: weights, optimizer and place in the data."""
    a, b = checkpoint.load(run), checkpoint.load(other)
    return all(equal(a[part], b[part]) for part in ("method", "optimizer", "loader"))


def saved_run(folder: Path) -> Path:
    """A run folder with good checkpoints at steps 100 and 200, in whose states the step is the weight."""
    for step in (100, 200):
        checkpoint.save(folder, step, make_state(step), keep=3)
    return folder


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def reseal(folder: Path, step: int, number: int = manifest.FORMAT) -> None:
    """Write the manifest anew, as one who wants changed files to pass would."""
    digests = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != manifest.NAME
    }
    text = json.dumps({"format": number, "step": step, "files": digests})
    (folder / manifest.NAME).write_text(text)


def forge(folder: Path, step: int, state: object) -> None:
    """Write a sealed checkpoint of anything, as one who is not sslx might: each part as it is, checked by nobody.

    A state that is no dict by name goes into the single file of sslx 0.1.
    """
    for path in folder.iterdir():
        path.unlink()
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        torch.save(state, folder / checkpoint_files.STATE_FILE)
        reseal(folder, step, 1)
        return
    facts = dict[str, Any](state)
    for name in ("method", "optimizer", "loader"):
        if name in facts:
            torch.save(facts.pop(name), folder / f"{name}.pt")
    (folder / checkpoint_files.FACTS).write_text(json.dumps(facts))
    reseal(folder, step)
