"""Heads: the small networks between encoder and loss."""

from itertools import pairwise

from torch import nn


def mlp(
    *dims: int, norm: bool = True, last_norm: bool = True, last_bias: bool = True, gelu: bool = False
) -> nn.Sequential:
    """Return Linear, BN, ReLU, ..., Linear, BN of the given widths: SimCLR's projector (arXiv 2002.05709, B.1).

    Linear layers before a BN have no bias, because the norm would remove it.
    norm: whether there are BNs.  last_norm: whether the last layer is followed by a BN.  last_bias: whether the last
    layer has a bias if no BN follows.  gelu: use GELU instead of ReLU.
    """
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        is_last = i == len(dims) - 2
        has_norm = norm and (last_norm or not is_last)
        layers.append(nn.Linear(before, after, bias=not has_norm and (last_bias or not is_last)))
        if has_norm:
            layers.append(nn.BatchNorm1d(after))
        if not is_last:
            layers.append(nn.GELU() if gelu else nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
