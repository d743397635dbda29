"""Where a step's time goes, operator by operator: calls, seconds, floating-point operations and bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sslx.bench import measure


@dataclass
class Cost:
    """Of all calls of an operator together.  nbytes: of its inputs and outputs, read or written once each."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0


class _Meter(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.costs = dict[str, Cost]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (own := inside(func)) is not None:
            with self:
                return own(*args, **(kwargs or {}))
        found: list[Any] = []
        spent = measure.seconds(lambda: found.append(func(*args, **(kwargs or {}))), self.device)
        name = str(func.overloadpacket).removeprefix("aten.")
        cost = self.costs.setdefault(name, Cost(name))
        cost.calls += 1
        cost.seconds += spent
        if func.is_view:
            return found[0]
        outputs = [leaf for leaf in tree_leaves(found[0]) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        cost.nbytes += sum({id(tensor): tensor.nbytes for tensor in (*inputs, *outputs)}.values())
        if formula := flop_registry.get(func.overloadpacket):
            cost.flops += formula(*args, **(kwargs or {}), out_val=found[0])
        else:
            cost.flops += sum(tensor.numel() for tensor in outputs or inputs)
        return found[0]


def inside(func: Any) -> Callable[..., Any] | None:
    """What a custom operator of torch.library calls, which a mode does not see by itself; None of others."""
    try:
        from torch._library.custom_ops import OPDEFS

        own = OPDEFS.get(func._schema.name)
        return None if own is None else own._init_fn
    except (ImportError, AttributeError):  # no public name: then the operator counts as one
        return None


def costs(run: Callable[[], object], device: torch.device) -> list[Cost]:
    """What ``run`` costs, the operator that takes longest first.

    Each operator is waited for, so that on a GPU the seconds hold each one's launch too.  An operator that is neither a
    product nor a convolution counts as one operation for each element that it gives, or changes where it gives none.
    """
    with _Meter(device) as meter:
        run()
    return sorted(meter.costs.values(), key=lambda cost: -cost.seconds)
