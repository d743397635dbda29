"""Exponential moving averages: a target network that follows the online one (BYOL, arXiv 2006.07733)."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslx.encoders import Encoder

foreach: Any = torch  # its multi-tensor functions have no public names


class Average(nn.Module):
    """A moving average of an encoder and of the heads behind it, which are given by name.

        self.target = ema.Average(encoder, projector=self.projector, base=0.996)
        t = self.target(images)  # the projector's outputs
        self.target.follow(self.progress)  # after each step

    base: the share of the average's weights that a step keeps at the start of training.
    It starts as a copy with the same weights and buffers, and its parameters need no gradient.  Buffers are not
    averaged: in training mode its batch norms use the statistics of their own batch and keep their own running ones, as
    in BYOL's code.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, *, base: float, **heads: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._online = (encoder, *heads.values())  # in a tuple, so that they are not submodules of this one too
        for name, part in {"encoder": encoder, **heads}.items():
            self.add_module(name, copy.deepcopy(part).requires_grad_(False))
        self._pairs: tuple[Sequence[Tensor], Sequence[Tensor]] = [], []
        self.register_load_state_dict_pre_hook(_take_old_names)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the last head."""
        for part in self.children():
            x = part(x)
        return x

    def momentum(self, progress: Tensor) -> Tensor:
        """Return the momentum, which rises from ``base`` at progress 0 to 1 at progress 1 along half a cosine (3.2)."""
        return 1 - (1 - self.base) * (torch.cos(math.pi * progress) + 1) / 2

    @torch.no_grad()
    def follow(self, progress: Tensor) -> None:
        """Follow: average = momentum * average + (1 - momentum) * online.  progress: () on the device."""
        averages, onlines = self._parameter_pairs()
        steps = foreach._foreach_sub(onlines, averages)  # as a difference, so that equal weights stay bit-equal
        foreach._foreach_mul_(steps, 1 - self.momentum(progress))
        foreach._foreach_add_(averages, steps)

    def take_old_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename, in a state dict, the numbers that sslx 0.1 gave to the parts (``target.0.``) to their names."""
        for number, (name, _) in enumerate(self.named_children()):
            for key in [key for key in state if key.startswith(f"{prefix}{number}.")]:
                state[f"{prefix}{name}.{key.removeprefix(f'{prefix}{number}.')}"] = state.pop(key)

    def _parameter_pairs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the parameters and those that they follow.  They are collected once, which takes a millisecond, and
        again after a move to another device, which makes new ones."""
        first = next(self.parameters()), next(self._online[0].parameters())
        if not self._pairs[0] or self._pairs[0][0] is not first[0] or self._pairs[1][0] is not first[1]:
            onlines = [parameter for part in self._online for parameter in part.parameters()]
            self._pairs = list(self.parameters()), onlines
            assert [p.shape for p in self._pairs[0]] == [p.shape for p in onlines]
        return self._pairs


def _take_old_names(average: Average, state: dict[str, Any], prefix: str, *_: object) -> None:
    average.take_old_names(state, prefix)
