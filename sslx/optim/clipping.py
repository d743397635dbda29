"""The norm of the whole gradient, and clipping by it.  Nothing here waits for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

foreach: Any = torch  # its multi-tensor functions have no public names


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, () float64 on their device; finite only where each one's norm is.

    The norms of the tensors are put together in float64, where the squares of finite float32 numbers do not overflow:
    else a gradient that can still be clipped would have an infinite norm.
    """
    norms = torch.stack(foreach._foreach_norm(gradients))
    return torch.linalg.vector_norm(norms, dtype=torch.float64)


@torch.no_grad()
def clip_by_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale the gradients, in place, so that their global norm is at most ``limit`` (arXiv 1211.5063, algorithm 1).

    norm: what ``global_norm`` gave.  Where it is not finite, neither are the gradients afterwards: whether a step may
    be taken has to be decided from the norm, before.
    """
    factor = (limit / norm).clamp(max=1.0)  # a norm of 0 gives an infinite quotient, so a factor of 1
    foreach._foreach_mul_(gradients, factor.to(gradients[0].dtype))
