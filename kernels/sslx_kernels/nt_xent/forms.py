"""Other losses of the same kernels: CLIP's InfoNCE between two sets, and SupCon's many positives."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx_kernels.nt_xent import Impl, choose, nt_xent, op, prepare_temperature, tiled
from sslx_kernels.nt_xent.rows import EPS


def info_nce(a: Tensor, b: Tensor, temperature: float | Tensor, impl: Impl = "auto") -> Tensor:
    """InfoNCE both ways between two sets (CLIP, arXiv 2103.00020, figure 3): a_i and b_i are the positives.

    a, b: (N, D) each, raw; no gradient-free side.  Returns the mean of both directions, a scalar.
    """
    own = torch.arange(len(a), device=a.device)
    none = torch.full_like(own, -1)
    there = nt_xent(a, b, none, own, temperature, impl)
    return (there + nt_xent(b, a, none, own, temperature, impl)) / 2


def sup_con(z: Tensor, label: Tensor, num_classes: int, temperature: float | Tensor, impl: Impl = "auto") -> Tensor:
    """SupCon (arXiv 2004.11362, equation 2, L_out): all other rows of a row's class are its positives.

        loss_i = log sum_{j != i} exp(s_ij / T) - mean over positives p of s_ip / T

    z: (N, D), raw.  label: (N,) int64 in [0, num_classes).  Returns the mean over the rows that have a positive.
    The positives need no matrix: the sum of s_ip over a class is a product with the sum of its unit rows.  Where
    classes have formed, their gradient and the denominators' nearly cancel: both are computed and added in fp32 (fp64
    for fp64), and rounded once, to z's dtype.  impl: "fused", which computes with bf16 and fp16, is refused.
    Raises ValueError as ``nt_xent`` does.
    """
    if z.ndim != 2 or label.shape != z.shape[:1] or label.dtype != torch.int64:
        got = f"{tuple(z.shape)} and {tuple(label.shape)} {label.dtype}"
        raise ValueError(f"expected z (N, D) and a label (N,) int64, got {got}")
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    t, shift_free = prepare_temperature(temperature, len(wide), wide)
    chosen = choose(impl, wide)
    with torch.autocast(z.device.type, enabled=False):
        u = wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True, dtype=torch.float64).clamp_min(EPS).to(
            wide.dtype
        )
        if chosen == "reference":
            logits = (u @ u.T / t).fill_diagonal_(-torch.inf)
            log_sums = logits.logsumexp(1)
        else:
            log_sums = _log_sums(wide, t, shift_free)[0]
        sums = u.new_zeros(num_classes, u.shape[1]).index_put((label,), u, accumulate=True)
        others = F.one_hot(label, num_classes).sum(0)[label] - 1
        aligned = torch.linalg.vecdot(u, sums[label] - u) / t
        loss = torch.where(others > 0, log_sums - aligned / others.clamp_min(1), 0)
        return loss.sum() / (others > 0).sum().clamp_min(1)


@torch.library.custom_op("sslx_kernels::log_sums", mutates_args=())
@op.in_full_precision
def _log_sums(rows: Tensor, temperature: Tensor, shift_free: bool) -> tuple[Tensor, Tensor]:
    """(log of the sum of exp(s_ij / T) over j != i for each row (N,), the unit rows (N, D))."""
    x = tiled.prepare(rows).x
    own = torch.arange(len(x), device=x.device)
    found = tiled.log_sums(x, None, (own,), tiled.inverse(temperature), shift_free)
    return found.to(torch.promote_types(rows.dtype, torch.float32)), x


@_log_sums.register_fake
def _(rows: Tensor, temperature: Tensor, shift_free: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    x = rows.new_empty(rows.shape, dtype=tiled.prepared_dtype(rows.dtype))
    return rows.new_empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32)), x


@torch.library.custom_op("sslx_kernels::log_sums_backward", mutates_args=())
@op.in_full_precision
def _log_sums_backward(
    gradient: Tensor, rows: Tensor, temperature: Tensor, log_sums: Tensor, x: Tensor, shift_free: bool
) -> tuple[Tensor, Tensor]:
    inverse, own = tiled.inverse(temperature), torch.arange(len(x), device=x.device)
    d, _ = tiled.gradients(x, None, (own,), inverse, shift_free, (gradient, log_sums), None)
    d, share = tiled.through_unit_(d, x, tiled.factors(rows), inverse)
    return d, (share * -0.5 * inverse).to(temperature.dtype)


@_log_sums_backward.register_fake
def _(
    gradient: Tensor,  # noqa: ARG001
    rows: Tensor,
    temperature: Tensor,
    log_sums: Tensor,  # noqa: ARG001
    x: Tensor,  # noqa: ARG001
    shift_free: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32)), torch.empty_like(
        temperature
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, temperature, ctx.shift_free = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, temperature, *output)


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    rows, temperature, *rest = ctx.saved_tensors
    d, dt = _log_sums_backward(gradient, rows, temperature, *rest, ctx.shift_free)
    return d.to(rows.dtype), dt if ctx.needs_input_grad[1] else None, None


_log_sums.register_autograd(_differentiate, setup_context=_save)
_log_sums_backward.register_autograd(op.no_second_derivative)
