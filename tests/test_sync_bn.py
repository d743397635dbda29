"""Synchronised batch norm on real gloo ranks, against batch norm of the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslx import distributed
from sslx.sync_bn import SyncBatchNorm, sync_batch_norm

RunOnRanks = Callable[..., list[Any]]


def bn_results(bn: nn.Module, x: Tensor, weights: Tensor, scale: float) -> dict[str, Tensor]:
    """Output, gradients and running statistics after two training steps; the loss is a weighted sum."""
    leaf = x.clone().requires_grad_()
    bn.train()
    bn(leaf.detach() * 2 + 1)
    output = bn(leaf)
    (output * weights).sum().mul(scale).backward()
    results = {"output": output.detach(), "grad": leaf.grad} | dict(bn.named_buffers())
    return {k: v for k, v in results.items() if v is not None} | {
        name: p.grad for name, p in bn.named_parameters() if p.grad is not None
    }


def bn_on_ranks(
    sizes: list[int], x: Tensor, weights: Tensor, options: dict[str, Any], affine: list[Tensor]
) -> dict[str, Tensor]:
    bn = SyncBatchNorm(x.shape[1], **options).double()
    for p, value in zip(bn.parameters(), affine, strict=False):
        p.data.copy_(value)
    rank = distributed.rank()
    return bn_results(bn, x.split(sizes)[rank], weights.split(sizes)[rank], scale=distributed.world_size())


@pytest.mark.parametrize(
    ("sizes", "shape", "options"),
    [
        ([4, 4], (6,), {}),
        ([3, 3, 3], (4, 5), {}),
        ([2, 2], (4, 3, 2), {"affine": False}),
        ([2, 2, 2], (4, 3, 2), {"momentum": None}),
        ([1, 1, 1], (5,), {"momentum": 0.3, "eps": 1e-2}),
        ([4, 1, 2], (3, 4, 4), {}),
        ([2, 3], (3, 2), {"track_running_stats": False}),
    ],
)
def test_sync_bn_is_batch_norm_of_the_whole_batch(
    sizes: list[int],
    shape: tuple[int, ...],
    options: dict[str, Any],
    ranks: RunOnRanks,
    generator: torch.Generator,
) -> None:
    x, weights = torch.randn(2, sum(sizes), *shape, dtype=torch.float64, generator=generator)
    x = x * 3 + 10
    affine = list(torch.randn(2, shape[0], dtype=torch.float64, generator=generator))
    module = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](shape[0], **options).double()
    for p, value in zip(module.parameters(), affine, strict=False):
        p.data.copy_(value)
    whole = bn_results(module, x, weights, scale=1.0)
    parts = ranks(len(sizes), bn_on_ranks, sizes, x, weights, options, affine)
    assert all(part.keys() == whole.keys() for part in parts)
    for name, expected in whole.items():
        values = [part[name] for part in parts]
        if name == "output":
            found = [torch.cat(values)]
        elif name == "grad":  # of the sum over ranks, where the whole batch's is that of the mean
            found = [torch.cat(values) / len(sizes)]
        elif name in ("weight", "bias"):
            found = [torch.stack(values).mean(0)]
        else:
            found = values
        for value in found:
            error = (value - expected).abs().max().item()
            assert error <= 1e-12 * max(1.0, expected.abs().max().item()), name


def test_sync_bn_on_one_rank_is_batch_norm(generator: torch.Generator) -> None:
    x, weights = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=generator)
    plain, synced = nn.BatchNorm2d(3).double(), SyncBatchNorm(3).double()
    expected, found = (bn_results(bn, x, weights, 1.0) for bn in (plain, synced))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(synced.eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        synced(torch.ones(3).double())


def bn_in_autocast(x: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = sync_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    net = net.to(memory_format=torch.channels_last)
    grads: list[Tensor] = []
    part = x.chunk(2)[distributed.rank()].to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = net[0](part)
        hidden.register_hook(grads.append)
        output = net[1](hidden)
    output.float().square().mean().backward()
    same_statistics = distributed.gather_objects(net[1].running_var.tolist())
    formats = [t.is_contiguous(memory_format=torch.channels_last) for t in (output, grads[0])]
    moments = [distributed.mean_over_ranks(m.mean((0, 2, 3))) for m in (output.float(), output.float() ** 2)]
    dtypes = [hidden.dtype, output.dtype, grads[0].dtype, net[1].weight.grad.dtype]
    return dtypes, formats, moments, same_statistics, bool(part.grad.isfinite().all())


def test_sync_bn_in_bf16_autocast(ranks: RunOnRanks, generator: torch.Generator) -> None:
    x = torch.randn(8, 3, 6, 6, generator=generator)
    for dtypes, formats, (mean, square), statistics, finite in ranks(2, bn_in_autocast, x):
        assert dtypes == [torch.bfloat16] * 3 + [torch.float32]
        assert formats == [True, True]
        torch.testing.assert_close(mean, torch.zeros(8), atol=3e-3, rtol=0)
        torch.testing.assert_close(square, torch.ones(8), atol=1e-2, rtol=0)
        assert statistics[0] == statistics[1]
        assert finite


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])
def test_sync_batch_norm_keeps_a_trunk(name: str, generator: torch.Generator) -> None:
    import timm

    net = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(1, 3, 32, 32, generator=generator)
    before, state = net(x), net.state_dict()
    parameters = list(net.parameters())
    num = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    synced = sync_batch_norm(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in synced.modules())
    assert sum(isinstance(m, SyncBatchNorm) for m in synced.modules()) == num > 10
    assert list(synced.state_dict()) == list(state)
    assert all(a is b for a, b in zip(synced.parameters(), parameters, strict=True))
    assert not any(m.training for m in synced.modules())
    assert torch.equal(synced(x), before)
    assert sync_batch_norm(synced) is synced


def test_sync_batch_norm_of_a_batch_norm_itself() -> None:
    synced = sync_batch_norm(nn.BatchNorm1d(4, eps=1e-3, momentum=None, affine=False))
    assert isinstance(synced, SyncBatchNorm)
    assert (synced.eps, synced.momentum, synced.weight, synced.training) == (1e-3, None, None, True)
