"""NT-Xent as an operator: same bits, compiled, without waiting or large tensors; and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing as dynamo_testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kit.nt_xent import DEVICE, FAST, NATIVE, cast, make
from sslx_kernels.nt_xent import nt_xent, op, tiled


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_the_same_bits_each_time_and_a_backward_that_may_be_repeated(
    generator: torch.Generator, impl: Any, temperature: float
) -> None:
    rows, _, own, positive = cast(make(generator, size=100, dim=32), NATIVE[impl])
    leaf = rows.requires_grad_()
    losses = [nt_xent(leaf, leaf, own, positive, temperature, impl) for _ in range(2)]
    assert torch.equal(*losses)
    first, again, other = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (losses[0], *losses))
    assert torch.equal(first, again)
    assert torch.equal(first, other)
    weight = torch.tensor(-3.0, device=DEVICE).expand(())
    torch.testing.assert_close(
        torch.autograd.grad(losses[0], leaf, weight)[0], -3 * first, rtol=0.01 if impl == "fused" else 1e-5, atol=1e-6
    )


def test_only_what_needs_a_gradient_gets_one(generator: torch.Generator) -> None:
    rows, columns, own, positive = make(generator, num=4)
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(rows, columns, own, positive, t, "tiled")
    truth = nt_xent(rows, columns, own, positive, t, "reference")
    torch.testing.assert_close(torch.autograd.grad(loss, t), torch.autograd.grad(truth, t))
    assert not nt_xent(rows, columns, own, positive, 0.1, "tiled").requires_grad


def test_a_second_derivative_is_refused(generator: torch.Generator) -> None:
    rows, _, own, positive = make(generator)
    leaf = rows.requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(leaf, leaf, own, positive, 0.1, "tiled"), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("same", [True, False])
def test_the_operators_pass_torchs_own_checks(generator: torch.Generator, same: bool) -> None:
    rows, columns, own, positive = make(generator, num=None if same else 6)
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    given = None if same else columns.requires_grad_()
    arguments = (rows.requires_grad_(), given, own, positive, t, True, "tiled")
    torch.library.opcheck(op.forward, arguments)
    with torch.no_grad():
        _, *saved = op.forward(*arguments)
    one = torch.ones((), dtype=torch.float64)
    torch.library.opcheck(op.backward, (one, *saved, own, positive, t.detach(), True, "tiled", not same, True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["tiled", "fused"])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_a_cuda_graph_replays_it_on_new_rows(generator: torch.Generator, impl: Any, temperature: float) -> None:
    rows, _, own, positive = cast(make(generator, size=600, dim=64), NATIVE[impl])
    leaf = rows.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = nt_xent(leaf, leaf, own, positive, temperature, impl)
        return loss, torch.autograd.grad(loss, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    with torch.no_grad():
        leaf.copy_(leaf.flip(1) * 2)
    graph.replay()
    expected = step()
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_a_compiled_model_holds_it_whole_and_compiles_once(generator: torch.Generator) -> None:
    rows, _, own, positive = cast(make(generator, size=8, dim=6), torch.float32)
    weight = torch.eye(6, requires_grad=True)
    counter = dynamo_testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor) -> Tensor:
        z = x @ weight
        return nt_xent(z, z, own, positive, 0.1)

    for _ in range(3):
        x = torch.randn(rows.shape, generator=generator)
        weight.grad = None
        step(x).backward()
        z = (x @ weight.detach()).requires_grad_()
        nt_xent(z, z, own, positive, 0.1).backward()
        torch.testing.assert_close(weight.grad, x.T @ z.grad)
    assert counter.frame_count == 1


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_no_tensor_is_larger_than_a_tile_for_each_core(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, no_host_sync: Any, temperature: float
) -> None:
    """The operators' own code, for a dispatch mode does not see what an operator does inside."""
    monkeypatch.setattr(tiled, "TILE", 32)
    rows, _, own, positive = cast(make(generator, size=100, dim=4), torch.float32)
    t = torch.tensor(temperature)
    with Largest() as largest, no_host_sync:
        _, *saved = op.forward._init_fn(rows, None, own, positive, t, temperature > 0.01, "tiled")
        op.backward._init_fn(torch.ones(()), *saved, own, positive, t, temperature > 0.01, "tiled", False, True)
    assert 25 * 25 <= largest.numel <= torch.get_num_threads() * 32 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows"),
        ({"rows": torch.zeros(4, 2)}, r"\(4, 2\) and \(4, 3\)"),
        ({"rows": torch.zeros(0, 3)}, r"\(0, 3\) and \(4, 3\)"),
        ({"rows": torch.zeros(4, 3, dtype=torch.int64)}, "floats"),
        ({"self_column": torch.arange(3)}, "self_column"),
        ({"positive_column": torch.arange(4).int()}, "positive_column.*int32"),
        ({"temperature": 0.0}, "positive temperature, got 0.0"),
        ({"temperature": -0.1}, "positive temperature, got -0.1"),
        ({"temperature": math.nan}, "positive temperature, got nan"),
        ({"temperature": math.inf}, "positive temperature, got inf"),
        ({"temperature": torch.ones(2)}, "one floating-point element"),
        ({"temperature": torch.ones((), dtype=torch.int64)}, "one floating-point element"),
        ({"temperature": torch.ones(()), "min_temperature": -1.0}, "positive temperature, got -1.0"),
        ({"impl": "fastest"}, "one of auto, reference, tiled, fused, got 'fastest'"),
        ({"impl": "fused", "rows": torch.zeros(4, 3).double()}, "impl='fused' .*got (cpu|torch.float64)"),
        ({"columns": torch.zeros(4, 3, device="meta")}, "one device, got cpu, meta"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    index = torch.arange(4)
    good = {"rows": torch.ones(4, 3), "columns": torch.ones(4, 3), "self_column": index}
    with pytest.raises(ValueError, match=message) as raised:
        nt_xent(**{**good, "positive_column": index.flip(0), "temperature": 0.1, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["self", "positive"])
def test_one_tensor_as_rows_and_columns_needs_pairs(wrong: str) -> None:
    z, own = torch.ones(6, 3), torch.arange(6)
    positive = own.roll(1 if wrong == "positive" else 3)
    with pytest.raises(RuntimeError, match="expected positives in pairs"):
        nt_xent(z, z, own.flip(0) if wrong == "self" else own, positive, 0.1, "tiled")
    copy: Callable[[], Tensor] = z.clone
    assert nt_xent(z, copy(), own, own.roll(1), 0.1, "tiled").item() == pytest.approx(math.log(5))
