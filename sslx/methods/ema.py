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
        averages, onlines = self._tensor_pairs()
        steps = foreach._foreach_sub(onlines, averages)  # as a difference, so that equal weights stay bit-equal
        foreach._foreach_mul_(steps, 1 - self.momentum(progress))
        foreach._foreach_add_(averages, steps)

    def take_old_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename, in a state dict, the numbers that sslx 0.1 gave to the parts (``target.0.``) to their names."""
        for number, (name, _) in enumerate(self.named_children()):
            for key in [key for key in state if key.startswith(f"{prefix}{number}.")]:
                state[f"{prefix}{name}.{key.removeprefix(f'{prefix}{number}.')}"] = state.pop(key)

    def _tensor_pairs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the tensors that are averaged and those that they follow.

        They are collected once, which takes a millisecond, and again after a move to another device makes new ones.
        """
        first = next(self.parameters()), next(self._online[0].parameters())
        if not self._pairs[0] or self._pairs[0][0] is not first[0] or self._pairs[1][0] is not first[1]:
            averages = [tensor for part in self.children() for tensor in self._tensors(part)]
            self._pairs = averages, [tensor for part in self._online for tensor in self._tensors(part)]
            assert [tensor.shape for tensor in self._pairs[0]] == [tensor.shape for tensor in self._pairs[1]]
        return self._pairs

    def _tensors(self, module: nn.Module) -> list[Tensor]:
        """Return the tensors of a part that are averaged."""
        return list(module.parameters())


class EncoderAverage(Average):
    """A moving average of the encoder that any run can keep, to be used in its place after training.

    Batch norm's running statistics are averaged like the weights, because the average is only used for evaluation, as
    in timm's ``ModelEmaV3``.  The first steps use a smaller momentum, (1 + n) / (10 + n) after n steps (TensorFlow's
    ``ExponentialMovingAverage``), so that the average of a short run does not consist of initial weights.
    """

    num_steps: Tensor

    def __init__(self, encoder: Encoder, momentum: float) -> None:
        super().__init__(encoder, base=momentum)
        self.register_buffer("num_steps", torch.zeros(()))

    def momentum(self, progress: Tensor) -> Tensor:
        """Return the momentum; it is 1 after a step that was not taken, for which progress is 1."""
        smaller = (1 + self.num_steps) / (10 + self.num_steps)
        return torch.where(progress < 1, smaller.clamp(max=self.base), 1.0)

    @torch.no_grad()
    def follow(self, progress: Tensor) -> None:
        super().follow(progress)
        for average, online in zip(self.encoder.buffers(), self._online[0].buffers(), strict=True):
            if not average.is_floating_point():
                average.copy_(online)  # batch norm's number of batches
        self.num_steps += progress < 1

    def _tensors(self, module: nn.Module) -> list[Tensor]:
        return super()._tensors(module) + [b for b in module.buffers() if b.is_floating_point()]


def _take_old_names(average: Average, state: dict[str, Any], prefix: str, *_: object) -> None:
    average.take_old_names(state, prefix)
