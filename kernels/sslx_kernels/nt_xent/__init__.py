"""NT-Xent over given rows and columns: checks the arguments and chooses the implementation."""

import importlib.util
import math
import os
from typing import Literal

import torch
from torch import Tensor

from sslx_kernels import toolchain
from sslx_kernels.nt_xent import op, reference
from sslx_kernels.nt_xent.rows import Block as Block
from sslx_kernels.nt_xent.rows import Rows as Rows

Impl = Literal["auto", "reference", "tiled", "fused"]
_TRITON = importlib.util.find_spec("triton") is not None  # here: torch 2.11 cannot trace the question
_LACKS = toolchain.missing()
IMPLS = ("auto", "reference", "tiled", "fused")
_FUSED_DTYPES, _FUSED_DIM = (torch.bfloat16, torch.float16), 256
_FUSED_CAPABILITY = 8, 0
"""A T4 (7.5) has too little shared memory for the tiles, and spills thousands of bytes a thread."""


def nt_xent(
    rows: Tensor,
    columns: Tensor,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: float | Tensor,
    impl: Impl = "auto",
    min_temperature: float | None = None,
) -> Tensor:
    """NT-Xent (arXiv 2002.05709, equation 1), averaged over the rows.

        loss_i = log sum_{j != self(i)} exp(s_ij / T) - s_i,positive(i) / T,  s_ij = cos(row_i, column_j)

    rows: (N, D), columns: (M, D), raw: they are normalised here (x / max(|x|, 1e-12)).  Any float dtype;
      computed in fp32 (fp64 for fp64), inside autocast too.  Pass one tensor as both where the rows are all the
      columns: it takes half the forward and a third of the backward.  Then self_column must be 0, 1, ... and the
      positives pairs; other layouts pass a copy.
    self_column, positive_column: (N,) int64, the columns that hold row i itself (-1: none does) and its positive.
    temperature: a positive float, or a tensor of one element that may require a gradient.  A tensor is not read:
      the largest exponent is then taken out of each sum, unless min_temperature says how low it can go.
    impl: "reference" is the definition, in N×M memory; "tiled" is PyTorch without it; "fused" is Triton, for a GPU,
      bf16 or fp16 and D up to 256; "auto" takes the fastest that can.
    Returns a scalar.  Gradients flow to rows, columns and temperature; there is no second derivative but of
    "reference".  An inf or a NaN in any row reaches the loss.
    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown impl.
    """
    _check(rows, columns, self_column, positive_column)
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    same = columns is rows
    rows = rows.to(dtype)
    t, shift_free = prepare_temperature(temperature, len(columns), rows, min_temperature)
    chosen = choose(impl, rows)
    if chosen == "reference":
        return reference.nt_xent(rows, columns, self_column, positive_column, t)
    loss, *_ = op.forward(
        rows, None if same else columns.to(dtype), self_column, positive_column, t, shift_free, chosen
    )
    return loss


def choose(impl: str, rows: Tensor) -> str:
    """The implementation that ``impl`` stands for, given rows (N, D) of the dtype to compute with.

    Raises ValueError for an unknown one, and for "fused" where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl not in ("auto", "fused"):
        return impl
    why_not = _not_fused(rows)
    if impl == "fused" and why_not:
        raise ValueError(f"impl='fused' {why_not}; use impl='tiled' or 'auto'")
    return "tiled" if why_not else "fused"


def _not_fused(rows: Tensor) -> str:
    """What of these rows the Triton kernels cannot take; empty if nothing."""
    if rows.dtype not in _FUSED_DTYPES:
        return f"takes bf16 and fp16, got {rows.dtype}"
    if rows.shape[1] > _FUSED_DIM:
        return f"takes rows of up to {_FUSED_DIM} numbers, got {rows.shape[1]}"
    if not _TRITON:
        return "needs triton, which is not installed"
    if rows.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device, got {rows.device.type}"
    if _LACKS and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs {_LACKS}: {toolchain.INSTALL}"
    if (capability := _capability(rows.device.type, rows.device.index)) < _FUSED_CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    return ""


@torch.compiler.assume_constant_result
def _capability(device: str, index: int | None) -> tuple[int, int]:
    """A GPU's compute capability; what is enough where there is no GPU to ask, as with fake tensors."""
    if device != "cuda" or not torch.cuda.is_available():
        return _FUSED_CAPABILITY
    return torch.cuda.get_device_capability(index)


def lowest_temperature(temperature: float | Tensor, min_temperature: float | None = None) -> float:
    """How low the temperature can be, 0 if nobody knows.

    Raises ValueError for a temperature that is not positive and finite, or not of one element.
    """
    lowest: float | None = min_temperature
    if not isinstance(temperature, Tensor):
        lowest = temperature
    elif temperature.numel() != 1 or not temperature.is_floating_point():
        got = f"{tuple(temperature.shape)} {temperature.dtype}"
        raise ValueError(f"expected a temperature of one floating-point element, got {got}")
    if lowest is not None and not 0 < lowest < math.inf:
        raise ValueError(f"expected a positive temperature, got {lowest}")
    return lowest or 0.0


def as_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as a tensor () of fp32 or more."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(())
    return torch.full((), temperature, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def prepare_temperature(
    temperature: float | Tensor, num_columns: int, like: Tensor, min_temperature: float | None = None
) -> tuple[Tensor, bool]:
    """(temperature as a tensor () of fp32 or more, whether exp(s/T) summed over the columns fits without a shift).

    Raises what ``lowest_temperature`` raises.
    """
    lowest = lowest_temperature(temperature, min_temperature)
    return as_tensor(temperature, like), lowest >= smallest_shift_free_temperature(num_columns, like.dtype)


def smallest_shift_free_temperature(num_columns: int, dtype: torch.dtype) -> float:
    """The lowest T at which exp(s / T), |s| <= 1, needs no shift: neither a sum over the columns nor its inverse leaves
    the dtype's normal numbers.

    A sum lies between exp(-1/T) and num_columns · exp(1/T), so 1/T + log(num_columns) must stay under the logarithm of
    the largest number and of the inverse of the smallest normal one: T >= 0.0138 for four million columns in fp32.
    """
    limits = torch.finfo(torch.promote_types(dtype, torch.float32))
    room = min(math.log(limits.max), -math.log(limits.tiny)) - math.log(max(num_columns, 1))
    return 1.001 / room if room > 0 else math.inf  # a cosine may round to a little over 1


def _check(rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or 0 in rows.shape:
        shapes = f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"expected rows (N, D) and columns (M, D), got {shapes}")
    if not (rows.is_floating_point() and columns.is_floating_point()):
        raise ValueError(f"expected rows and columns of floats, got {rows.dtype} and {columns.dtype}")
    for name, index in (("self_column", self_column), ("positive_column", positive_column)):
        if index.shape != rows.shape[:1] or index.dtype != torch.int64:
            got = f"{tuple(index.shape)} {index.dtype}"
            raise ValueError(f"expected {name} to be ({rows.shape[0]},) int64, got {got}")
    devices = {t.device for t in (rows, columns, self_column, positive_column)}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
