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
from torch.nn import functional as F

from sslx_kernels.nt_xent import tiled
from sslx_kernels.nt_xent.tiled import EPS, factors

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Protocol):
    """What an implementation gives; ``tiled`` says what each function does."""

    def prepared_dtype(self, dtype: torch.dtype) -> torch.dtype: ...
    def prepare(self, z: Tensor, factor: Tensor) -> Tensor: ...
    def unit(self, x: Tensor) -> Tensor: ...
    def log_sums(
        self, x: Tensor, y: Tensor | None, skip: Sequence[Tensor], inverse_temperature: Tensor, shift_free: bool
    ) -> Tensor: ...
    def gradients(
        self,
        x: Tensor,
        y: Tensor | None,
        skip: Sequence[Tensor],
        inverse_temperature: Tensor,
        shift_free: bool,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor] | None,
        columns_too: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...


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


def tail(
    x: Tensor, positive: Tensor, log_negatives: Tensor, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums over negatives to the loss.

    x, positive: (N, D) unit rows, and the unit column that is the positive of each.  log_negatives: (N,), log l_i.
    Returns (mean loss (), the log of softmax's denominator, with the positive in it (N,), 1 - softmax (N,)); the
    last two in fp64.
    """
    logit = torch.linalg.vecdot(x, positive).double() * inverse_temperature
    margin = log_negatives - logit
    # softplus with its threshold: log1p(exp(x)) is x to fp64's last bit from 40 on.
    return F.softplus(margin, threshold=40).mean().to(x.dtype), torch.logaddexp(log_negatives, logit), margin.sigmoid()


def through_unit_(d: Tensor, u: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scale·d, the gradient (N, D) of the unit rows u, into that of the raw ones, which ``factor`` (N, 1) scaled.

    Returns (d, which holds it now, the sum of <scale·d_i, u_i> over rows () in fp64).
    """
    along = torch.linalg.vecdot(u, d.mul_(scale.to(d.dtype)))[:, None]
    # A row shorter than EPS was only scaled: nothing is projected out.
    d.addcmul_(u, torch.where(factor < 1 / EPS, along, 0), value=-1).mul_(factor.to(d.dtype))
    return d, along.double().sum()


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

    Prepared rows (N, D) and columns, log denominators and 1 - softmax (N,), factors of rows (N, 1) and columns; those
    of columns are empty where columns are rows.
    """
    k = kernel(impl)
    of_rows = factors(rows)
    x = k.prepare(rows, of_rows)
    of_columns = of_rows.new_empty(0) if columns is None else factors(columns)
    y = x.new_empty(0) if columns is None else k.prepare(columns, of_columns)
    if columns is None:
        index = torch.arange(len(x), device=x.device)
        ours = (self_column == index) & (positive_column[positive_column] == index)
        torch.ops.aten._assert_async.msg(
            ours.all(), "expected positives in pairs, and self_column = 0, 1, ..., where columns are rows"
        )
    inverse = 1 / temperature.double()
    log_negatives = k.log_sums(x, None if columns is None else y, (self_column, positive_column), inverse, shift_free)
    u = k.unit(x)
    positive = (u if columns is None else k.unit(y))[positive_column]
    loss, log_all, missed = tail(u, positive, log_negatives, inverse)
    return loss, x, y, log_all, missed, of_rows, of_columns


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
    dtype = torch.promote_types(rows.dtype, torch.float32)
    x = rows.new_empty(rows.shape, dtype=kernel(impl).prepared_dtype(rows.dtype))
    y = x.new_empty(0) if columns is None else x.new_empty(columns.shape)
    per_row = rows.new_empty(len(rows), dtype=torch.float64)
    of_rows = per_row.new_empty(len(rows), 1)
    of_columns = per_row.new_empty(0) if columns is None else per_row.new_empty(len(columns), 1)
    return rows.new_empty((), dtype=dtype), x, y, per_row, torch.empty_like(per_row), of_rows, of_columns


@torch.library.custom_op("sslx_kernels::nt_xent_backward", mutates_args=())
@in_full_precision
def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    log_all: Tensor,
    missed: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: Tensor,
    shift_free: bool,
    impl: str,
    columns_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows (N, D), columns ((M, D), or empty if not asked for), in fp32 or more, and temperature ().

    x to of_columns: what the forward returned.
    """
    k, inverse, skip = kernel(impl), 1 / temperature.double(), (self_column, positive_column)
    whole = (torch.ones_like(log_all), log_all)
    u = k.unit(x)
    scale = gradient.double() * inverse / len(x)
    symmetric = len(of_columns) == 0
    if symmetric:
        dx, dy = k.gradients(x, None, skip, inverse, shift_free, whole, None)
        dx.addcmul_((missed + missed[positive_column])[:, None].to(u.dtype), u[positive_column], value=-1)
    else:
        dx, dy = k.gradients(x, y, skip, inverse, shift_free, whole, None, columns_too)
        v, part = k.unit(y), missed[:, None].to(u.dtype)
        dx.addcmul_(part, v[positive_column], value=-1)
        if dy is not None:  # two rows may share a positive; index_put_ adds in a fixed order, index_add_ in any
            dy.index_put_((positive_column,), -part * u, accumulate=True)
            dy, _ = through_unit_(dy, v, of_columns, scale)
    dx, share = through_unit_(dx, u, of_rows, scale)
    # Where the rows are the columns too, each similarity is counted in both its rows' gradients.
    d_temperature = share * inverse * (-0.5 if symmetric else -1.0)
    return dx, dx.new_empty(0) if dy is None else dy, d_temperature.to(temperature.dtype)


@backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    x: Tensor,
    y: Tensor,
    log_all: Tensor,  # noqa: ARG001
    missed: Tensor,  # noqa: ARG001
    of_rows: Tensor,  # noqa: ARG001
    of_columns: Tensor,  # noqa: ARG001
    self_column: Tensor,  # noqa: ARG001
    positive_column: Tensor,  # noqa: ARG001
    temperature: Tensor,
    shift_free: bool,  # noqa: ARG001
    impl: str,  # noqa: ARG001
    columns_too: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy = y.new_empty(y.shape if columns_too else 0, dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), dy, torch.empty_like(temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, self_column, positive_column, temperature, ctx.shift_free, ctx.impl = inputs
    ctx.dtype, ctx.symmetric = rows.dtype, columns is None
    ctx.mark_non_differentiable(*output[1:5])  # the factors tie a second derivative to here, where it is refused
    ctx.save_for_backward(*output[1:], self_column, positive_column, temperature)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    columns_too = not ctx.symmetric and ctx.needs_input_grad[1]
    dx, dy, dt = backward(gradient, *ctx.saved_tensors, ctx.shift_free, ctx.impl, columns_too)
    d_columns = dy.to(ctx.dtype) if columns_too else None
    return dx.to(ctx.dtype), d_columns, None, None, dt if ctx.needs_input_grad[4] else None, None, None


def no_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "NT-Xent has no second derivative: expected backward() without create_graph, or impl='reference'"
    )


forward.register_autograd(_backward, setup_context=_save)
backward.register_autograd(no_second_derivative)
