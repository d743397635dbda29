"""The norm of the whole gradient and clipping by it, without a host sync."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

foreach: Any = torch  # untyped, because torch's multi-tensor functions are private


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients together, () float64 on their device.

    It is finite if and only if the norm of each gradient is finite.  The tensors' norms are combined in float64, in
    which the squares of finite float32 numbers do not overflow.  In float32, a gradient that can still be clipped could
    have an infinite norm.
    """
    norms = torch.stack(foreach._foreach_norm(gradients))
    return torch.linalg.vector_norm(norms, dtype=torch.float64)


@torch.no_grad()
def clip_by_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale the gradients in place so that their global norm is at most ``limit`` (arXiv 1211.5063, algorithm 1).

    norm: the result of ``global_norm``.  If it is not finite, neither are the clipped gradients, so decide by the norm
    whether to take the step.
    """
    factor = (limit / norm).clamp(max=1.0)  # a norm of 0 gives an infinite quotient and so a factor of 1
    foreach._foreach_mul_(gradients, factor.to(gradients[0].dtype))
