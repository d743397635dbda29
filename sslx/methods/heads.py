"""Heads: the small networks between encoder and loss."""

from itertools import pairwise

from torch import nn


def mlp(*dims: int, last_norm: bool = True, last_bias: bool = True) -> nn.Sequential:
    """Linear, BN, ReLU, ..., Linear, BN through the given widths: SimCLR's projector (arXiv 2002.05709, B.1).

    Linear layers before a BN have no bias, which the norm would remove.  last_norm: BN after the last layer;
    last_bias: a bias in it, where it has no BN.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        norm = last_norm or not last
        layers.append(nn.Linear(before, after, bias=not norm and last_bias))
        if norm:
            layers.append(nn.BatchNorm1d(after))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
