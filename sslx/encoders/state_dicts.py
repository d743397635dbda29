"""Strict loading of state dicts, whose names may have the prefixes of DDP and torch.compile."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sslx.errors import DataError


@runtime_checkable
class TakesOldNames(Protocol):
    """A module whose state had other names in an earlier version."""

    def take_old_names(self, state: dict[str, Any], prefix: str) -> None: ...


def load(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    source: str,
    *,
    expected: str | None = None,
    got: str | None = None,
) -> None:
    """Load a state dict strictly, whether or not DDP or torch.compile has wrapped either side.

    source: where the state dict comes from, for the error message.
    expected, got: names of the module's and the state dict's architectures, if known.
    Raises a one-line DataError, and leaves the module unchanged, if names or shapes differ.
    """
    own = module.state_dict()
    own_names = {unwrapped(name): name for name in own}
    tensors = {unwrapped(name): tensor for name, tensor in state_dict.items()}
    for prefix, part in module.named_modules():
        if isinstance(part, TakesOldNames):
            part.take_old_names(tensors, f"{unwrapped(prefix)}.")
    shapes = {
        name: f"{name} {tuple(own[own_names[name]].shape)}, not {tuple(tensors[name].shape)}"
        for name in own_names.keys() & tensors.keys()
        if isinstance(tensors[name], Tensor) and own[own_names[name]].shape != tensors[name].shape
    }
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, kind in (
            ([name for name in own_names if name not in tensors], "missing"),
            ([name for name in tensors if name not in own_names], "unexpected"),
            ([shapes[name] for name in own_names if name in shapes], "of another shape"),
        )
        if names
    ]
    if problems:
        architectures = f"expected {expected or '?'}, got {got or '?'}; " if expected or got else ""
        raise DataError(
            f"{source} does not fit: {architectures}of {len(own)} keys {', '.join(problems)}: "
            "build the model as in the run's config.json, or use other weights"
        )
    module.load_state_dict({own_names[name]: tensor for name, tensor in tensors.items()}, strict=True)


def unwrapped(name: str) -> str:
    """Return the name of a tensor without the prefixes of DDP and torch.compile."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)
