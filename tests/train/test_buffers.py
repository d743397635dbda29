"""Buffers on several ranks: each rank's own while it trains, rank 0's in evaluation and in checkpoints."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kit.checkpoints import equal
from sslx import distributed, parallel
from sslx.config import load
from sslx.runs import checkpoint
from sslx.train.pretrain import Position, pretrain
from sslx.train.signals import StopSignals

FLAGS = (
    "--source.name synthetic --source.num-samples 48 --data.size 16 --data.threads 1 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 16 16 --method.hidden-dim 16 --batch-size 12 --steps 6 --checkpoint.every 3 "
    "--augment.min-scale 0.3 --optim.name sgd --optim.lr 0.05 --online.every 0 --health.every 2 --name run "
    "--device cpu --precision fp32"
)
METHODS = {
    "simclr": "--method.projection-dim 8",
    "byol": "--method.projection-dim 8",  # a target with running statistics of its own
    "swav": "--method.projection-dim 8 --method.queue-size 24 --method.queue-start 0 --method.num-prototypes 16 "
    "--method.num-local 2 --method.local-size 8",
    "dino": "--method.bottleneck-dim 8 --method.output-dim 16 --method.num-local 2 --method.local-size 8",
}


class _SendsBuffers(DistributedDataParallel):
    """DDP as it is by default: rank 0's buffers go to all ranks before each forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options |= {name: True for name in ("forward_sync_buffers", "broadcast_buffers") if name in options}
        super().__init__(*args, **options)


def run(folder: str, method: str, sends: bool) -> None:
    torch.set_num_threads(1)
    _SendsBuffers.__signature__ = inspect.signature(DistributedDataParallel)
    flags = f"{FLAGS} --method.name {method} {METHODS[method]}".split()
    position = Position()
    with pytest.MonkeyPatch.context() as patch:
        if sends:
            patch.setattr(parallel, "DistributedDataParallel", _SendsBuffers)
        pretrain(load([*flags, "--runs", folder]), distributed.init("cpu"), StopSignals(), position)
    assert position.lock is not None
    position.lock.release()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_are_those_of_a_run_that_sends_buffers_at_every_step(ranks, tmp_path: Path, method: str) -> None:
    """To the last bit: weights, queues, centers, targets, rank 0's running statistics, the optimizer's state.

    Each save also compares all but the running statistics over the ranks, and ends the run where they differ.
    """
    for sends in (False, True):
        ranks(2, run, str(tmp_path / str(sends)), method, sends)
    for step in (3, 6):
        own, sent = (
            checkpoint.load(tmp_path / str(sends) / "run" / "checkpoints" / f"step_{step}") for sends in (False, True)
        )
        assert any(name.endswith("running_var") for name in own["method"])
        for part in ("method", "optimizer", "loader"):
            assert equal(own[part], sent[part]), (step, part)


def shares() -> tuple[list[Tensor], list[Tensor], bool]:
    """The buffers that this rank had, and has once they are shared."""
    rank = distributed.rank()
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(2).double())
    module.register_buffer("wide", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), persistent=False)
    module[0].num_batches_tracked.fill_(rank)
    module[1].running_mean.uniform_()
    before = [buffer.clone() for buffer in module.buffers()]
    parallel.share_buffers(module)
    is_kept = module.wide.is_contiguous(memory_format=torch.channels_last)
    return before, list(module.buffers()), is_kept


@pytest.mark.parametrize("world_size", [2, 3])
def test_shared_buffers_are_rank_0s(ranks, world_size: int) -> None:
    answers = ranks(world_size, shares)
    first = answers[0][0]
    assert not equal(answers[1][0], first)
    for _, after, is_kept in answers:
        assert equal(after, first)
        assert is_kept
