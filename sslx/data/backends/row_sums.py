"""Weighted sums of an image's rows: every linear operation of a view, such that it does not depend on its batch.

A BLAS chooses its code by the sizes of a product, the number of matrices and threads and where they lie in memory, and
each code rounds in its own way: a sample would differ in the last bit with the batch that it is in, and W ranks would
train on other pixels than one.  torch's embedding bag adds a sum's rows one after another, in the order given, whatever
the number of sums and of the threads that share them; a row of weight 0 changes nothing.  Few rows count in each sum,
so that this is also faster than products with the matrices of these weights, which are nearly all zero.
"""

import torch
from torch import Tensor
from torch.nn import functional

CACHED = 2**20  # values worked on at a time on a CPU: 4 MB, which stay in its cache from one operation to the next


def parts(images: Tensor, values: int) -> list[slice]:
    """The samples of a batch to be worked on together, where each has so many values: all of them on a GPU."""
    step = max(1, len(images) if images.is_cuda else CACHED // values)
    return [slice(start, start + step) for start in range(0, len(images), step)]


def filtered(planes: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) float32, the rows (N, S, T) int64 of each sum and their weights (N, S, T) -> (N, C, S, W).

    index and weight broadcast over N and S.
    """
    number, channels, height, width = planes.shape
    index, weight = torch.broadcast_tensors(index, weight)
    plane = torch.arange(number * channels, device=planes.device).view(number, channels, 1, 1)
    rows = index[:, None] + plane * height
    return _sums(planes, rows, weight[:, None].expand(rows.shape)).view(number, channels, -1, width)


def mixed(planes: Tensor, matrix: Tensor) -> Tensor:
    """(N, C, H, W) float32 and (N, C, C) on columns of channels -> (N, C, H, W)."""
    number, channels, height, _ = planes.shape
    every = torch.arange(number * channels * height, device=planes.device).view(number, 1, channels, height)
    rows = every.mT.expand(number, channels, height, channels)
    return _sums(planes, rows, matrix[:, :, None].expand(rows.shape)).view(planes.shape)


def _sums(planes: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """(sums, W): each of the planes' rows (..., T) with the weights (..., T)."""
    table, terms = planes.reshape(-1, planes.shape[-1]), rows.shape[-1]
    return functional.embedding_bag(
        rows.reshape(-1, terms), table, mode="sum", per_sample_weights=weight.reshape(-1, terms)
    )
