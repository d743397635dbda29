"""LARS: momentum SGD whose step for each tensor is in proportion to the tensor's norm (arXiv 1708.03888)."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

foreach: Any = torch  # its multi-tensor functions have no public names


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888, algorithm 1), as SimCLR uses it.

        d = gradient + weight_decay * p;  ratio = trust * |p| / |d|, 1 where a norm is 0
        v = momentum * v + lr * ratio * d;  p = p - v

    Groups with ``adapt=False`` have ratio 1 (SimCLR: biases and norms, there without decay too).  The ratio
    is over |gradient + weight_decay * p|, as in SimCLR's code and unlike the paper's |gradient| +
    weight_decay * |p|.  The learning rate is inside the momentum, as in both, unlike torch's SGD and the code of
    BYOL, SwAV, Barlow Twins, VICReg and MoCo v3: the same at a constant rate, and some ten steps later in a warm-up.
    Norms are in fp32 at least; a step brings nothing to the host.  Where ``found_inf``, () fp32 on the device, is 1,
    nothing changes, as with torch's fused optimizers.
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
        self._step_supports_amp_scaling = True  # as torch's fused optimizers: a step is none where found_inf is 1
        self._scratch: dict[tuple[int, ...], _Scratch] = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; closure as in torch's optimizers."""
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
        if group["adapt"] and _is_launched(params):
            directions = self._scaled(params, gradients, group)
        else:
            directions = list(foreach._foreach_add(gradients, params, alpha=group["weight_decay"]))
            factors = group["lr"]
            if group["adapt"]:
                factors = list((_ratios(params, directions, group["trust"]) * group["lr"]).unbind())
            foreach._foreach_mul_(directions, factors)
        # velocities = momentum * velocities + directions; params -= velocities
        if params[0].is_cpu and params[0].dtype.itemsize < 4:  # torch 2.11's fused step leaves these parameters alone
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not found_inf.item():
                foreach._foreach_mul_(velocities, group["momentum"])
                foreach._foreach_add_(velocities, directions)
                foreach._foreach_sub_(params, velocities)
            return
        foreach._fused_sgd_(
            params,
            directions,
            velocities if group["momentum"] else [],  # torch refuses momentum buffers that it would not use
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=1.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )

    def _scaled(self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The same directions times their factors, to the last bit, in a few launches in place of one a tensor."""
        key = tuple(map(id, params))
        if key not in self._scratch:
            self._scratch[key] = _Scratch(params)
        scratch = self._scratch[key]
        foreach._foreach_copy_(scratch.directions, gradients)
        foreach._foreach_add_(scratch.directions, params, alpha=group["weight_decay"])
        factors = _ratios(params, scratch.directions, group["trust"]) * group["lr"]
        scratch.flat.mul_(factors.repeat_interleave(scratch.sizes, output_size=len(scratch.flat)))
        return scratch.directions


class _Scratch:
    """Room for the directions of N tensors, one behind the other.

    directions: of the shape and layout of each tensor.  sizes: (N,) numbers that each has, up to the next one's start.
    """

    ALIGNED = 64

    def __init__(self, params: list[Tensor]) -> None:
        sizes = [-(-p.numel() // self.ALIGNED) * self.ALIGNED for p in params]
        self.flat = params[0].new_zeros(sum(sizes))
        self.sizes = torch.tensor(sizes, device=params[0].device)
        parts = self.flat.split(sizes)
        self.directions = [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, params, strict=True)]


def _is_launched(params: list[Tensor]) -> bool:
    """Whether each operator is a launch, which takes longer than what it does to a small tensor."""
    return not params[0].is_cpu


def _ratios(params: list[Tensor], directions: list[Tensor], trust: float) -> Tensor:
    """trust * |p| / |d| of each of N tensors, (N,); 1 where a norm is 0."""
    dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    above = torch.stack(foreach._foreach_norm(params, 2, dtype))
    below = torch.stack(foreach._foreach_norm(directions, 2, dtype))
    return torch.where((above > 0) & (below > 0), trust * above / below, 1.0)
