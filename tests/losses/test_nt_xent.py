"""NT-Xent over real ranks: the full-batch loss and the full-batch gradients at any world size."""

import math
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing as dynamo_testing
import torch.distributed as dist
from torch import Tensor, nn

from kit import nt_xent as oracles
from kit.full_batch import RunOnRanks
from sslx import distributed, parallel
from sslx.losses import nt_xent

operators = sys.modules["sslx.losses.nt_xent"]


def brute_force(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Of the 2B embeddings."""
    z, own = torch.cat([z1, z2]), torch.arange(2 * len(z1))
    return oracles.by_loops(z, z, own, own.roll(len(z1)), temperature)


def own_rows(*views: Tensor) -> list[Tensor]:
    """Every W-th row of each, of which this rank's is the first."""
    return [z[distributed.rank() :: distributed.world_size()] for z in views]


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
    wrapped = parallel.wrap(net, device=torch.device("cpu"))
    loss = wrapped(x1.chunk(world_size)[rank], x2.chunk(world_size)[rank])
    loss.backward()
    assert net.weight.grad is not None
    assert net.temperature.grad is not None
    return distributed.mean_over_ranks(loss).item(), net.weight.grad, net.temperature.grad


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
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


def share_of(z1: Tensor, z2: Tensor, temperature: float, impl: Any) -> tuple[float, Tensor, Tensor]:
    """This rank's mean loss over ranks, and its embeddings' gradients."""
    leaves = [z.clone().requires_grad_() for z in own_rows(z1, z2)]
    loss = nt_xent(*leaves, temperature, impl=impl)
    return distributed.mean_over_ranks(loss).item(), *torch.autograd.grad(loss, leaves)


interpreted = pytest.mark.skipif(not oracles.INTERPRETED, reason="run by tests/kernels/test_nt_xent.py")
FUSED = [pytest.param("fused", world_size, marks=interpreted) for world_size in (2, 3)]


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize(("impl", "world_size"), [("tiled", 3), *FUSED])
def test_own_columns_first_and_the_others_after_are_the_definition(
    ranks: RunOnRanks, generator: torch.Generator, impl: str, world_size: int, temperature: float
) -> None:
    """Either side of the temperature below which the largest exponent is taken out.

    Of the fused form, prepared rows in fp16 and their denominators travel; it runs in Triton's interpreter.
    """
    dtype, of_loss, of_gradient = (torch.float32, 2e-6, 5e-5) if impl == "tiled" else (torch.bfloat16, 2e-4, 5e-3)
    z1, z2 = torch.randn(2, 6 * world_size, 32, generator=generator).to(dtype)
    truth = ranks(world_size, share_of, z1.double(), z2.double(), temperature, "reference")
    found = ranks(world_size, share_of, z1, z2, temperature, impl, timeout_s=600.0)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=of_loss)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert (a.double() - b).norm() <= of_gradient * b.norm()


def sent(z1: Tensor, z2: Tensor) -> list[list[tuple[str, Any]]]:
    """The collectives of a forward and those of a backward, with the shapes they were given."""
    with torch.profiler.profile(record_shapes=True) as forward:
        loss = nt_xent(z1.requires_grad_(), z2)
    with torch.profiler.profile(record_shapes=True) as backward:
        loss.backward()
    events = [profile.events() or [] for profile in (forward, backward)]
    return [[(e.name, e.input_shapes[1]) for e in each if e.name.startswith("c10d::")] for each in events]


def test_the_embeddings_are_sent_once_and_nothing_in_the_backward(
    ranks: RunOnRanks, generator: torch.Generator
) -> None:
    z1, z2 = torch.randn(2, 8, 16, generator=generator)
    for forward, backward in ranks(2, sent, z1, z2):
        # The batch sizes over the control group, the 16 rows, their 16 denominators.
        assert [shape for _, shape in forward] == [[1], [16, 16], [16]]
        assert all("all" in name and "gather" in name for name, _ in forward)
        assert backward == []


