"""NT-Xent as one operator with a gradient, which ``torch.compile`` does not look into.

    l_i = sum of exp(s_ij / T) over the columns j that are neither row i itself nor its positive p(i)
    loss_i = softplus(log l_i - s_ip / T)

The positive is kept out of the sum: for a batch that has converged, l_i is a small part of the softmax's
denominator, and would drown in it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sslx_kernels.nt_xent import tiled
from sslx_kernels.nt_xent.rows import Block, Rows, Skip

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol):
    """What an implementation gives; ``tiled`` says what each function does."""

    def prepared_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def kept_like(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...
    def inverse(self, temperature: Tensor) -> Tensor: ...
    def prepare(self, z1: Tensor, z2: Tensor | None = None) -> Rows: ...
    def received(self, x: Tensor) -> Rows: ...
    def sums(
        self, rows: Rows, columns: Rows | None, skip: Skip, inverse_temperature: Tensor, shift_free: bool
    ) -> tuple[Tensor, ...]: ...
    def finish(
        self,
        rows: Rows,
        columns: Rows | None,
        skip: Skip,
        all_sums: Sequence[tuple[Tensor, ...]],
        inverse_temperature: Tensor,
        shift_free: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def gradient(
        self,
        rows: Rows,
        blocks: Sequence[Block],
        denominators: Tensor,
        missed: Tensor,
        upstream: Tensor,
        inverse_temperature: Tensor,
        shift_free: bool,
        columns_too: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]: ...


def kernel(impl: str) -> Kernel:
    """The implementation of this name: "tiled" or "fused"."""
    if impl == "fused":
        from sslx_kernels.nt_xent import fused  # imports triton

        return cast(Kernel, fused)
    assert impl == "tiled", impl
    return cast(Kernel, tiled)


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off: it reaches into an operator's own code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def of_temperature(shares: Tensor, temperature: Tensor, wanted: bool) -> Tensor:
    """The temperature's gradient from its shares; empty unless it is wanted."""
    return shares.sum().to(temperature.dtype) if wanted else temperature.new_empty(0)


@torch.library.custom_op("sslx_kernels::nt_xent", mutates_args=())
@in_full_precision
def forward(
    rows: Tensor,
    columns: Tensor | None,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: Tensor,
    shift_free: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the backward needs comes after the loss ().

    Prepared rows (N, D) and columns, denominators and 1 - softmax (N,), scales of rows and columns; those of columns
    are empty where columns are rows.
    """
    k = kernel(impl)
    a, b = k.prepare(rows), None if columns is None else k.prepare(columns)
    if b is None:
        index = torch.arange(len(rows), device=rows.device)
        ours = (self_column == index) & (positive_column[positive_column] == index)
        torch.ops.aten._assert_async.msg(
            ours.all(), "expected positives in pairs, and self_column = 0, 1, ..., where columns are rows"
        )
    skip, inverse = (self_column, positive_column), k.inverse(temperature)
    sums = k.sums(a, b, skip, inverse, shift_free)
    loss, denominators, missed = k.finish(a, b, skip, [sums], inverse, shift_free)
    y, of_columns = (a.x.new_empty(0), a.scales.new_empty(0)) if b is None else b
    return loss, a.x, y, denominators, missed, a.scales, of_columns


@forward.register_fake
def _(
    rows: Tensor,
    columns: Tensor | None,
    self_column: Tensor,  # noqa: ARG001
    positive_column: Tensor,  # noqa: ARG001
    temperature: Tensor,  # noqa: ARG001
    shift_free: bool,  # noqa: ARG001
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, dtype = kernel(impl), torch.promote_types(rows.dtype, torch.float32)
    x = rows.new_empty(rows.shape, dtype=k.prepared_dtype(rows.dtype))
    y = x.new_empty(0) if columns is None else x.new_empty(columns.shape)
    of_rows, per_row = k.kept_like(rows)
    of_columns = of_rows.new_empty(0) if columns is None else k.kept_like(columns)[0]
    return rows.new_empty((), dtype=dtype), x, y, per_row, torch.empty_like(per_row), of_rows, of_columns


@torch.library.custom_op("sslx_kernels::nt_xent_backward", mutates_args=())
@in_full_precision
def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    denominators: Tensor,
    missed: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: Tensor,
    shift_free: bool,
    impl: str,
    columns_too: bool,
    temperature_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows (N, D), columns (M, D) and temperature (), the first two in fp32 or more; the last two are
    empty if not asked for.

    x to of_columns: what the forward returned.
    """
    k, columns = kernel(impl), Rows(y, of_columns) if len(of_columns) else None
    blocks = [Block(columns, (self_column, positive_column))]
    inverse = k.inverse(temperature)
    dx, dy, shares = k.gradient(
        Rows(x, of_rows), blocks, denominators, missed, gradient, inverse, shift_free, columns_too
    )
    dt = of_temperature(shares, temperature, temperature_too)
    return dx, dx.new_empty(0) if dy is None else dy, dt


@backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    x: Tensor,
    y: Tensor,
    denominators: Tensor,  # noqa: ARG001
    missed: Tensor,  # noqa: ARG001
    of_rows: Tensor,  # noqa: ARG001
    of_columns: Tensor,  # noqa: ARG001
    self_column: Tensor,  # noqa: ARG001
    positive_column: Tensor,  # noqa: ARG001
    temperature: Tensor,
    shift_free: bool,  # noqa: ARG001
    impl: str,  # noqa: ARG001
    columns_too: bool,
    temperature_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy = y.new_empty(y.shape if columns_too else 0, dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), dy, temperature.new_empty(() if temperature_too else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, self_column, positive_column, temperature, ctx.shift_free, ctx.impl = inputs
    ctx.dtype, ctx.symmetric = rows.dtype, columns is None
    ctx.mark_non_differentiable(*output[1:5])  # the scales tie a second derivative to here, where it is refused
    ctx.save_for_backward(*output[1:], self_column, positive_column, temperature)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    columns_too = not ctx.symmetric and ctx.needs_input_grad[1]
    temperature_too = ctx.needs_input_grad[4]
    dx, dy, dt = backward(gradient, *ctx.saved_tensors, ctx.shift_free, ctx.impl, columns_too, temperature_too)
    d_columns = dy.to(ctx.dtype) if columns_too else None
    return dx.to(ctx.dtype), d_columns, None, None, dt if temperature_too else None, None, None


def no_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "NT-Xent has no second derivative: expected backward() without create_graph, or impl='reference'"
    )


forward.register_autograd(_backward, setup_context=_save)
backward.register_autograd(no_second_derivative)
