"""LARS: momentum SGD in which each tensor's step is proportional to the tensor's norm (arXiv 1708.03888)."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

foreach: Any = torch  # untyped, because torch's multi-tensor functions are private


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888, algorithm 1), as SimCLR uses it.

        d = gradient + weight_decay * p;  ratio = trust * |p| / |d|, or 1 if a norm is 0
        v = momentum * v + lr * ratio * d;  p = p - v

    Groups with ``adapt=False`` have ratio 1 (in SimCLR biases and norms, which are not decayed either).  The ratio's
    denominator is |gradient + weight_decay * p|, as in SimCLR's code; the paper has |gradient| + weight_decay * |p|.
    The momentum includes the learning rate, as in both, unlike in torch's SGD and the code of BYOL, SwAV,
    Barlow Twins, VICReg and MoCo v3.  This makes no difference at a constant rate, and a delay of about ten steps in a
    warm-up.  Norms are in fp32 or fp64, and a step does not sync with the host.  If ``found_inf``, () fp32 on the
    device, is 1, the step changes nothing, as in torch's fused optimizers.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "adapt": True})
        self._step_supports_amp_scaling = True  # tells torch's GradScaler that a step reads found_inf
        self._buffers: dict[tuple[int, ...], _DirectionBuffer] = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.  ``closure`` is that of torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
        velocities = [self.state[p]["velocity"] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        if group["adapt"] and _launches_kernels(params):
            directions = self._fused_directions(params, gradients, group)
        else:
            directions = list(foreach._foreach_add(gradients, params, alpha=group["weight_decay"]))
            factors = group["lr"]
            if group["adapt"]:
                factors = list((_ratios(params, directions, group["trust"]) * group["lr"]).unbind())
            foreach._foreach_mul_(directions, factors)
        # velocities = momentum * velocities + directions; params -= velocities
        if params[0].is_cpu and params[0].dtype.itemsize < 4:  # torch 2.11's fused step does not change these
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not found_inf.item():
                foreach._foreach_mul_(velocities, group["momentum"])
                foreach._foreach_add_(velocities, directions)
                foreach._foreach_sub_(params, velocities)
            return
        foreach._fused_sgd_(
            params,
            directions,
            velocities if group["momentum"] else [],  # torch refuses unused momentum buffers
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )

    def _fused_directions(self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Compute lr * ratio * d in a few kernel launches, with the same bits as one launch per tensor would."""
        key = tuple(map(id, params))
        if key not in self._buffers:
            self._buffers[key] = _DirectionBuffer(params)
        buffer = self._buffers[key]
        foreach._foreach_copy_(buffer.directions, gradients)
        foreach._foreach_add_(buffer.directions, params, alpha=group["weight_decay"])
        factors = _ratios(params, buffer.directions, group["trust"]) * group["lr"]
        buffer.flat.mul_(factors.repeat_interleave(buffer.sizes, output_size=len(buffer.flat)))
        return buffer.directions


class _DirectionBuffer:
    """One flat buffer for the directions of N tensors.

    directions: a view of the buffer for each tensor, with the tensor's shape and strides.
    sizes: (N,) number of elements of the buffer for each tensor, padded for alignment.
    """

    ALIGNMENT = 64

    def __init__(self, params: list[Tensor]) -> None:
        sizes = [-(-p.numel() // self.ALIGNMENT) * self.ALIGNMENT for p in params]
        self.flat = params[0].new_zeros(sum(sizes))
        self.sizes = torch.tensor(sizes, device=params[0].device)
        parts = self.flat.split(sizes)
        self.directions = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, params, strict=True)]


def _launches_kernels(params: list[Tensor]) -> bool:
    """Return whether each operator is a kernel launch, which takes longer than the work on a small tensor."""
    return not params[0].is_cpu


def _ratios(params: list[Tensor], directions: list[Tensor], trust: float) -> Tensor:
    """Return trust * |p| / |d| for each of N tensors, (N,), or 1 if a norm is 0."""
    dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    param_norms = torch.stack(foreach._foreach_norm(params, 2, dtype))
    direction_norms = torch.stack(foreach._foreach_norm(directions, 2, dtype))
    both_positive = (param_norms > 0) & (direction_norms > 0)
    return torch.where(both_positive, trust * param_norms / direction_norms, 1.0)
