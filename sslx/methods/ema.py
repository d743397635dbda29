"""Exponential moving averages: a target network that follows the online one (BYOL, arXiv 2006.07733)."""

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

foreach: Any = torch  # its multi-tensor functions have no public names
Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(online: Module) -> Module:
    """A copy of the module, with its present weights and buffers, whose parameters need no gradient."""
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def update(target: nn.Module, online: nn.Module, momentum: Tensor) -> None:
    """target = momentum * target + (1 - momentum) * online, for all parameters; momentum: () on their device.

    Buffers stay as they are: in training mode the target's batch norms take the statistics of their own batch and
    keep their own running ones, as in BYOL's code.
    """
    targets, onlines = list(target.parameters()), list(online.parameters())
    assert len(targets) == len(onlines)
    steps = foreach._foreach_sub(onlines, targets)  # so that equal weights stay equal, to the last bit
    foreach._foreach_mul_(steps, 1 - momentum)
    foreach._foreach_add_(targets, steps)


def cosine_momentum(base: float, progress: Tensor) -> Tensor:
    """The momentum that rises from base at progress 0 to 1 at progress 1 along half a cosine (2006.07733, 3.2)."""
    return 1 - (1 - base) * (torch.cos(math.pi * progress) + 1) / 2
