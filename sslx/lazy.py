"""Lazy imports: names of a package that are imported on first use.

Parsing flags and printing help need only the packages' ``Config`` classes, in well under a second, and torch takes two.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names(package: str, names_by_module: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package that imports the given names from its modules on first use.

    Other names raise AttributeError, after which Python looks for a submodule.
    """
    module_of = {
        name: f"{package}.{module}" for module, module_names in names_by_module.items() for name in module_names
    }

    def import_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return import_name
