"""Heads: the small networks between encoder and loss."""

from itertools import pairwise

from torch import nn


def mlp(
    *dims: int, norm: bool = True, last_norm: bool = True, last_bias: bool = True, gelu: bool = False
) -> nn.Sequential:
    """Linear, BN, ReLU, ..., Linear, BN through the given widths: SimCLR's projector (arXiv 2002.05709, B.1).

    Linear layers before a BN have no bias, which the norm would remove.  norm: BN at all; last_norm: BN after the last
    layer; last_bias: a bias in it, where it has no BN; gelu: GELU in place of ReLU.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        normed = norm and (last_norm or not last)
        layers.append(nn.Linear(before, after, bias=not normed and (last_bias or not last)))
        if normed:
            layers.append(nn.BatchNorm1d(after))
        if not last:
            layers.append(nn.GELU() if gelu else nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
