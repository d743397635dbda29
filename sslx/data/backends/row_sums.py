"""Weighted sums of an image's rows, by which all linear operations of a view give the same result in any batch.

A BLAS chooses its kernel by the sizes of a product, the number of matrices and threads, and their memory alignment,
and each kernel rounds differently: a sample's last bits would depend on its batch, and W ranks would train on other
pixels than one rank.  torch's embedding bag adds the rows of a sum one after another in the given order, whatever the
number of sums and threads, and a row of weight 0 changes nothing.  Each sum has few rows, so that this is also faster
than products with the nearly all-zero matrices of these weights.
"""

import torch
from torch import Tensor
from torch.nn import functional

MAX_CACHED_VALUES = 2**20  # processed at a time on a CPU: 4 MB, which stay in its cache between operations


def parts(images: Tensor, values: int) -> list[slice]:
    """Divide a batch into slices of samples to process together.  On a GPU there is one.  values: values per sample."""
    step = max(1, len(images) if images.is_cuda else MAX_CACHED_VALUES // values)
    return [slice(start, start + step) for start in range(0, len(images), step)]


def filtered(planes: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Return weighted sums of rows, (N, C, S, W), of planes (N, C, H, W) float32.

    index, weight: (N, S, T), the int64 rows of each sum and their weights; both broadcast over N and S.
    """
    number, channels, height, width = planes.shape
    index, weight = torch.broadcast_tensors(index, weight)
    plane = torch.arange(number * channels, device=planes.device).view(number, channels, 1, 1)
    rows = index[:, None] + plane * height
    return _sums(planes, rows, weight[:, None].expand(rows.shape)).view(number, channels, -1, width)


def mixed(planes: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the channels of planes (N, C, H, W) float32 by matrices (N, C, C)."""
    number, channels, height, _ = planes.shape
    all_rows = torch.arange(number * channels * height, device=planes.device).view(number, 1, channels, height)
    rows = all_rows.mT.expand(number, channels, height, channels)
    return _sums(planes, rows, matrix[:, :, None].expand(rows.shape)).view(planes.shape)


def _sums(planes: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return sums of the planes' rows (..., T) with weights (..., T): (number of sums, W)."""
    table, terms = planes.reshape(-1, planes.shape[-1]), rows.shape[-1]
    return functional.embedding_bag(
        rows.reshape(-1, terms), table, mode="sum", per_sample_weights=weight.reshape(-1, terms)
    )
