"""A run that is stopped and resumed, also twice, also on another world size, is the run that was not."""

import signal
from pathlib import Path

import pytest
import torch

from kit.checkpoints import equal, same_training
from kit.full_batch import RunOnRanks
from kit.runs import losses, status_of
from sslx import distributed
from sslx.config import load
from sslx.runs import checkpoint
from sslx.train.pretrain import Position, pretrain

FLAGS = (
    "--source.name synthetic --source.num-samples 60 --data.size 8 --data.threads 1 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 16 16 --method.hidden-dim 16 --method.projection-dim 8 --batch-size 12 --epochs 2 "
    "--augment.min-scale 0.3 --optim.name sgd --optim.lr 0.05 --log.every 1 --online.every 0 --resume auto --name r"
).split()
STEPS = 10  # two epochs of five


class StopAt:
    """A stopping signal that is there from a given step on, as StopSignals would have it."""

    def __init__(self, position: Position, step: int) -> None:
        self.position, self.step = position, step

    @property
    def received(self) -> int:
        return int(signal.SIGTERM) if self.position.step >= self.step else 0

    def acknowledge(self, agreed: int) -> int:
        return agreed


def run(folder: str, stop_at: int, flags: list[str]) -> int:
    """Start or resume the run and stop it at a step; returns the step that it reached."""
    torch.set_num_threads(1)
    settings = load([*FLAGS, "--runs", folder, *flags])
    position = Position()
    pretrain(settings, distributed.init("cpu"), StopAt(position, stop_at), position)  # pyright: ignore[reportArgumentType]
    assert position.lock is not None
    position.lock.release()
    return position.step


@pytest.mark.parametrize(
    ("world_size", "backend", "more"),
    [
        (1, "dali", []),
        pytest.param(1, "torchvision", [], marks=pytest.mark.slow),
        (2, "dali", ["--average.momentum", "0.9"]),
        pytest.param(1, "resident", ["--deterministic"], marks=pytest.mark.slow),
        pytest.param(3, "dali", [], marks=pytest.mark.slow),
        pytest.param(2, "dali", ["--deterministic", "--method.name", "byol"], marks=pytest.mark.slow),
    ],
)
def test_resumed_twice_is_bit_identical(
    ranks: RunOnRanks, tmp_path: Path, world_size: int, backend: str, more: list[str]
) -> None:
    flags = ["--data.backend", backend, "--precision", "fp32", *more]
    flags += ["--data.threads", "0"] if backend == "torchvision" else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(world_size, run, str(whole), 99, flags) == [STEPS] * world_size
    reached = [ranks(world_size, run, str(parts), stop, flags)[0] for stop in (2, 6, 99)]
    assert reached[0] < reached[1] < reached[2] == STEPS
    assert reached[0] % 5, "the first stop must be within an epoch"
    assert same_training(whole / "r", parts / "r")
    assert losses(parts / "r") == losses(whole / "r")
    assert len(losses(parts / "r")) == STEPS


@pytest.mark.slow
def test_resumed_on_another_world_size_sees_the_samples_that_were_left(ranks: RunOnRanks, tmp_path: Path) -> None:
    """In fp64 with sync BN the weights depend on the samples alone: any other sample would show."""
    flags = ["--precision", "fp64", "--batch-norm", "sync"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks(1, run, str(whole), 99, flags)
    for world_size, stop in ((2, 2), (1, 4), (3, 99)):
        ranks(world_size, run, str(parts), stop, flags)
    a, b = (checkpoint.load(folder / "r")["method"] for folder in (whole, parts))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-8, atol=1e-10)


@pytest.mark.soak
def test_another_seed_is_another_run(ranks: RunOnRanks, tmp_path: Path) -> None:
    """The comparison can fail."""
    for name, seed in (("a", "0"), ("b", "1")):
        ranks(1, run, str(tmp_path / name), 99, ["--seed", seed])
    assert not equal(*(checkpoint.load(tmp_path / name / "r")["method"] for name in ("a", "b")))


def test_status_is_left_by_the_launcher_only(ranks: RunOnRanks, tmp_path: Path) -> None:
    """The loop itself says "running"; how it ended is for whoever started it to say."""
    ranks(1, run, str(tmp_path), 2, [])
    assert status_of(tmp_path).state == "running"
