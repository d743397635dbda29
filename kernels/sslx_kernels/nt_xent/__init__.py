"""NT-Xent between rows and columns: checks the arguments and chooses an implementation."""

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
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # at import, because torch 2.11 cannot trace find_spec
_MISSING_TOOLS = toolchain.missing()
IMPLS = ("auto", "reference", "tiled", "fused")
_FUSED_DTYPES, _FUSED_DIM = (torch.bfloat16, torch.float16), 256
_FUSED_CAPABILITY = 8, 0
"""A T4 (7.5) has too little shared memory for the tiles and spills thousands of bytes per thread."""


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

    rows: (N, D), columns: (M, D), of any float dtype and not normalized (this function computes x / max(|x|, 1e-12)).
      The loss is computed in fp32 (fp64 for fp64), even inside autocast.  If the rows are all the columns, pass the
      same tensor as both, which saves half of the forward and a third of the backward.  Then self_column must be
      0, 1, ... and the positives must form pairs; for other layouts pass a copy.
    self_column, positive_column: (N,) int64, the column that holds row i itself (-1 if there is none) and the column
      of its positive.
    temperature: a positive float, or a tensor of one element that may require a gradient.  The value of a tensor is
      not read, so the largest exponent is subtracted in each sum, unless min_temperature gives a lower bound.
    impl: "reference" is the definition, with an N×M matrix; "tiled" is PyTorch without the matrix; "fused" is Triton,
      for a GPU, bf16 or fp16 and D up to 256; "auto" is the fastest one that applies.
    Returns a scalar.  Gradients flow to rows, columns and temperature.  Only "reference" has a second derivative.
    An inf or a NaN in any row reaches the loss.
    Raises ValueError for wrong shapes, dtypes or devices, and for an unknown impl.
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
    """Return the implementation that ``impl`` stands for.  rows: (N, D) of the dtype to compute with.

    Raises ValueError for an unknown implementation, and for "fused" if it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl not in ("auto", "fused"):
        return impl
    problem = _fused_problem(rows)
    if impl == "fused" and problem:
        raise ValueError(f"impl='fused' {problem}; use impl='tiled' or 'auto'")
    return "tiled" if problem else "fused"


def _fused_problem(rows: Tensor) -> str:
    """Return why the Triton kernels cannot run for these rows (N, D), or an empty string."""
    if rows.dtype not in _FUSED_DTYPES:
        return f"needs bf16 or fp16, got {rows.dtype}"
    if rows.shape[1] > _FUSED_DIM:
        return f"needs rows of at most {_FUSED_DIM} numbers, got {rows.shape[1]}"
    if not _HAS_TRITON:
        return "needs triton, which is not installed"
    if rows.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device, got {rows.device.type}"
    if _MISSING_TOOLS and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs {_MISSING_TOOLS}: {toolchain.INSTALL}"
    if (capability := _capability(rows.device.type, rows.device.index)) < _FUSED_CAPABILITY:
        return f"needs a GPU of compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    return ""


@torch.compiler.assume_constant_result
def _capability(device: str, index: int | None) -> tuple[int, int]:
    """Return a GPU's compute capability, or the required one if there is no GPU, as with fake tensors."""
    if device != "cuda" or not torch.cuda.is_available():
        return _FUSED_CAPABILITY
    return torch.cuda.get_device_capability(index)


def lowest_temperature(temperature: float | Tensor, min_temperature: float | None = None) -> float:
    """Return a lower bound of the temperature, or 0 if none is known.

    Raises ValueError for a temperature that is not positive and finite or has more than one element.
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
    """Return the temperature as a tensor (), in at least fp32 if it was a float."""
    if isinstance(temperature, Tensor):
        return temperature.reshape(())
    return torch.full((), temperature, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def prepare_temperature(
    temperature: float | Tensor, num_columns: int, like: Tensor, min_temperature: float | None = None
) -> tuple[Tensor, bool]:
    """Return the temperature as a tensor (), and whether sums of exp(s / T) over the columns need no shift.

    Raises the errors of ``lowest_temperature``.
    """
    lowest = lowest_temperature(temperature, min_temperature)
    return as_tensor(temperature, like), lowest >= smallest_shift_free_temperature(num_columns, like.dtype)


def smallest_shift_free_temperature(num_columns: int, dtype: torch.dtype) -> float:
    """Return the lowest T at which sums of exp(s / T), |s| <= 1, need no shift of the exponents.

    Without a shift, a sum over the columns and its inverse must be normal numbers of the dtype.  A sum lies between
    exp(-1/T) and num_columns · exp(1/T), so 1/T + log(num_columns) must be below the logarithms of the largest number
    and of the inverse of the smallest normal number.  In fp32 this is T >= 0.0138 for four million columns.
    """
    limits = torch.finfo(torch.promote_types(dtype, torch.float32))
    max_exponent = min(math.log(limits.max), -math.log(limits.tiny)) - math.log(max(num_columns, 1))
    return 1.001 / max_exponent if max_exponent > 0 else math.inf  # a cosine may round to slightly more than 1


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
