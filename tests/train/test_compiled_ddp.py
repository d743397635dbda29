"""Compiled methods inside DDP, whose compiler cuts the graph at the gradient buckets, against uncompiled ones."""

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kit import tiny
from kit.full_batch import RunOnRanks
from sslx import distributed, parallel
from sslx.config import load
from sslx.train import build, verify

STEPS, LEAST_BUCKETS = 3, 5


class _InManyBuckets(DistributedDataParallel):
    """DDP with buckets so small that a narrow encoder fills many."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, bucket_cap_mb=0.02)


def _compile_in_pieces(patch: pytest.MonkeyPatch, num_buckets: list[int]) -> None:
    """Compile by AOTAutograd without Inductor, which takes minutes; note into how many parts DDP's compiler cuts."""
    from torch._dynamo.backends.distributed import DDPOptimizer

    compiler, compile_part = torch.compile, DDPOptimizer.compile_fn

    def counted(self: Any, graph: Any, inputs: Any) -> Any:
        compiled = compile_part(self, graph, inputs)
        num_buckets.append(len(self.buckets))
        return compiled

    _InManyBuckets.__signature__ = inspect.signature(DistributedDataParallel)
    patch.setattr(parallel, "DistributedDataParallel", _InManyBuckets)
    patch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2048)
    patch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    patch.setattr(DDPOptimizer, "compile_fn", counted)


def trained(
    name: str, encoder: str, flags: list[str], autocast: torch.dtype | None = None
) -> tuple[verify.State, verify.State, list[int], int, dict[str, int]]:
    """What some steps uncompiled and compiled come to; the sizes of the cuts, the number of graphs and the breaks.

    Under autocast, uncompiled code casts each weight anew where it is used, as compiled code does.
    """
    from torch._dynamo.utils import counters
    from torch.backends import mkldnn

    warnings.filterwarnings("ignore")
    rank, world_size = distributed.rank(), distributed.world_size()
    ranks = distributed.Ranks(device=torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank)
    states, num_buckets = list[verify.State](), list[int]()
    torch.set_autocast_cache_enabled(False)
    with pytest.MonkeyPatch.context() as patch, mkldnn.flags(enabled=False):
        _compile_in_pieces(patch, num_buckets)
        if autocast:  # which this CPU may not be fast at
            patch.setattr(build, "precision", lambda *_: (torch.float32, autocast))
        for compiled in ("off", "on"):
            argv = [*verify.SETTINGS, *verify.ENCODERS[encoder], "--method.name", name, "--data.size", "16"]
            settings = load([*argv, "--optim.name", "sgd", "--compile", compiled, *flags])
            settings = dataclasses.replace(settings, method=verify.narrow(settings.method))
            torch.compiler.reset()
            counters.clear()
            states.append(verify.train(settings, ranks, STEPS))
    torch.set_autocast_cache_enabled(True)
    breaks = {reason[:200]: count for reason, count in counters["graph_break"].items()}
    return states[0], states[1], num_buckets, counters["stats"]["unique_graphs"], breaks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoder"), tiny.CASES)
def test_compiled_in_ddp_is_uncompiled(name: str, encoder: str, ranks: RunOnRanks) -> None:
    """Three steps in fp64, synchronized batch norm included: one graph, no break, cut into many."""
    flags = ["--precision", "fp64", "--batch-norm", "sync"]
    for eager, compiled, num_buckets, num_graphs, breaks in ranks(2, trained, name, encoder, flags, timeout_s=600):
        assert breaks == {}
        assert num_graphs == 1
        assert len(num_buckets) == 1
        assert num_buckets[0] >= LEAST_BUCKETS
        for part in verify.PARTS:
            error, where = verify.worst(compiled[part], eager[part], verify.MIN_NORM_FRACTION["fp64"])
            assert error <= verify.TOLERANCE["fp64"], (part, where)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoder"), [("swav", "resnet"), ("dino", "vit")])
def test_multi_crop_methods_do_not_drift_in_bf16(name: str, encoder: str, ranks: RunOnRanks) -> None:
    """Compiled SwAV and DINO left the uncompiled ones from the second step on; two causes explain it to the last bit.

    torch traced the backward under autocast, so that the gradient of scores, which are computed in fp32, was a product
    in bf16: prototypes' gradients were the first values that differed, by 1e-2.  ``keep_backward_precision`` mends it.
    What is left, 2e-3 of a convolution's gradient at the first step, is rounding, to the good of compiled code: crops
    of two sizes use each weight twice.  Uncompiled autocast casts it once and so adds both gradients in bf16, compiled
    code casts it twice and adds them in fp32.  Here uncompiled code casts twice too, and nothing at all differs.
    """
    flags = ["--precision", "fp32", "--batch-norm", "local"]
    for eager, compiled, *_ in ranks(2, trained, name, encoder, flags, torch.bfloat16, timeout_s=600):
        assert len(eager["gradients"]) == STEPS
        for part in verify.PARTS:
            for ours, truth in zip(compiled[part], eager[part], strict=True):
                assert [key for key, value in truth.items() if not torch.equal(ours[key], value)] == []
