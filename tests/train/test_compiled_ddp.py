"""Compiled methods inside DDP, whose compiler cuts the graph at the gradient buckets, against uncompiled ones."""

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sslx import distributed, methods, parallel, verify
from sslx.config import load
from sslx.train import build

RunOnRanks = Callable[..., list[Any]]
STEPS, LEAST_BUCKETS = 3, 5
PAIRS = [(name, encoder) for name in methods.available() for encoder in methods.encoders(name)]


class _InManyBuckets(DistributedDataParallel):
    """DDP with buckets so small that a narrow encoder fills many."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, bucket_cap_mb=0.02)


@contextlib.contextmanager
def _compiled_in_pieces(num_buckets: list[int]) -> Iterator[None]:
    """Compile by AOTAutograd without Inductor, which takes minutes; note into how many parts DDP's compiler cuts."""
    from torch._dynamo.backends.distributed import DDPOptimizer

    was = parallel.DistributedDataParallel, dist._DEFAULT_FIRST_BUCKET_BYTES, torch.compile, DDPOptimizer.compile_fn

    def counted(self: Any, graph: Any, inputs: Any) -> Any:
        compiled = was[3](self, graph, inputs)
        num_buckets.append(len(self.buckets))
        return compiled

    _InManyBuckets.__signature__ = inspect.signature(DistributedDataParallel)
    parallel.DistributedDataParallel, dist._DEFAULT_FIRST_BUCKET_BYTES = _InManyBuckets, 2048
    torch.compile, DDPOptimizer.compile_fn = lambda function: was[2](function, backend="aot_eager"), counted
    try:
        yield
    finally:
        parallel.DistributedDataParallel, dist._DEFAULT_FIRST_BUCKET_BYTES = was[:2]
        torch.compile, DDPOptimizer.compile_fn = was[2:]


def trained(
    name: str, encoder: str, flags: list[str], autocast: torch.dtype | None
) -> tuple[verify.State, verify.State, list[int], int, dict[str, int]]:
    """What some steps uncompiled and compiled come to; the sizes of the cuts, the number of graphs and the breaks."""
    from torch._dynamo.utils import counters
    from torch.backends import mkldnn

    warnings.filterwarnings("ignore")
    rank = distributed.rank()
    ranks = distributed.Ranks(rank, distributed.world_size(), rank, torch.device("cpu"))
    states, num_buckets = list[verify.State](), list[int]()
    precision = build.precision
    if autocast:  # which this CPU may not be fast at
        build.precision = lambda *_: (torch.float32, autocast)
    try:
        for compiled in ("off", "on"):
            argv = [*verify.SETTINGS, *verify.ENCODERS[encoder], "--method.name", name, "--data.size", "16"]
            settings = load([*argv, "--optim.name", "sgd", "--compile", compiled, *flags])
            settings = dataclasses.replace(settings, method=verify.narrow(settings.method))
            torch.compiler.reset()
            counters.clear()
            with mkldnn.flags(enabled=False), _compiled_in_pieces(num_buckets):
                states.append(verify.train(settings, ranks, STEPS))
    finally:
        build.precision = precision
    breaks = {reason[:200]: count for reason, count in counters["graph_break"].items()}
    return states[0], states[1], num_buckets, counters["stats"]["unique_graphs"], breaks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoder"), PAIRS)
def test_compiled_in_ddp_is_uncompiled(name: str, encoder: str, ranks: RunOnRanks) -> None:
    flags = ["--precision", "fp64", "--batch-norm", "sync"]
    for eager, compiled, num_buckets, num_graphs, breaks in ranks(2, trained, name, encoder, flags, None):
        assert breaks == {}
        assert num_graphs == 1
        assert [num >= LEAST_BUCKETS for num in num_buckets] == [True], num_buckets
        for part in verify.PARTS:
            error, where = verify.worst(compiled[part], eager[part], 1e-4)
            assert error <= verify.TOLERANCE["fp64"], (part, where)
