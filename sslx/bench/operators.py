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
    """Totals over all calls of an operator.  ``nbytes`` counts each input and output once, as read or written."""

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
        if (function := implementation(func)) is not None:
            with self:
                return function(*args, **(kwargs or {}))
        results: list[Any] = []
        elapsed_s = measure.elapsed_s(lambda: results.append(func(*args, **(kwargs or {}))), self.device)
        result = results[0]
        name = str(func.overloadpacket).removeprefix("aten.")
        cost = self.costs.setdefault(name, Cost(name))
        cost.calls += 1
        cost.seconds += elapsed_s
        if func.is_view:
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        cost.nbytes += sum({id(tensor): tensor.nbytes for tensor in (*inputs, *outputs)}.values())
        if formula := flop_registry.get(func.overloadpacket):
            cost.flops += formula(*args, **(kwargs or {}), out_val=result)
        else:
            cost.flops += sum(tensor.numel() for tensor in outputs or inputs)
        return result


def implementation(func: Any) -> Callable[..., Any] | None:
    """Return the Python function behind a custom operator of torch.library, or None for other operators.

    A dispatch mode does not see what that function calls unless it calls the function itself.  PyTorch has no public
    name for it; in a version that has moved it, a custom operator counts as one.
    """
    try:
        from torch._library.custom_ops import OPDEFS

        definition = OPDEFS.get(func._schema.name)
        return None if definition is None else definition._init_fn
    except (ImportError, AttributeError):
        return None


def costs(run: Callable[[], object], device: torch.device) -> list[Cost]:
    """Return the cost of each operator that ``run`` calls, longest first.

    Each call is waited for, so that on a GPU its seconds include the launch.  An operator other than a product or a
    convolution counts as one operation per element that it returns, or that it changes if it returns none.
    """
    with _Meter(device) as meter:
        run()
    return sorted(meter.costs.values(), key=lambda cost: -cost.seconds)
