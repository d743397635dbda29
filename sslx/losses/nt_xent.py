"""NT-Xent over the views of all ranks, SimCLR's loss (arXiv 2002.05709).

Each rank gathers all embeddings once.  While the gather is in flight, it computes its own rows against its own columns.
A row's gradient needs all columns and their M softmax denominators, which the forward gathers too.  So the backward
needs no collective, where a differentiable gather would send W times the embeddings back.
"""

from typing import Any

import torch
from torch import Tensor

from sslx import distributed
from sslx.distributed import Group
from sslx.errors import ConfigError
from sslx_kernels import nt_xent as kernels
from sslx_kernels.nt_xent import dense, op

Impl = kernels.Impl


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    group: Group = None,
    impl: Impl = "auto",
    min_temperature: float | None = None,
) -> Tensor:
    """Return NT-Xent (arXiv 2002.05709, equation 1), by which each of 2BW embeddings finds its positive.

    z1, z2: (B, D) each, this rank's embeddings of the two views of its B samples; any float dtype, not
      normalized.  The B of all ranks must be equal.  Computed in fp32 (fp64 for fp64), in autocast too.
    temperature: a positive float, or a tensor of one element that may require a gradient; a tensor's value is not
      read, so give its lower bound in ``min_temperature``: from 0.014 on, the sums are then cheaper.
    group: the ranks whose embeddings are the negatives; None for all.
    impl: the kernel (``sslx_kernels.nt_xent``); "auto" takes the fastest one for the input, "reference" the
      definition, which stores 2B × 2BW numbers.
    The mean is the paper's; its code (google-research/simclr) adds the means of both directions, which is twice this
    loss.  With LARS that does not change weights, but biases and norms, which it does not adapt, take half the step.
    Returns the mean over this rank's 2B embeddings, a scalar.  Its mean over ranks is the full-batch loss;
    the mean over ranks of every parameter gradient, the temperature's included, is the full-batch gradient, provided
    that all ranks give their loss the same weight.
    Raises ValueError for invalid shapes, dtypes, temperature or impl, ConfigError if there are no negatives, and
    DataError, on all ranks, for unequal B.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or 0 in z1.shape:
        raise ValueError(f"expected z1 and z2 of one shape (B, D), got {tuple(z1.shape)}, {tuple(z2.shape)}")
    if not (z1.is_floating_point() and z2.is_floating_point()):
        raise ValueError(f"expected z1 and z2 of floats, got {z1.dtype} and {z2.dtype}")
    if z1.dtype != z2.dtype:
        dtype = torch.promote_types(z1.dtype, z2.dtype)
        z1, z2 = z1.to(dtype), z2.to(dtype)
    lowest = kernels.lowest_temperature(temperature, min_temperature)
    chosen = kernels.choose(impl, z1)
    if chosen == "reference":
        return _by_definition(z1, z2, kernels.as_tensor(temperature, z1), group)
    if impl == "auto" and chosen == "tiled" and dense.fits(z1, lowest) and distributed.world_size(group) == 1:
        return dense.nt_xent(z1, z2, temperature)
    name = distributed.name_of(group)
    loss, *_ = _forward(z1, z2, kernels.as_tensor(temperature, z1), lowest, chosen, name)
    return loss


def _by_definition(z1: Tensor, z2: Tensor, temperature: Tensor, group: Group) -> Tensor:
    """Compute the loss by autograd on the N×M matrix and a differentiable gather, sharing no code with the kernels."""
    size = _checked_size(z1, group)
    z = torch.cat([z1, z2])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    own, positive = _layout(size, z.device)
    first = distributed.rank(group) * 2 * size
    columns = distributed.all_gather_grad(z, group)
    return kernels.nt_xent(z, columns, first + own, first + positive, temperature, "reference")


def _checked_size(z1: Tensor, group: Group) -> int:
    distributed.check_same(len(z1), "batch size of NT-Xent", group)
    if len(z1) * distributed.world_size(group) < 2:
        raise ConfigError(f"NT-Xent has no negatives: expected 2 samples or more, got {len(z1)}")
    return len(z1)


def _layout(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the column of each of this rank's rows [z1; z2], and that of its positive, among this rank's columns."""
    own = torch.arange(2 * size, device=device)
    return own, (own + size) % (2 * size)


def _others(columns: Tensor, num_own: int, group: Group) -> list[slice]:
    """Return the slices of ``columns`` (rank-major) that come from other ranks."""
    first = distributed.rank(group) * num_own
    return [part for part in (slice(first), slice(first + num_own, len(columns))) if part.stop > (part.start or 0)]


