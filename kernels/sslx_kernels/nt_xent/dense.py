"""SimCLR's NT-Xent for small batches: a single tile and as few operators as possible.

    p_i = exp(s_i,positive / T), l_i = sum of exp(s_ij / T) over the negatives, loss_i = log1p(l_i / p_i)

If all similarities fit in one tile, the bookkeeping of ``tiled`` takes longer than the arithmetic, and each operator's
overhead is longer than its computation.  Here the tile is kept for the backward, which then needs one matrix product
instead of two, and only the loss is a logarithm.  The result is as accurate as that of ``tiled``, though it differs in
the last bits, and for a converged batch it is a thousand times as accurate as a dense softmax.  The overhead of a
custom operator would undo the gain, so this is an autograd.Function; under torch.compile, ``tiled`` runs instead.

On a GPU the number of launches matters most at this size: about 35 here, 140 in ``tiled``, 30 in a dense softmax with
autograd, and 9 in ``fused``, which is therefore used at every size if it can run.
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

_MIN_TEMPERATURE = 2 / (math.log(torch.finfo(torch.float32).max) - math.log(tiled.TILE) - 0.1)
"""From this temperature (0.0243), l_i / p_i is finite even if all negatives have similarity 1 and the positive -1."""


def fits(z1: Tensor, lowest: float) -> bool:
    """Return whether this module can compute the loss of views of the shape and dtype of z1 (B, D).

    lowest: a lower bound of the temperature.  Also False under torch.compile, where ``tiled`` runs instead.
    """
    is_one_tile = 1 < z1.shape[0] <= tiled.TILE // 2
    is_finite = lowest >= _MIN_TEMPERATURE
    return is_one_tile and is_finite and z1.dtype != torch.float64 and not torch.compiler.is_compiling()


def nt_xent(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute what ``sslx.losses.nt_xent`` does on one process, for views that ``fits``: z1, z2 (B, D) of one dtype."""
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    else:  # rounded to fp32 like a tensor; a Python float saves an operator
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
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
        inverse_length = length.clamp_min_(EPS).reciprocal_()
        to_raw = inverse_length.to(dtype)
        u = z * to_raw  # inf * 0 is NaN, which reaches all sums
        inverse: Any = (1 / temperature.double()).to(dtype) if isinstance(temperature, Tensor) else 1 / temperature
        e = torch.mm(u * inverse, u.t()).exp_()
        positives = e.as_strided((size,), (num + 1,), size).clone()  # (B,), the same for both views
        # Entry [h, i, k] of this view of e is row h·B + i and column i + k·B: the row itself and its positive.
        e.as_strided((2, size, 2), (size * num, num + 1, size)).zero_()
        negatives = e.sum(1).view(2, size)
        ctx.temperature, ctx.inverse, ctx.dtype = temperature, inverse, z1.dtype
        ctx.save_for_backward(z1, z2, e, u, inverse_length, to_raw, negatives, positives)
        return (negatives / positives).log1p_().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, *saved = ctx.saved_tensors
        creates_graph, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(z1.device.type)
        with (
            torch.no_grad() if creates_graph else nullcontext(),
            torch.autocast(z1.device.type, enabled=False) if autocast else nullcontext(),
        ):
            d, along = _gradient(gradients[0], ctx.inverse, *saved)
            d1, d2 = d.to(ctx.dtype).chunk(2)
            dt = None
            if ctx.needs_input_grad[2]:  # halved, because each similarity counts in the gradients of both its rows
                dt = along.double().sum().mul_(ctx.inverse).mul_(-0.5).to(ctx.temperature.dtype)
        if creates_graph:
            d1, d2 = _RefuseSecondDerivative.apply(d1, d2, z1, z2)
        return d1, d2, dt


class _RefuseSecondDerivative(torch.autograd.Function):
    """Copies the gradients and ties them to their inputs, so that a second derivative raises instead of being wrong."""

    @staticmethod
    def forward(ctx: Any, d1: Tensor, d2: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return d1.clone(), d2.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        no_second_derivative()


def _gradient(
    upstream: Tensor,
    inverse: Any,
    e: Tensor,
    u: Tensor,
    inverse_length: Tensor,
    to_raw: Tensor,
    negatives: Tensor,
    positives: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the rows before normalization (N, D), and <gradient, u> of the unit rows u, (N, 1).

        gradient of u_i = g / (N T) · [sum_j e_ij (1/L_i + 1/L_j) u_j - (l_i / L_i + l_p / L_p) u_p],  L = l + p

    g: ``upstream``.  p: the positive of row i.  e: exp(s / T), (N, N), 0 for a row with itself and its positive.
    """
    num, dim = u.shape
    inverse_denominators = (negatives + positives).reciprocal_()
    pull = (negatives * inverse_denominators).sum(0)
    inverse_denominators = inverse_denominators.view(num)
    d = torch.mm(torch.add(inverse_denominators[:, None], inverse_denominators).mul_(e), u)
    d.view(2, -1, dim).addcmul_(pull[:, None], u.view(2, -1, dim).flip(0), value=-1)
    d.mul_(upstream * (inverse / num))
    along = (u * d).sum(1, keepdim=True)
    # A row shorter than EPS was scaled by a constant, so its gradient has no component to project out.
    d.addcmul_(u, along * (inverse_length < 1 / EPS), value=-1).mul_(to_raw)
    return d, along


_apply: Any = _Dense.apply