def compiled(z1: Tensor, z2: Tensor, weight: Tensor) -> tuple[int, list[float], list[float]]:
    """(number of graphs, gradients' sums compiled, eager) over three steps on other numbers each time."""
    counter = dynamo_testing.CompileCounterWithBackend("aot_eager")
    z1, z2 = own_rows(z1, z2)

    def step(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
        return nt_xent(x1 @ weight, x2 @ weight)

    fast = torch.compile(step, fullgraph=True, backend=counter)
    found: list[list[float]] = [[], []]
    for shift in range(3):
        for function, sums in zip((fast, step), found, strict=True):
            leaf = weight.clone().requires_grad_()
            function(z1 + shift, z2, leaf).backward()
            assert leaf.grad is not None
            sums.append(leaf.grad.square().sum().item())
    return counter.frame_count, *found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_compiled_step_holds_it_whole_and_compiles_once(
    ranks: RunOnRanks, generator: torch.Generator, world_size: int
) -> None:
    z1, z2 = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    for graphs, fast, eager in ranks(world_size, compiled, z1, z2, torch.eye(6, dtype=torch.float64)):
        assert graphs == 1
        assert fast == pytest.approx(eager, rel=1e-12)


def own_loss(z1: Tensor, z2: Tensor) -> float:
    z1, z2 = own_rows(z1, z2)
    return nt_xent(z1, z2).item()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_ranks_nan_reaches_the_loss_of_all(ranks: RunOnRanks, generator: torch.Generator, value: float) -> None:
    z1, z2 = torch.randn(2, 6, 4, generator=generator)
    z1[1, 0] = value  # of rank 1
    assert all(math.isnan(loss) for loss in ranks(3, own_loss, z1, z2))


def test_views_that_are_not_contiguous_and_mixed_dtypes(generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 4, 6, generator=generator).transpose(1, 2)
    expected = brute_force(z1.double(), z2.double(), 0.1)
    assert nt_xent(z1, z2).item() == pytest.approx(expected, rel=2e-6)
    assert nt_xent(z1, z2.double()).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.ones(4, 3), {"temperature": 0.0}, "positive temperature, got 0.0"),
        (torch.ones(4, 3), {"temperature": math.nan}, "positive temperature, got nan"),
        (torch.ones(4, 3), {"impl": "quick"}, "one of auto, reference, tiled, fused, got 'quick'"),
        (torch.ones(4, 3, dtype=torch.int64), {}, "floats, got torch.int64"),
        (torch.ones(0, 3), {}, r"\(B, D\), got \(0, 3\)"),
        (torch.ones(4), {}, r"\(B, D\), got \(4,\)"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(z: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        nt_xent(z, z, **options)
    assert "\n" not in str(raised.value)


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


def test_one_sample_a_rank_is_enough(ranks: RunOnRanks, generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 2, 4, dtype=torch.float64, generator=generator)
    losses = [loss for loss, *_ in ranks(2, share_of, z1, z2, 0.1, "auto")]
    assert losses == [pytest.approx(brute_force(z1, z2, 0.1), rel=1e-12)] * 2


def in_autocast(z1: Tensor, z2: Tensor) -> tuple[float, torch.dtype, torch.dtype]:
    leaf, other = (z.bfloat16() for z in own_rows(z1, z2))
    leaf.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(leaf, other)
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
    # A dispatch mode does not see what an operator does inside, so here is its own code.
    z, t = leaf.detach(), torch.tensor(0.1)
    checked = distributed.check_same
    distributed.check_same = lambda *_: None  # its values live on the host
    try:
        with mode:
            _, *saved = operators._forward._init_fn(z, z.flip(0), t, 0.1, "tiled", "")
            operators._backward._init_fn(torch.ones(()), t, *saved, 0.1, "tiled", "", True)
    finally:
        distributed.check_same = checked
    return loss.item()


def test_nothing_waits_for_the_device(ranks: RunOnRanks, no_host_sync: Any) -> None:
    assert all(math.isfinite(loss) for loss in ranks(2, without_host_sync, no_host_sync))
