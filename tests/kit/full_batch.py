"""Whether a loss on W real ranks is the full batch's, with its gradients, and whether a planted bug would be found.

Each rank has its share of the rows of the inputs.  A linear encoder, the same on all ranks, makes embeddings of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sslx import distributed
from sslx.errors import DataError

RunOnRanks = Callable[..., list[Any]]
WORLD_SIZES = [1, 2, pytest.param(3, marks=pytest.mark.slow)]
over_ranks = pytest.mark.parametrize("world_size", WORLD_SIZES)


def without_the_sum(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The sum over ranks, each of which keeps its own gradient (lightly #1977)."""
    return x + (distributed.sum_over_ranks(x) - x.detach())


def without_the_others(x: Tensor, *_: Any) -> Tensor:
    """The gathered rows, of which only this rank's have a gradient, and that of this rank's loss alone."""
    rows = list(distributed.all_gather(x.detach()).split(len(x)))
    rows[distributed.rank()] = x
    return torch.cat(rows)


BUGS: dict[str, Callable[..., Any]] = {
    "sum_over_ranks_grad": without_the_sum,
    "all_gather_grad": without_the_others,
    "sum_over_ranks": lambda x, *_: x,
    "rank": lambda *_: 0,
}
"""Functions of sslx.distributed as they would be wrong."""


def on_this_rank(
    loss: Callable[..., Any], inputs: Sequence[Tensor], given: Sequence[Tensor], weight: Tensor, bug: str
) -> tuple[float, Tensor]:
    """The means over ranks of the loss and of the gradient of the linear encoder's weight."""
    world_size, rank = distributed.world_size(), distributed.rank()
    leaf = weight.clone().requires_grad_()
    own = [x.chunk(world_size)[rank] @ leaf for x in inputs] + [x.chunk(world_size)[rank] for x in given]
    with pytest.MonkeyPatch.context() as patch:
        if bug in BUGS:
            patch.setattr(distributed, bug, BUGS[bug])
        value = loss(*own)
        value = value[0] if isinstance(value, tuple) else value
        (gradient,) = torch.autograd.grad(value, leaf)
    gradient = gradient / world_size if bug == "1/W" else gradient
    return distributed.mean_over_ranks(value.detach()).item(), distributed.mean_over_ranks(gradient)


def check(
    ranks: RunOnRanks,
    world_size: int,
    loss: Callable[..., Any],
    oracle: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    weight: Tensor,
    *,
    given: Sequence[Tensor] = (),
    bugs: Sequence[str] = (),
) -> None:
    """Check the means over ranks of the loss and its gradients, and that bugs change them.

    loss: of this rank's embeddings, one (B, D) for each input, and of ``given``; what it returns, or the first of it.
    oracle: the same of the whole batch's, by other means.  inputs: (N, D_in) each, in fp64.  weight: (D_in, D).
    bugs: of ``BUGS``, besides a gradient that is too small by the number of ranks.
    """
    leaf = weight.clone().requires_grad_()
    full = oracle(*(x @ leaf for x in inputs), *given)
    (expected,) = torch.autograd.grad(full, leaf)
    for bug in ("", "1/W", *bugs) if world_size > 1 else ("",):
        for value, gradient in ranks(world_size, on_this_rank, loss, inputs, given, weight, bug):
            error = (gradient - expected).norm() / expected.norm()
            if bug:
                assert error > 1e-3, f"the planted bug was not found: {bug}"
            else:
                assert value == pytest.approx(full.item(), rel=1e-10)
                assert error < 1e-10


def _with_unequal_batches(loss: Callable[..., Any]) -> str:
    z = torch.ones(3 + distributed.rank(), 2)
    with pytest.raises(DataError) as raised:
        loss(z, z)
    return str(raised.value)


def refuses_unequal_batches(ranks: RunOnRanks, loss: Callable[..., Any], name: str) -> None:
    """Check that ranks with other numbers of rows are all told so, in one line."""
    for message in ranks(2, _with_unequal_batches, loss):
        assert f"batch size of {name} on every rank, got [3, 4]" in message
        assert "\n" not in message
