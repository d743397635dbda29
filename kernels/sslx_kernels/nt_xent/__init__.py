"""NT-Xent over given rows and columns: checks the arguments and chooses the implementation."""

from typing import Literal

import torch
from torch import Tensor

from sslx_kernels.nt_xent import reference

Impl = Literal["auto", "reference"]
_IMPLS = {"auto": reference.nt_xent, "reference": reference.nt_xent}


def nt_xent(
    rows: Tensor,
    columns: Tensor,
    self_column: Tensor,
    positive_column: Tensor,
    temperature: float | Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """NT-Xent (arXiv 2002.05709, equation 1), averaged over the rows.

        loss_i = log sum_{j != self(i)} exp(s_ij / T) - s_i,positive(i) / T,  s_ij = cos(row_i, column_j)

    rows: (N, D), columns: (M, D), raw: they are normalised here (x / max(|x|, 1e-12)).  Any float dtype;
      computed in fp32 (fp64 for fp64), inside autocast too.
    self_column, positive_column: (N,) int64, the columns that hold row i itself and its positive.
    temperature: a positive float, or a tensor of one element that may require a gradient.
    Returns a scalar.  Gradients flow to rows, columns and temperature.
    Raises ValueError for shapes, dtypes and devices that do not fit, and for an unknown impl.
    """
    _check(rows, columns, self_column, positive_column)
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"expected a temperature of one element, got shape {tuple(temperature.shape)}")
        temperature = temperature.reshape(())
    elif not temperature > 0:
        raise ValueError(f"expected a positive temperature, got {temperature}")
    if impl not in _IMPLS:
        raise ValueError(f"expected impl to be one of {', '.join(_IMPLS)}, got {impl!r}")
    return _IMPLS[impl](rows, columns, self_column, positive_column, temperature)


def _check(rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
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
