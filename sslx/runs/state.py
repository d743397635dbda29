"""The state in a checkpoint: checks of its structure, whoever wrote it, and of finite numbers."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslx.errors import DataError

foreach: Any = torch  # torch's multi-tensor functions have no public names
RESUME = ("config", "step", "run_id", "method", "optimizer", "loader")
"""Parts of a state that a restart needs."""
VIEW = ("config", "step", "encoder", "eval_view")
"""Parts of a state that features need."""

_LARGEST_INT = 2**53
_PLAIN = (int, float, bool, str, type(None), Tensor, nn.Parameter)


def check(state: object, needs: Sequence[str], title: str) -> dict[str, Any]:
    """Return the state if it has all parts that ``needs`` names, each of the kind that sslx writes.

    A digest shows that a file is as it was written, but not who wrote it.  Raise DataError, in one line that starts
    with ``title``.
    """
    if type(state) not in (dict, OrderedDict) or not all(type(key) is str for key in cast("dict[object, Any]", state)):
        raise DataError(f"{title} was not written by sslx: expected a dict with string keys, got {_describe(state)}")
    parts = cast("dict[str, Any]", state)
    for name in (*needs, *(name for name in _OPTIONAL if name in parts and needs)):
        expected, is_valid = _KINDS[name]
        if name not in parts:
            raise DataError(f"{title} was not written by sslx: it has no {name!r}: use another checkpoint")
        if not is_valid(parts[name]):
            raise DataError(
                f"{title} was not written by sslx: expected its {name!r} to be {expected}, got "
                f"{_describe(parts[name])}: use another checkpoint"
            )
    return parts


def _describe(value: object) -> str:
    if type(value) in (int, float, bool, str, type(None)):
        return repr(value)[:40]
    length = f" of length {len(value)}" if isinstance(value, dict | list | tuple) else ""
    return f"a {type(value).__name__}{length}"


def _is_side(value: object) -> bool:
    return _is_count(value) and 0 < cast("int", value) < 2**16


def _item(value: object, name: str) -> object:
    return cast("dict[str, object]", value).get(name)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_INT


def _is_dict_of(value: object, is_valid: Callable[[object], bool]) -> bool:
    """Return whether a value is a dict with string keys whose values are all valid."""
    return isinstance(value, dict) and all(
        type(k) is str and is_valid(v) for k, v in cast("dict[Any, Any]", value).items()
    )


def _is_weights(value: object) -> bool:
    return bool(value) and _is_dict_of(value, lambda item: isinstance(item, Tensor))


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    parts = cast("dict[Any, Any]", value)
    groups, states = parts.get("param_groups"), parts.get("state")
    return (
        isinstance(groups, list)
        and isinstance(states, dict)
        and all(
            _is_dict_of(group, lambda _: True)
            and isinstance(group.get("params"), list)
            and all(map(_is_count, group["params"]))
            for group in cast("list[Any]", groups)
        )
        and all(
            _is_count(key) and _is_dict_of(state, lambda _: True)
            for key, state in cast("dict[Any, Any]", states).items()
        )
    )


def _is_loader(value: object) -> bool:
    names = ("epoch", "position", "num_samples")
    if not _is_dict_of(value, lambda _: True):
        return False
    parts = cast("dict[str, Any]", value)
    return type(parts.get("seed")) is int and all(_is_count(parts.get(name)) for name in names)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "config": ("JSON text", lambda value: type(value) is str),
    "step": ("a number of steps", _is_count),
    "run_id": ("a name", lambda value: type(value) is str),
    "method": ("tensors by name", _is_weights),
    "encoder": ("tensors by name", _is_weights),
    "optimizer": ("an optimizer's state", _is_optimizer),
    "loader": ("counts of samples and epochs", _is_loader),
    "eval_view": (
        "the settings of a view",
        lambda value: _is_dict_of(value, lambda _: True) and _is_side(_item(value, "size")),
    ),
    "size": ("a number of pixels", _is_side),
    "exported": ("the name of a module", lambda value: type(value) is str),
    "encoder_recipe": (
        "an encoder's recipe",
        lambda value: (
            _is_dict_of(value, lambda _: True)
            and type(_item(value, "name")) is str
            and _is_side(_item(value, "size"))
            and _is_side(_item(value, "channels"))
            and _is_dict_of(_item(value, "arguments"), lambda _: True)
        ),
    ),
}
_OPTIONAL = ("size", "encoder_recipe", "exported")
"""Parts that older checkpoints do not have."""


def find_foreign(value: object, name: str) -> str | None:
    """Describe a value in a state that cannot be loaded as plain data (``weights_only=True``), or return None."""
    if type(value) in (dict, OrderedDict):
        items = cast("dict[object, object]", value)
        for key in items:
            if type(key) not in (str, int):
                return f"{name}: key {key!r} is not a string or an int"
        problems = (find_foreign(item, f"{name}[{key!r}]") for key, item in items.items())
        return next(filter(None, problems), None)
    if type(value) in (list, tuple):
        problems = (find_foreign(item, f"{name}[{i}]") for i, item in enumerate(cast("list[object]", value)))
        return next(filter(None, problems), None)
    if type(value) in _PLAIN:
        return None
    kind = type(value).__qualname__
    return f"{name} is a {kind}: expected tensors, numbers, strings, None, dicts, lists and tuples"


@torch.no_grad()
def not_finite(state: object, name: str = "") -> list[str]:
    """Return the names of the tensors in a tree of dicts, lists and tuples that hold a non-finite number.

    It takes one pass over the tensors and one wait for the device.
    """
    tensors = [(key, x) for key, x in _tensors(state, name) if x.is_floating_point() and x.numel()]
    if not tensors:
        return []
    norms = foreach._foreach_norm([x for _, x in tensors], 2, torch.float64)  # fp64, in which no fp32 norm overflows
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
