"""Exponential moving averages: a target network that follows the online one (BYOL, arXiv 2006.07733)."""

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

foreach: Any = torch  # its multi-tensor functions have no public names
Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(online: Module) -> Module:
    """A copy of the module, with its present weights and buffers, whose parameters need no gradient."""
    return copy.deepcopy(online).requires_grad_(False)


class Average:
    """The parameters of a target network beside those that they follow, found once: to find them takes a millisecond.

    target: ``frozen_copy`` of the online network, as one module.  online: its parts, in the target's order.
    Buffers stay as they are: in training mode the target's batch norms take the statistics of their own batch and
    keep their own running ones, as in BYOL's code.
    """

    def __init__(self, target: nn.Module, *online: nn.Module) -> None:
        self._target, self._online = target, online
        self._pairs: tuple[Sequence[Tensor], Sequence[Tensor]] = [], []

    @torch.no_grad()
    def update(self, momentum: Tensor) -> None:
        """target = momentum * target + (1 - momentum) * online, for all parameters; momentum: () on their device."""
        targets, onlines = self._parameters()
        steps = foreach._foreach_sub(onlines, targets)  # so that equal weights stay equal, to the last bit
        foreach._foreach_mul_(steps, 1 - momentum)
        foreach._foreach_add_(targets, steps)

    def _parameters(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        first = next(self._target.parameters()), next(self._online[0].parameters())
        if not self._pairs[0] or self._pairs[0][0] is not first[0] or self._pairs[1][0] is not first[1]:
            onlines = [parameter for part in self._online for parameter in part.parameters()]
            self._pairs = list(self._target.parameters()), onlines
            assert [p.shape for p in self._pairs[0]] == [p.shape for p in onlines]
        return self._pairs


def cosine_momentum(base: float, progress: Tensor) -> Tensor:
    """The momentum that rises from base at progress 0 to 1 at progress 1 along half a cosine (2006.07733, 3.2)."""
    return 1 - (1 - base) * (torch.cos(math.pi * progress) + 1) / 2
