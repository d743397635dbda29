"""Synchronised batch norm on real gloo ranks, against batch norm of the whole batch."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sslx import distributed
from sslx.encoders import sync_bn as operators
from sslx.encoders.sync_bn import SyncBatchNorm, sync_batch_norm

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
    sizes: list[int], x: Tensor, weights: Tensor, options: dict[str, Any], affine: list[Tensor], compiled: bool
) -> tuple[dict[str, Tensor], int]:
    """The results of this rank, and the graphs that were compiled."""
    bn = SyncBatchNorm(x.shape[1], **options).double()
    for p, value in zip(bn.parameters(), affine, strict=False):
        p.data.copy_(value)
    rank = distributed.rank()
    graphs = list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    if compiled:
        torch.compiler.reset()
        bn.compile(backend=backend, fullgraph=True, dynamic=False)
    results = bn_results(bn, x.split(sizes)[rank], weights.split(sizes)[rank], scale=distributed.world_size())
    return results, len(graphs)


CASES = [
    ([4, 4], (6,), {}),
    ([3, 3, 3], (4, 5), {}),
    ([2, 2], (4, 3, 2), {"affine": False}),
    ([2, 2, 2], (4, 3, 2), {"momentum": None}),
    ([1, 1, 1], (5,), {"momentum": 0.3, "eps": 1e-2}),
    ([4, 1, 2], (3, 4, 4), {}),
    ([2, 3], (3, 2), {"track_running_stats": False}),
]  # fmt: skip
COMPILED = [pytest.param(*CASES[number], True, marks=pytest.mark.slow) for number in (2, 3, 5)]


@pytest.mark.parametrize(("sizes", "shape", "options", "compiled"), [*((*case, False) for case in CASES), *COMPILED])
def test_sync_bn_is_batch_norm_of_the_whole_batch(
    sizes: list[int],
    shape: tuple[int, ...],
    options: dict[str, Any],
    compiled: bool,
    ranks: RunOnRanks,
    generator: torch.Generator,
) -> None:
    """Compiled, it is one graph without a break."""
    x, weights = torch.randn(2, sum(sizes), *shape, dtype=torch.float64, generator=generator)
    x = x * 3 + 10
    affine = list(torch.randn(2, shape[0], dtype=torch.float64, generator=generator))
    module = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](shape[0], **options).double()
    for p, value in zip(module.parameters(), affine, strict=False):
        p.data.copy_(value)
    whole = bn_results(module, x, weights, scale=1.0)
    each = ranks(len(sizes), bn_on_ranks, sizes, x, weights, options, affine, compiled)
    # The first of the two steps is one of leaves without a gradient.
    assert {num_graphs for _, num_graphs in each} == {2 if compiled else 0}
    parts = [results for results, _ in each]
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
    with pytest.raises(ValueError, match=r"of shape \(N, C, ...\), got \(3,\)"):
        synced(torch.ones(3).double())


def bn_in_autocast(x: Tensor, weights: Tensor, compiled: bool) -> tuple[Any, ...]:
    """Of a half of x, in channels_last and bf16: dtypes, formats; output and gradients; running statistics."""
    rank = distributed.rank()
    bn = SyncBatchNorm(x.shape[1])
    if compiled:
        torch.compiler.reset()
        bn.compile(backend="aot_eager", fullgraph=True)
    leaf = x.chunk(2)[rank].bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = bn(leaf)
    (output * weights.chunk(2)[rank].bfloat16()).sum(dtype=torch.float32).backward()
    assert leaf.grad is not None
    formats = [t.is_contiguous(memory_format=torch.channels_last) for t in (output, leaf.grad)]
    affine = [p.grad for p in (bn.weight, bn.bias)]
    dtypes = [t.dtype for t in (output, leaf.grad, *affine)]
    return dtypes, formats, [output.detach(), leaf.grad], affine, [bn.running_mean, bn.running_var]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bf16_keeps_its_sums_in_fp32(compiled: bool, ranks: RunOnRanks, generator: torch.Generator) -> None:
    """4,096 values a channel with a mean of 50 deviations: sums in bf16, or of squares, would be off by far more."""
    x, weights = torch.randn(2, 8, 3, 32, 16, generator=generator)
    x, weights = (x + 50).bfloat16(), weights.bfloat16()
    plain, leaf = nn.BatchNorm2d(3).double(), x.double().requires_grad_()
    expected = plain(leaf)
    (expected * weights.double()).sum().backward()
    assert leaf.grad is not None
    each = ranks(2, bn_in_autocast, x, weights, compiled)
    for dtypes, formats, _, _, statistics in each:
        assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
        assert formats == [True, True]
        for value, truth in zip(statistics, (plain.running_mean, plain.running_var), strict=True):
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    for i, truth in enumerate((expected, leaf.grad)):  # bf16 itself rounds by 2^-9
        value = torch.cat([values[i] for _, _, values, _, _ in each])
        torch.testing.assert_close(value.double(), truth, rtol=2**-8, atol=2**-8)
    for i, p in enumerate((plain.weight, plain.bias)):
        assert p.grad is not None
        value = torch.stack([affine[i] for _, _, _, affine, _ in each]).double().sum(0)
        torch.testing.assert_close(value, p.grad, rtol=0, atol=0.05)  # of sums of 4,096 products near 1


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Two ranks, of which this process is the first; the other one's part of a collective is left out."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
def test_on_a_gpu_nothing_waits_for_it(no_host_sync: Any) -> None:
    """On fake CUDA tensors, which also refuse to meet one of the CPU: the operators' own code, and all around them."""
    with FakeTensorMode(), torch.device("cuda"), no_host_sync:
        mean, var = torch.empty(2, 6)
        *moments, total = operators._merge_op._init_fn(mean, var, 100, "")
        gradients = operators._merge_backward_op._init_fn(mean, var, mean, moments[0], 100 / total, "")
        for value in (*moments, *gradients):
            assert (value.shape, value.dtype, value.device.type) == ((6,), torch.float32, "cuda")
        bn = SyncBatchNorm(6, momentum=None)
        x = torch.empty(4, 6, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        for output in (bn(x), operators._compilable_batch_norm(x, bn.weight, bn.bias, bn.eps, "")[0]):
            assert (output.shape, output.dtype, output.device) == (x.shape, x.dtype, x.device)
            assert output.is_contiguous(memory_format=torch.channels_last)
        saved = SimpleNamespace(saved_tensors=(x, bn.weight, bn.bias, *moments, total), group=None, eps=bn.eps)
        saved.needs_input_grad = [True] * 3
        # The engine itself asks for a driver.
        with torch.no_grad():
            grads = operators._EagerBatchNorm.backward(saved, torch.empty_like(x))[:3]
        assert [(g.shape, g.dtype) for g in grads if g is not None] == [
            (t.shape, t.dtype) for t in (x, *bn.parameters())
        ]


def test_a_hidden_wait_is_found(no_host_sync: Any) -> None:
    """What torch's own synchronized batch norm does with its counts is an error here."""
    x, counts = torch.ones(3), torch.tensor([1, 0, 2])
    with no_host_sync:
        assert x[counts].shape == (3,)
        with pytest.raises(AssertionError, match="boolean mask"):
            x[counts > 0]
        with pytest.raises(AssertionError, match="boolean mask"):
            x[counts > 0] = x[:2]


def test_torchs_synchronized_batch_norm_is_replaced_too() -> None:
    """On a GPU it waits for it three times a layer, and torch.compile breaks the graph there."""
    module = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm1d(4))
    assert [type(m) for m in sync_batch_norm(module)] == [SyncBatchNorm] * 2


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
