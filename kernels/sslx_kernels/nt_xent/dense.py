"""SimCLR's NT-Xent of a small batch: one tile, and as few operators as its formula takes.

    p_i = exp(s_i,positive / T), l_i = sum of exp(s_ij / T) over the negatives, loss_i = log1p(l_i / p_i)

Where all similarities are one tile anyway, the bookkeeping of ``tiled`` takes longer than the arithmetic, and each
operator longer than what it computes.  Here the tile is kept for the backward, which then has one matrix product
instead of two, and nothing is taken to a logarithm but the loss: as accurate as ``tiled``, though not to its last bit,
and where a batch has converged a thousand times as accurate as a dense softmax.  An operator of its own costs more than
all that, so this is an autograd.Function; under torch.compile, ``tiled`` runs instead.

On a GPU the number of launches decides at this size: some 35 of these, 140 of ``tiled``, 30 of a dense softmax by
autograd, and 9 of ``fused``, which is therefore taken at every size where it can run.
"""

import math
import struct
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sslx_kernels.nt_xent import tiled
from sslx_kernels.nt_xent.op import no_second_derivative
from sslx_kernels.nt_xent.rows import EPS

_LOWEST = 2 / (math.log(torch.finfo(torch.float32).max) - math.log(tiled.TILE) - 0.1)
"""From this temperature on, 0.0243, a sum over negatives of similarity 1 over a positive of -1 is a finite number."""


def fits(z1: Tensor, lowest: float) -> bool:
    """Whether two views (B, D) like this one are few enough for temperatures from ``lowest`` on, B is 2 or more, and
    this is not being compiled."""
    few = 1 < z1.shape[0] <= tiled.TILE // 2
    return few and lowest >= _LOWEST and z1.dtype != torch.float64 and not torch.compiler.is_compiling()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
    """As ``sslx.losses.nt_xent`` on one process, for what ``fits``: z1, z2 (B, D) of one dtype."""
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    else:  # as a tensor in fp32 holds it; Python's own floats need no operator
        temperature = struct.unpack("f", struct.pack("f", temperature))[0]
    if torch.is_autocast_enabled(z1.device.type):
        with torch.autocast(z1.device.type, enabled=False):
            return _apply(z1, z2, temperature)
    return _apply(z1, z2, temperature)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
        z, size = torch.cat((z1, z2)), z1.shape[0]
        dtype, num = torch.promote_types(z.dtype, torch.float32), 2 * size
        factor = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64).clamp_min_(EPS).reciprocal_()
        to_raw = factor.to(dtype)
        u = z * to_raw  # an inf, times 0, is NaN, and reaches all sums
        inverse: Any = (1 / temperature.double()).to(dtype) if isinstance(temperature, Tensor) else 1 / temperature
        e = torch.mm(u * inverse, u.t()).exp_()
        positives = e.as_strided((size,), (num + 1,), size).clone()  # of both views
        # [h, i, k]: row h·B + i, and of its columns i + k·B: itself and its positive.
        e.as_strided((2, size, 2), (size * num, num + 1, size)).zero_()
        negatives = e.sum(1).view(2, size)
        ctx.temperature, ctx.inverse, ctx.dtype = temperature, inverse, z1.dtype
        ctx.save_for_backward(z1, z2, e, u, factor, to_raw, negatives, positives)
        return (negatives / positives).log1p_().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, *saved = ctx.saved_tensors
        again, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(z1.device.type)
        with (
            torch.no_grad() if again else nullcontext(),
            torch.autocast(z1.device.type, enabled=False) if autocast else nullcontext(),
        ):
            d, along = _gradient(gradients[0], ctx.inverse, *saved)
            d1, d2 = d.to(ctx.dtype).chunk(2)
            dt = None
            if ctx.needs_input_grad[2]:  # each similarity is counted in both its rows' gradients
                dt = along.double().sum().mul_(ctx.inverse).mul_(-0.5).to(ctx.temperature.dtype)
        if again:
            d1, d2 = _Refused.apply(d1, d2, z1, z2)
        return d1, d2, dt


class _Refused(torch.autograd.Function):
    """The gradients, tied to what they are of: a second derivative is refused instead of wrong."""

    @staticmethod
    def forward(ctx: Any, d1: Tensor, d2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return d1.clone(), d2.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        no_second_derivative()


def _gradient(
    upstream: Tensor, inverse: Any, e: Tensor, u: Tensor, factor: Tensor, to_raw: Tensor, negatives: Tensor,
    positives: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the gradient of the raw rows (N, D), what of each goes along the row (N, 1))."""
    num, dim = u.shape
    share = (negatives + positives).reciprocal_()
    pull = (negatives * share).sum(0)
    share = share.view(num)
    d = torch.mm(torch.add(share[:, None], share).mul_(e), u)
    d.view(2, -1, dim).addcmul_(pull[:, None], u.view(2, -1, dim).flip(0), value=-1)
    d.mul_(upstream * (inverse / num))
    along = (u * d).sum(1, keepdim=True)
    # A row shorter than EPS was only scaled: nothing is projected out.
    d.addcmul_(u, along * (factor < 1 / EPS), value=-1).mul_(to_raw)
    return d, along


_apply: Any = _Dense.apply
