"""What the scaling benchmark counts, beside torch's own count and bytes worked out by hand."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def counts(folder: str) -> tuple[list[dict[str, Any]], dict[str, int], list[dict[str, Any]]]:
    """The collectives of a step, torch's own count of them, and those of NT-Xent."""
    from torch.distributed.tensor.debug import CommDebugMode

    from sslx import distributed, losses, parallel

    sys.path.insert(0, folder)
    import bench_scaling

    ranks = distributed.init("cpu")
    wrapped = parallel.wrap(nn.Linear(100, 50), device=ranks.device)
    x = torch.randn(8, 100)

    def step() -> None:
        z = wrapped(x)
        (distributed.all_gather_grad(z).square().sum() + distributed.sum_over_ranks(z.detach()).sum()).backward()

    step()
    collectives = bench_scaling.counted(step, ranks)
    with CommDebugMode() as torch_counter:
        step()
    z1, z2 = (torch.randn(8, 50, requires_grad=True) for _ in range(2))
    of_loss = bench_scaling.counted(lambda: losses.nt_xent(z1, z2, 0.5).backward(), ranks)
    return collectives, {str(kind): calls for kind, calls in torch_counter.get_comm_counts().items()}, of_loss


@pytest.mark.slow
def test_calls_are_torchs_own_count_and_bytes_those_of_whole_buffers(ranks: Callable[..., Any]) -> None:
    """Those within the loss's operator too."""
    for collectives, torch_counts, of_loss in ranks(2, counts, str(BENCHMARKS)):
        calls = {kind["name"]: kind["calls"] for kind in collectives}
        assert calls == {name.partition(".")[2]: n for name, n in torch_counts.items() if n}
        nbytes = {kind["name"]: kind["nbytes"] for kind in collectives}
        reduced, all_rows = 4 * (101 * 50 + 8 * 50), 4 * 2 * 8 * 50
        assert nbytes == {"allreduce_": reduced, "_allgather_base_": all_rows, "_reduce_scatter_base_": all_rows}
        (gathered,) = (kind["nbytes"] for kind in of_loss if "gather" in kind["name"])
        embeddings = 4 * 2 * 16 * 50
        assert embeddings <= gathered < 1.1 * embeddings  # and a few numbers a row
