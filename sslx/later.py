"""Names of a package that are imported when they are first used.

A package's ``Config`` is what reading flags and printing help need, in well under a second; torch takes two.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names(package: str, where: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: module -> the names in it that are the package's too.

    A name that is in none of them is an AttributeError, after which Python looks for a submodule.
    """
    module_of = {name: f"{package}.{module}" for module, inside in where.items() for name in inside}

    def find(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find
