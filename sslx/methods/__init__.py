"""Methods, found by file name: a file ``sslx/methods/<name>.py`` with Config, views and Method is one."""

import difflib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from sslx.errors import ConfigError

_SHARED = ("__init__", "base", "heads", "ema", "multicrop")


@cache
def available() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SHARED))


def module(name: str) -> ModuleType:
    """The method's module: ``Config``, ``views(config, augment, size)`` and ``Method(config, encoder)``."""
    if name not in available():
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--method.name {name!r} is unknown: {hint}choose from {', '.join(available())}")
    return import_module(f"sslx.methods.{name}")


def encoders(name: str) -> tuple[Literal["resnet", "vit"], ...]:
    """What the method is to be tested with: its module's ``ENCODERS``, else a ResNet."""
    return getattr(module(name), "ENCODERS", ("resnet",))
