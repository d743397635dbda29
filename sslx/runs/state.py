"""What a checkpoint's state is made of: checked when it is loaded, whoever wrote it, and for finite numbers."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslx.errors import DataError

foreach: Any = torch  # its multi-tensor functions have no public names
RESUME = ("config", "step", "run_id", "method", "optimizer", "loader")
"""What a restart needs of a state."""
VIEW = ("config", "step", "encoder", "eval_view")
"""What features need of a state."""

_LARGEST = 2**53
_PLAIN = (int, float, bool, str, type(None), Tensor, nn.Parameter)


def check(state: object, needs: Sequence[str], what: str) -> dict[str, Any]:
    """The state itself, once it has all that ``needs`` names, each of the kind that sslx writes.

    A digest shows that a file is as it was written, not who wrote it.  DataError in one line that starts with ``what``.
    """
    if type(state) not in (dict, OrderedDict) or not all(type(key) is str for key in cast("dict[object, Any]", state)):
        raise DataError(f"{what} is not one that sslx wrote: expected a dict by name, got {_kind(state)}")
    parts = cast("dict[str, Any]", state)
    for name in (*needs, *(name for name in _OPTIONAL if name in parts and needs)):
        expected, holds = _KINDS[name]
        if name not in parts:
            raise DataError(f"{what} is not one that sslx wrote: it has no {name!r}: take another checkpoint")
        if not holds(parts[name]):
            raise DataError(
                f"{what} is not one that sslx wrote: expected its {name!r} to be {expected}, got {_kind(parts[name])}: "
                "take another checkpoint"
            )
    return parts


def _kind(value: object) -> str:
    if type(value) in (int, float, bool, str, type(None)):
        return repr(value)[:40]
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, dict | list | tuple) else "")


def _side(value: object) -> bool:
    return _count(value) and 0 < cast("int", value) < 2**16


def _item(value: object, name: str) -> object:
    return cast("dict[str, object]", value).get(name)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _named(value: object, holds: Callable[[object], bool]) -> bool:
    """Whether it is a dict by name of what ``holds``."""
    return isinstance(value, dict) and all(
        type(k) is str and holds(v) for k, v in cast("dict[Any, Any]", value).items()
    )


def _weights(value: object) -> bool:
    return bool(value) and _named(value, lambda item: isinstance(item, Tensor))


def _optimizer(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    parts = cast("dict[Any, Any]", value)
    groups, states = parts.get("param_groups"), parts.get("state")
    return (
        isinstance(groups, list)
        and isinstance(states, dict)
        and all(
            _named(group, lambda _: True)
            and isinstance(group.get("params"), list)
            and all(map(_count, group["params"]))
            for group in cast("list[Any]", groups)
        )
        and all(_count(key) and _named(each, lambda _: True) for key, each in cast("dict[Any, Any]", states).items())
    )


def _loader(value: object) -> bool:
    names = ("epoch", "position", "num_samples")
    if not _named(value, lambda _: True):
        return False
    parts = cast("dict[str, Any]", value)
    return type(parts.get("seed")) is int and all(_count(parts.get(name)) for name in names)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "config": ("JSON text", lambda value: type(value) is str),
    "step": ("a number of steps", _count),
    "run_id": ("a name", lambda value: type(value) is str),
    "method": ("tensors by name", _weights),
    "encoder": ("tensors by name", _weights),
    "optimizer": ("an optimizer's state", _optimizer),
    "loader": ("counts of samples and epochs", _loader),
    "eval_view": (
        "the settings of a view",
        lambda value: _named(value, lambda _: True) and _side(_item(value, "size")),
    ),
    "size": ("a number of pixels", lambda value: _side(value)),
    "exported": ("the name of a module", lambda value: type(value) is str),
    "encoder_recipe": (
        "an encoder's recipe",
        lambda value: (
            _named(value, lambda _: True)
            and type(_item(value, "name")) is str
            and _side(_item(value, "size"))
            and _side(_item(value, "channels"))
            and _named(_item(value, "arguments"), lambda _: True)
        ),
    ),
}
_OPTIONAL = ("size", "encoder_recipe", "exported")
"""What only newer checkpoints have."""


def foreign(value: object, name: str) -> str | None:
    """What in a state cannot be loaded as plain data (``weights_only=True``), by name; None where all can."""
    if type(value) in (dict, OrderedDict):
        items = cast("dict[object, object]", value)
        bad = [f"{name}: key {key!r} is no string or int" for key in items if type(key) not in (str, int)]
        found = (foreign(item, f"{name}[{key!r}]") for key, item in items.items())
        return next(iter(bad), None) or next(filter(None, found), None)
    if type(value) in (list, tuple):
        found = (foreign(item, f"{name}[{i}]") for i, item in enumerate(cast("list[object]", value)))
        return next(filter(None, found), None)
    if type(value) in _PLAIN:
        return None
    kind = type(value).__qualname__
    return f"{name} is a {kind}: a state holds tensors, numbers, strings, None, dicts, lists and tuples"


@torch.no_grad()
def not_finite(state: object, name: str = "") -> list[str]:
    """The tensors in a tree of dicts, lists and tuples that hold something not finite, by name.

    One pass over them and one wait for the device.
    """
    tensors = [(key, x) for key, x in _tensors(state, name) if x.is_floating_point() and x.numel()]
    if not tensors:
        return []
    norms = foreach._foreach_norm([x for _, x in tensors], 2, torch.float64)  # in which no fp32 number overflows
    if bool(torch.stack(norms).isfinite().all()):
        return []
    return [key for key, x in tensors if not x.isfinite().all()]


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        tree = cast("dict[object, object] | list[object]", value)
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(item, f"{name}.{key}" if name else str(key))
