"""NT-Xent over rows and columns: every implementation against the definition, written as two loops, and against fp64.

The Triton kernels run here on a GPU, and without one in Triton's interpreter, in a process of its own (the last test).
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kit.nt_xent import DEVICE, FAST, INTERPRETED, NATIVE, TOLERANCE, by_loops, cast, close, exact, make, raw_gradient
from kit.python import python
from sslx_kernels.nt_xent import nt_xent, smallest_shift_free_temperature, tiled


@pytest.mark.parametrize("impl", ["auto", "reference", *FAST])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.05, 0.01, 0.001])
@pytest.mark.parametrize(("first", "num"), [(0, None), (3, 4), (9, 1)])
def test_is_the_definition(
    generator: torch.Generator, impl: Any, temperature: float, first: int, num: int | None
) -> None:
    arguments = make(generator, first=first, num=num)
    dtype = torch.float16 if impl == "fused" else torch.float64
    tolerance = 2e-6 if impl == "fused" else 1e-12
    if impl == "fused":
        arguments = cast(arguments, dtype)
    expected = pytest.approx(by_loops(*arguments, temperature), rel=tolerance, abs=tolerance / temperature)
    assert nt_xent(*cast(arguments, dtype), temperature, impl).item() == expected
    tensor = torch.tensor([temperature], dtype=torch.float64, device=DEVICE)
    assert nt_xent(*cast(arguments, dtype), tensor, impl).item() == expected
    assert nt_xent(*cast(arguments, dtype), tensor, impl, min_temperature=temperature).item() == expected


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_the_mean_of_both_directions_is_clips_loss(generator: torch.Generator, impl: Any) -> None:
    a, b = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    leaves, copies = ([x.clone().requires_grad_() for x in (a, b)] for _ in range(2))
    logits = F.normalize(copies[0], dim=1) @ F.normalize(copies[1], dim=1).T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    own, none = torch.arange(8), torch.full((8,), -1)
    images, texts = leaves
    loss = (nt_xent(images, texts, none, own, 0.07, impl) + nt_xent(texts, images, none, own, 0.07, impl)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, copies))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("temperature", [0.2, 0.001])
@pytest.mark.parametrize("same", [True, False])
def test_gradients_are_those_of_finite_differences(
    generator: torch.Generator, impl: Any, temperature: float, same: bool
) -> None:
    rows, columns, own, positive = make(generator, first=0 if same else 2, num=None if same else 5)
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)

    def loss(t: Tensor, rows: Tensor, *columns: Tensor) -> Tensor:
        return nt_xent(rows, columns[0] if columns else rows, own, positive, t, impl)

    inputs = (rows.clone().requires_grad_(), *(() if same else (columns.clone().requires_grad_(),)))
    assert torch.autograd.gradcheck(loss, (t, *inputs))


def test_rows_that_share_a_positive_and_columns_that_hold_no_row(generator: torch.Generator) -> None:
    """InfoNCE between two sets; its gradient for the columns adds up where rows share one."""
    rows, columns = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    nobody, positive = torch.full((6,), -1), torch.tensor([0, 3, 3, 3, 8, 0])
    found: list[tuple[Tensor, ...]] = []
    for impl in ("reference", "tiled"):
        leaves = [x.double().requires_grad_() for x in (rows, columns, torch.tensor(0.1))]
        loss = nt_xent(leaves[0], leaves[1], nobody, positive, leaves[2], impl)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert found[0][0].item() == pytest.approx(by_loops(rows, columns, nobody, positive, 0.1), rel=1e-6)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("temperature", [0.1, 0.012])
def test_columns_have_the_gradient_of_the_definition(generator: torch.Generator, impl: Any, temperature: float) -> None:
    """On both sides of the switch."""
    rows, columns, own, positive = cast(make(generator, size=70, dim=20, first=33, num=70), NATIVE[impl])
    leaves = [columns.double().requires_grad_(), columns.clone().requires_grad_()]
    truth = nt_xent(rows.double(), leaves[0], own, positive, temperature, "reference")
    ours = nt_xent(rows, leaves[1], own, positive, temperature, impl)
    pairs = [(a.item(), torch.autograd.grad(a, b)[0]) for a, b in zip((ours, truth), leaves[::-1], strict=True)]
    close(pairs[0], pairs[1], 5e-6 if impl == "tiled" else 4e-3)  # the gradient itself comes back in bf16


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_closed_forms(impl: Any) -> None:
    size, temperature = 4, 0.5
    own = torch.arange(2 * size, device=DEVICE)
    positive = (own + size) % (2 * size)
    equal = torch.ones(2 * size, 3, device=DEVICE, dtype=NATIVE[impl]).requires_grad_()
    loss = nt_xent(equal, equal, own, positive, temperature, impl)
    assert loss.item() == pytest.approx(math.log(2 * size - 1), rel=1e-6)
    assert torch.autograd.grad(loss, equal)[0].abs().max() < (1e-7 if impl != "fused" else 1e-4)
    pairs = torch.eye(size, device=DEVICE, dtype=NATIVE[impl]).repeat(2, 1)
    expected = math.log(1 + (2 * size - 2) * math.exp(-1 / temperature))
    assert nt_xent(pairs, pairs, own, positive, temperature, impl).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_invariances(generator: torch.Generator, impl: Any) -> None:
    rows, _, own, positive = cast(make(generator, size=20, dim=7), torch.float32)
    lengths = torch.rand(len(rows), 1, generator=generator).to(DEVICE) * 10 + 0.1
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator))[0].to(DEVICE)
    loss = nt_xent(rows, rows, own, positive, 0.1, impl).item()
    for other in (rows * lengths, rows @ rotation, rows.roll(20, 0)):
        assert nt_xent(other, other, own, positive, 0.1, impl).item() == pytest.approx(loss, rel=2e-6)
    leaf = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(leaf, leaf, own, positive, 0.1, impl), leaf)
    assert torch.linalg.vecdot(gradient, rows).abs().max() < 1e-6


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.07, 0.02, 0.014, 0.0139, 0.01, 0.005])
def test_as_close_to_fp64_as_promised_on_both_sides_of_the_switch(
    generator: torch.Generator, impl: Any, temperature: float
) -> None:
    for num in (None, 50):
        arguments = cast(make(generator, size=80, dim=24, num=num), NATIVE[impl])
        tolerance = TOLERANCE[impl] * max(1, 0.05 / temperature)
        close(raw_gradient(arguments, temperature, impl), exact(arguments, temperature), tolerance)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_5e_4_of_fp64_on_the_same_input(
    generator: torch.Generator, impl: Any, converged: bool, dtype: torch.dtype
) -> None:
    """Also where training has converged: a dense matrix in bf16 is 4.8 % off there."""
    size, dim = 256, 128
    z = torch.randn(size, dim, generator=generator)
    z = torch.cat([z, z + (0.3 if converged else 2.0) * torch.randn(size, dim, generator=generator)])
    rows = z.to(DEVICE, dtype)
    own = torch.arange(2 * size, device=DEVICE)
    arguments = rows, rows, own, own.roll(size)
    truth = exact(arguments, 0.05)
    assert truth[0] < 1e-3 if converged else truth[0] > 0.1
    close(raw_gradient(arguments, 0.05, impl), truth, 5e-4)


@pytest.mark.parametrize("impl", FAST)
def test_the_switch_is_where_the_sums_stop_fitting(impl: Any) -> None:
    """All columns alike, or all opposite: the largest and the smallest sums there are."""
    lowest = smallest_shift_free_temperature(4_000_000, torch.float32)
    assert 0.0135 < lowest < 0.014
    assert smallest_shift_free_temperature(131_072, torch.float32) < lowest
    limits = torch.finfo(torch.float32)
    assert math.log(4e6) + 1 / lowest < math.log(limits.max)
    assert math.log(4e6) + 1 / (0.985 * lowest) > -math.log(limits.tiny)
    temperature = smallest_shift_free_temperature(64, torch.float32)
    for sign in (1.0, -1.0):
        rows, columns = (torch.ones(n, 3, device=DEVICE, dtype=NATIVE[impl]) for n in (2, 64))
        columns *= sign
        columns[1] *= -1
        index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        arguments = (rows, columns, index - 1, index)
        loss, gradient = raw_gradient(arguments, temperature, impl)
        assert loss == pytest.approx(exact(arguments, temperature)[0], rel=1e-5)
        assert gradient.abs().max() < 0.1  # of parallel rows: none, but for rounding times 1 / T


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_anti_aligned_positives_and_antipodal_clusters(impl: Any) -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], device=DEVICE, dtype=NATIVE[impl])
    own = torch.arange(4, device=DEVICE)
    assert nt_xent(z, z, own, own.roll(2), 0.005, impl).item() == pytest.approx(200 + math.log(2), rel=1e-6)
    clusters = torch.tensor([[1.0, 0.0]] * 4 + [[-1.0, 0.0]] * 4, device=DEVICE, dtype=NATIVE[impl]).requires_grad_()
    own = torch.arange(8, device=DEVICE)
    loss = nt_xent(clusters, clusters, own, own.roll(4), 0.01, impl)
    assert loss.item() == pytest.approx(200 + math.log(3), rel=1e-6)
    assert torch.autograd.grad(loss, clusters)[0].isfinite().all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129])
def test_sizes_around_every_edge(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, impl: Any, size: int
) -> None:
    monkeypatch.setattr(tiled, "TILE", 32)
    for num in (None, min(size, 40)):
        arguments = cast(
            make(generator, size=size, dim=8, first=0 if num is None else size // 2, num=num), NATIVE[impl]
        )
        for temperature in (0.1, 0.01):
            # Of two rows one may have lost already: then all the gradient there is are weights that fp16 lacks.
            floor = size**0.5 * 2**-38 / temperature if impl == "fused" else 1e-12
            close(raw_gradient(arguments, temperature, impl), exact(arguments, temperature), 6 * TOLERANCE[impl], floor)


@pytest.mark.parametrize("size", [500, 530])
def test_the_real_tile_is_crossed(generator: torch.Generator, size: int) -> None:
    assert 500 < tiled.TILE < 530
    arguments = cast(make(generator, size=size, dim=16), torch.float32)
    close(raw_gradient(arguments, 0.1, "tiled"), exact(arguments, 0.1), 5e-6)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dim", [1, 3, 16, 17, 96, 128, 200, 256, 512, 768, 1024])
@pytest.mark.parametrize("low", [False, True])
def test_dimensions(generator: torch.Generator, impl: Any, dim: int, low: bool) -> None:
    dtype = (torch.bfloat16 if low else torch.float16) if impl == "fused" else torch.bfloat16 if low else torch.float32
    if impl == "fused" and dim > 256:
        with pytest.raises(ValueError, match="at most 256 numbers"):
            nt_xent(*cast(make(generator, dim=dim), dtype), 0.1, impl)
        return
    arguments = cast(make(generator, size=20, dim=dim), dtype)
    if dim == 1:  # all cosines are 1 or -1 and stay so
        loss, gradient = raw_gradient(arguments, 0.1, impl)
        assert loss == pytest.approx(exact(arguments, 0.1)[0], rel=5e-6)
        assert (gradient * arguments[0]).abs().max() < (1e-5 if impl == "tiled" else 1e-3)
        return
    close(raw_gradient(arguments, 0.1, impl), exact(arguments, 0.1), TOLERANCE[impl])


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("length", [0.0, 1e-25, 1e20, 1e-20])
def test_rows_of_no_length_and_of_extreme_length(generator: torch.Generator, impl: Any, length: float) -> None:
    rows, _, own, positive = cast(make(generator), NATIVE[impl])
    direction = rows[3].double() / rows[3].double().norm()
    rows[3] = (length * direction).to(rows.dtype)
    if length:
        direction = rows[3].double() / rows[3].double().norm()  # as rounded
    units = F.normalize(rows.double(), dim=1)
    # Rows shorter than 1e-12 are divided by that; next to nothing is left of 1e-20 and less.
    units[3] = direction if length > 1e-12 else direction * length / 1e-12
    leaf = rows.clone().requires_grad_()
    loss = nt_xent(leaf, leaf, own, positive, 0.1, impl)
    logits = (units @ units.T / 0.1).fill_diagonal_(-torch.inf)
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits, positive).item(), rel=2e-6 if impl != "fused" else 3e-2
    )  # the direction itself is rounded to bf16
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_nan_and_inf_reach_the_loss(generator: torch.Generator, impl: Any, value: float, temperature: float) -> None:
    rows, columns, own, positive = cast(make(generator, first=1, num=3), NATIVE[impl])
    columns[9, 1] = value  # no row's own, no row's positive
    assert nt_xent(rows, columns, own, positive, temperature, impl).isnan()
    assert nt_xent(
        columns, columns, torch.arange(10, device=DEVICE), torch.arange(10, device=DEVICE).roll(5), temperature, impl
    ).isnan()


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_inside(generator: torch.Generator, impl: Any, dtype: torch.dtype) -> None:
    if impl == "fused" and dtype == torch.float32:
        return
    rows, columns, own, positive = cast(make(generator, size=16, dim=32, num=10), dtype)
    rows.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = nt_xent(rows, columns, own, positive, 0.1, impl)
    loss.backward()
    truth = exact((rows, columns, own, positive), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth[0], rel=2e-6)
    assert rows.grad is not None
    assert rows.grad.dtype == dtype
    assert (rows.grad.double() - truth[1]).norm() < 2 * torch.finfo(dtype).eps * truth[1].norm()


@pytest.mark.parametrize("impl", FAST)
def test_views_that_are_not_contiguous_or_not_aligned_and_mixed_dtypes(generator: torch.Generator, impl: Any) -> None:
    rows, columns, own, positive = cast(make(generator, size=9, dim=5, num=7), NATIVE[impl])
    truth = nt_xent(rows, columns, own, positive, 0.1, impl).item()
    transposed = rows.T.contiguous().T
    memory = torch.empty(rows.numel() + 1, device=DEVICE, dtype=rows.dtype)[1:].copy_(rows.reshape(-1)).view_as(rows)
    strided = torch.stack([columns, columns], dim=2).flatten(1)[:, ::2]
    for r, c in ((transposed, columns), (memory, strided), (rows.repeat(2, 1)[:7], columns)):
        assert nt_xent(r, c, own, positive, 0.1, impl).item() == pytest.approx(truth, rel=1e-6)
    if impl == "fused":
        return
    mixed = nt_xent(rows.bfloat16(), columns, own, positive, 0.1, impl)
    assert mixed.item() == pytest.approx(nt_xent(rows.bfloat16().float(), columns, own, positive, 0.1, impl).item())


@pytest.mark.parametrize("impl", FAST)
def test_fp16_under_a_loss_scale_of_65536(generator: torch.Generator, impl: Any) -> None:
    arguments = cast(make(generator, size=40, dim=32), torch.float16)
    leaf = arguments[0].clone().requires_grad_()
    (nt_xent(leaf, leaf, *arguments[2:], 0.5, impl) * 65536).backward()
    assert leaf.grad is not None
    truth = exact(arguments, 0.5)[1]
    assert (leaf.grad.double() / 65536 - truth).norm() < 1e-3 * truth.norm()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_the_triton_kernels_in_tritons_interpreter() -> None:
    others = "test_operator.py", "test_masks.py", "../losses/test_nt_xent.py"
    files = [__file__, *(Path(__file__).parent / name for name in others)]
    argv = ["-m", "pytest", "-q", "-k", "fused", "-m", "not gpu and not soak", *files]
    done = python(*argv, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
