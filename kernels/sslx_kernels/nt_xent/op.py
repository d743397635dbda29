"""NT-Xent as one custom operator with a gradient, which is opaque to ``torch.compile``.

    s_ij = cos(row_i, column_j)
    l_i = sum of exp(s_ij / T) over the negatives j, which are neither row i itself nor its positive p(i)
    loss_i = softplus(log l_i - s_ip / T),  loss = mean_i loss_i

The positive stays out of the sum, because l_i is a small part of the softmax denominator when a batch has converged,
and rounding would lose it there.

Names and shapes in all implementations:

    N, M, D         numbers of rows and of columns, and their length
    rows            (N, D), prepared for the matrix products: ``Rows(x, scales)``
    columns         (M, D), likewise; None if they are the rows
    excluded        the columns that are not negatives of a row, see ``rows.Excluded``
    denominators    (N,), L_i = l_i + exp(s_ip / T), the softmax denominator, stored as 1 / L_i or as a logarithm
    negative_probs  (N,), l_i / L_i = 1 - softmax_i(p), the probability of the negatives
    shift_free      whether no sum of exp(s / T) can overflow, so that the largest exponent need not be subtracted
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sslx_kernels.nt_xent import tiled
from sslx_kernels.nt_xent.rows import Block, Excluded, Rows

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol):
    """The functions of an implementation.  ``tiled`` documents each of them."""

    def prepared_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def saved_like(self, rows: Tensor) -> tuple[Tensor, Tensor]: ...
    def inverse(self, temperature: Tensor) -> Tensor: ...
    def prepare(self, z1: Tensor, z2: Tensor | None = None) -> Rows: ...
    def prepare_received(self, x: Tensor) -> Rows: ...
    def sums(
        self, rows: Rows, columns: Rows | None, excluded: Excluded, inverse_temperature: Tensor, shift_free: bool
    ) -> tuple[Tensor, ...]: ...
    def loss_from_sums(
        self,
        rows: Rows,
        columns: Rows | None,
        excluded: Excluded,
        all_sums: Sequence[tuple[Tensor, ...]],
        inverse_temperature: Tensor,
        shift_free: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def gradient(
        self,
        rows: Rows,
        blocks: Sequence[Block],
        denominators: Tensor,
        negative_probs: Tensor,
        upstream: Tensor,
        inverse_temperature: Tensor,
        shift_free: bool,
        needs_columns: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]: ...


def kernel(impl: str) -> Kernel:
    """Return the implementation with this name, "tiled" or "fused"."""
    if impl == "fused":
        from sslx_kernels.nt_xent import fused  # imports triton

        return cast(Kernel, fused)
    assert impl == "tiled", impl
    return cast(Kernel, tiled)


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an operator's function so that it runs without autocast, which would otherwise apply inside it."""

    @functools.wraps(function)
    def without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return without_autocast


def temperature_gradient(parts: Tensor, temperature: Tensor, is_needed: bool) -> Tensor:
    """Return the temperature's gradient (), the sum of ``parts``, or an empty tensor if it is not needed."""
    return parts.sum().to(temperature.dtype) if is_needed else temperature.new_empty(0)


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
    """Return the loss (), followed by the tensors that the backward needs.

    These are the prepared rows (N, D) and columns (M, D), denominators and negative_probs (N,), and the scales of rows
    and columns.  The tensors of columns are empty if the columns are the rows.
    """
    k = kernel(impl)
    prepared_rows = k.prepare(rows)
    prepared_columns = None if columns is None else k.prepare(columns)
    if prepared_columns is None:
        index = torch.arange(len(rows), device=rows.device)
        is_valid = (self_column == index) & (positive_column[positive_column] == index)
        torch.ops.aten._assert_async.msg(
            is_valid.all(), "expected positives in pairs and self_column = 0, 1, ... if the columns are the rows"
        )
    excluded, inverse = (self_column, positive_column), k.inverse(temperature)
    sums = k.sums(prepared_rows, prepared_columns, excluded, inverse, shift_free)
    loss, denominators, negative_probs = k.loss_from_sums(
        prepared_rows, prepared_columns, excluded, [sums], inverse, shift_free
    )
    x, row_scales = prepared_rows
    y, column_scales = prepared_columns or (x.new_empty(0), row_scales.new_empty(0))
    return loss, x, y, denominators, negative_probs, row_scales, column_scales


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
    row_scales, per_row = k.saved_like(rows)
    column_scales = row_scales.new_empty(0) if columns is None else k.saved_like(columns)[0]
    return rows.new_empty((), dtype=dtype), x, y, per_row, torch.empty_like(per_row), row_scales, column_scales


@torch.library.custom_op("sslx_kernels::nt_xent_backward", mutates_args=())
@in_full_precision
def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    denominators: Tensor,
    negative_probs: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: Tensor,
    shift_free: bool,
    impl: str,
    needs_columns: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows (N, D), columns (M, D) and temperature (), the first two in at least fp32.

    x, ..., column_scales: saved by the forward.  Gradients of columns and temperature are empty if not needed.
    """
    k, columns = kernel(impl), Rows(y, column_scales) if len(column_scales) else None
    blocks = [Block(columns, (self_column, positive_column))]
    inverse = k.inverse(temperature)
    dx, dy, temperature_parts = k.gradient(
        Rows(x, row_scales), blocks, denominators, negative_probs, gradient, inverse, shift_free, needs_columns
    )
    dt = temperature_gradient(temperature_parts, temperature, needs_temperature)
    return dx, dx.new_empty(0) if dy is None else dy, dt


@backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    x: Tensor,
    y: Tensor,
    denominators: Tensor,  # noqa: ARG001
    negative_probs: Tensor,  # noqa: ARG001
    row_scales: Tensor,  # noqa: ARG001
    column_scales: Tensor,  # noqa: ARG001
    self_column: Tensor,  # noqa: ARG001
    positive_column: Tensor,  # noqa: ARG001
    temperature: Tensor,
    shift_free: bool,  # noqa: ARG001
    impl: str,  # noqa: ARG001
    needs_columns: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy = y.new_empty(y.shape if needs_columns else 0, dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), dy, temperature.new_empty(() if needs_temperature else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, self_column, positive_column, temperature, ctx.shift_free, ctx.impl = inputs
    ctx.dtype, ctx.symmetric = rows.dtype, columns is None
    ctx.mark_non_differentiable(*output[1:5])  # the scales stay differentiable, so that a second derivative raises
    ctx.save_for_backward(*output[1:], self_column, positive_column, temperature)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs_columns = not ctx.symmetric and ctx.needs_input_grad[1]
    needs_temperature = ctx.needs_input_grad[4]
    dx, dy, dt = backward(gradient, *ctx.saved_tensors, ctx.shift_free, ctx.impl, needs_columns, needs_temperature)
    d_columns = dy.to(ctx.dtype) if needs_columns else None
    return dx.to(ctx.dtype), d_columns, None, None, dt if needs_temperature else None, None, None


def no_second_derivative(*_: Any) -> None:
    """Raise the RuntimeError for a second derivative."""
    raise RuntimeError(
        "NT-Xent has no second derivative: call backward() without create_graph, or use impl='reference'"
    )


forward.register_autograd(_backward, setup_context=_setup_context)
backward.register_autograd(no_second_derivative)