@torch.library.custom_op("sslx::nt_xent", mutates_args=())
@op.in_full_precision
def _forward(
    z1: Tensor, z2: Tensor, temperature: Tensor, lowest: float, impl: str, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (), followed by what the backward needs.

    Of all ranks: the prepared rows (M, D), their scales if other ranks have any, and their denominators (M,).  Of this
    rank: 1 - softmax (N,) and the rows' scales.  lowest: the lower bound of the temperature, 0 if it is unknown.
    """
    group, k = distributed.group_named(group_name), op.kernel(impl)
    _checked_size(z1, group)
    rows = k.prepare(z1, z2)
    gather = distributed.start_all_gather(rows.x, group)
    inverse = k.inverse(temperature)
    shift_free = _shift_free(lowest, len(rows.x), rows.x.dtype, group)
    sums = [k.sums(rows, None, None, inverse, shift_free)]
    columns = gather()
    others = _others(columns, len(rows.x), group)
    all_rows = k.prepare_received(columns) if others else kernels.Rows(columns, rows.scales.new_empty(0))
    for part in others:
        sums.append(k.sums(rows, all_rows.part(part), (), inverse, shift_free))
    loss, denominators, missed = k.loss_from_sums(rows, None, None, sums, inverse, shift_free)
    gathered = distributed.all_gather(denominators, group)
    # An operator must not return the same tensor twice, nor a view of another.
    return loss, columns, all_rows.scales, gathered, missed, rows.scales


def _shift_free(lowest: float, num_rows: int, dtype: torch.dtype, group: Group) -> bool:
    num_columns = num_rows * distributed.world_size(group)
    return lowest >= kernels.smallest_shift_free_temperature(num_columns, dtype)


@_forward.register_fake
def _(
    z1: Tensor,
    z2: Tensor,
    temperature: Tensor,  # noqa: ARG001
    lowest: float,  # noqa: ARG001
    impl: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, world_size = op.kernel(impl), distributed.world_size(distributed.group_named(group_name))
    dtype = torch.promote_types(z1.dtype, torch.float32)
    z = torch.cat([z1, z2])
    columns = z.new_empty(world_size * len(z), z.shape[1], dtype=k.prepared_dtype(z.dtype))
    scales, missed = k.saved_like(z)
    all_scales = k.prepare_received(columns).scales if world_size > 1 else scales.new_empty(0)
    return z.new_empty((), dtype=dtype), columns, all_scales, missed.new_empty(len(columns)), missed, scales


@torch.library.custom_op("sslx::nt_xent_backward", mutates_args=())
@op.in_full_precision
def _backward(
    gradient: Tensor,
    temperature: Tensor,
    columns: Tensor,
    all_scales: Tensor,
    denominators: Tensor,
    missed: Tensor,
    scales: Tensor,
    lowest: float,
    impl: str,
    group_name: str,
    needs_temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of this rank's rows [z1; z2] (N, D), in fp32 or fp64, and of the temperature () or (0)."""
    group, k, num_own = distributed.group_named(group_name), op.kernel(impl), len(missed)
    first = distributed.rank(group) * num_own
    own = slice(first, first + num_own)
    rows, all_rows = kernels.Rows(columns[own], scales), kernels.Rows(columns, all_scales)
    shift_free = _shift_free(lowest, num_own, columns.dtype, group)
    others = [kernels.Block(all_rows.part(part), (), denominators[part]) for part in _others(columns, num_own, group)]
    d, _, shares = k.gradient(
        rows,
        [kernels.Block(None, None), *others],
        denominators[own],
        missed,
        gradient,
        k.inverse(temperature),
        shift_free,
    )
    return d, op.temperature_gradient(shares, temperature, needs_temperature_gradient)


@_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    temperature: Tensor,
    columns: Tensor,
    all_scales: Tensor,  # noqa: ARG001
    denominators: Tensor,  # noqa: ARG001
    missed: Tensor,
    scales: Tensor,  # noqa: ARG001
    lowest: float,  # noqa: ARG001
    impl: str,  # noqa: ARG001
    group_name: str,  # noqa: ARG001
    needs_temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(columns.dtype, torch.float32)
    d = columns.new_empty(len(missed), columns.shape[1], dtype=dtype)
    return d, temperature.new_empty(() if needs_temperature_gradient else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z1, _, temperature, ctx.lowest, ctx.impl, ctx.group_name = inputs
    ctx.mark_non_differentiable(
        *output[1:5]
    )  # but the scales: through them a second derivative comes here and is refused
    ctx.dtype = z1.dtype
    ctx.save_for_backward(temperature, *output[1:])


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs_temperature_gradient = ctx.needs_input_grad[2]
    d, dt = _backward(gradient, *ctx.saved_tensors, ctx.lowest, ctx.impl, ctx.group_name, needs_temperature_gradient)
    d1, d2 = d.to(ctx.dtype).chunk(2)
    return d1, d2, dt if needs_temperature_gradient else None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(op.no_second_derivative)
