"""NT-Xent over real ranks: the full-batch loss and the full-batch gradients at any world size."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslx import distributed
from sslx.errors import ConfigError, DataError
from sslx.losses import nt_xent

RunOnRanks = Callable[..., list[Any]]


def brute_force(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Equation 1 of arXiv 2002.05709 over the 2B embeddings, in Python's own floats."""
    z = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in [*z1.tolist(), *z2.tolist()]]
    total = 0.0
    for i, a in enumerate(z):
        s = [sum(x * y for x, y in zip(a, b, strict=True)) / temperature for b in z]
        positive = s[(i + len(z1)) % len(z)]
        total += math.log(sum(math.exp(x) for j, x in enumerate(s) if j != i)) - positive
    return total / len(z)


class Net(nn.Module):
    """A linear encoder, and a temperature to learn."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.temperature = nn.Parameter(torch.tensor(0.2, dtype=weight.dtype))

    def forward(self, x1: Tensor, x2: Tensor, group: distributed.Group = None) -> Tensor:
        return nt_xent(x1 @ self.weight, x2 @ self.weight, self.temperature, group)


def loss_and_gradients(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[float, Tensor, Tensor]:
    """This rank's share of the batch through DDP: the loss's mean over ranks and DDP's gradients."""
    world_size, rank = distributed.world_size(), distributed.rank()
    net = Net(weight)
    wrapped = distributed.wrap(net, device=torch.device("cpu"), sync_bn=True)
    loss = wrapped(x1.chunk(world_size)[rank], x2.chunk(world_size)[rank])
    loss.backward()
    assert net.weight.grad is not None
    assert net.temperature.grad is not None
    return distributed.mean_over_ranks(loss).item(), net.weight.grad, net.temperature.grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_give_the_full_batch_loss_and_gradients(
    world_size: int, ranks: RunOnRanks, generator: torch.Generator
) -> None:
    x1, x2 = torch.randn(2, 12, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    full = loss_and_gradients(x1, x2, weight)
    assert full[0] == pytest.approx(brute_force(x1 @ weight, x2 @ weight, 0.2), rel=1e-12)
    for loss, grad, temperature_grad in ranks(world_size, loss_and_gradients, x1, x2, weight):
        assert loss == pytest.approx(full[0], rel=1e-12)
        torch.testing.assert_close(grad, full[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(temperature_grad, full[2], rtol=0, atol=1e-12)


def test_gradients_of_the_single_process_loss(generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nt_xent, (z1, z2, temperature))


def in_subgroup(z1: Tensor, z2: Tensor) -> float | None:
    rank = distributed.rank()
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    loss = nt_xent(z1[rank - 1 :: 2], z2[rank - 1 :: 2], 0.1, group)
    return distributed.mean_over_ranks(loss, group).item()


def test_a_group_of_ranks(ranks: RunOnRanks, generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64, generator=generator)
    expected = pytest.approx(brute_force(z1, z2, 0.1), rel=1e-12)
    assert ranks(3, in_subgroup, z1, z2) == [None, expected, expected]


def with_unequal_batches() -> str:
    z = torch.ones(3 + distributed.rank(), 2)
    with pytest.raises(DataError) as raised:
        nt_xent(z, z)
    return str(raised.value)


def test_unequal_batches_are_an_error_on_all_ranks(ranks: RunOnRanks) -> None:
    for message in ranks(2, with_unequal_batches):
        assert "got [3, 4] by rank" in message
        assert "\n" not in message


def one_sample_each(z1: Tensor, z2: Tensor) -> float:
    rank = distributed.rank()
    loss = nt_xent(z1[rank : rank + 1], z2[rank : rank + 1])
    return distributed.mean_over_ranks(loss).item()


def test_one_sample_a_rank_is_enough(ranks: RunOnRanks, generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 2, 4, dtype=torch.float64, generator=generator)
    assert ranks(2, one_sample_each, z1, z2) == [pytest.approx(brute_force(z1, z2, 0.1), rel=1e-12)] * 2


def test_without_negatives() -> None:
    with pytest.raises(ConfigError, match="no negatives"):
        nt_xent(torch.ones(1, 4), torch.ones(1, 4))


def test_views_of_unequal_shape() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4, 2\)"):
        nt_xent(torch.ones(4, 3), torch.ones(4, 2))


def in_autocast(z1: Tensor, z2: Tensor) -> tuple[float, torch.dtype, torch.dtype]:
    share = slice(distributed.rank(), None, distributed.world_size())
    leaf = z1[share].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(leaf, z2[share].bfloat16())
    loss.backward()
    assert leaf.grad is not None
    return distributed.mean_over_ranks(loss).item(), loss.dtype, leaf.grad.dtype


def test_bf16_in_autocast_is_computed_in_fp32(ranks: RunOnRanks, generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 8, 16, generator=generator).bfloat16().double()
    for loss, dtype, grad_dtype in ranks(2, in_autocast, z1, z2):
        assert loss == pytest.approx(brute_force(z1, z2, 0.1), rel=2e-6)
        assert dtype == torch.float32
        assert grad_dtype == torch.bfloat16


def without_host_sync(mode: Any) -> float:
    leaf = torch.randn(4, 3, requires_grad=True)
    with mode:
        loss = nt_xent(leaf, leaf.flip(0), torch.tensor(0.1))
        loss.backward()
    return loss.item()


def test_nothing_waits_for_the_device(ranks: RunOnRanks, no_host_sync: Any) -> None:
    assert all(math.isfinite(loss) for loss in ranks(2, without_host_sync, no_host_sync))
