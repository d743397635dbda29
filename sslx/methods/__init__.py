"""Methods, found by file name: a file ``sslx/methods/<name>.py`` with a Config that builds a Method is one."""

import ast
import difflib
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from sslx.errors import ConfigError
from sslx.methods.config import MethodConfig

if TYPE_CHECKING:
    from sslx.encoders import Encoder
    from sslx.methods.base import Method

_SHARED = ("__init__", "base", "config", "heads", "ema", "multicrop")
_LIGHT = ("sslx.errors", "sslx.methods.config", "sslx.data.augment")
"""Modules that import neither torch nor numpy."""


@cache
def available() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _SHARED))


def module(name: str) -> ModuleType:
    """The method's module, with its ``Config``."""
    return import_module(f"sslx.methods.{_known(name)}")


def build(config: MethodConfig, encoder: "Encoder") -> "Method":
    """The method of a config around an encoder; its heads and moving averages have the norm of the encoder's recipe."""
    from sslx.encoders import norms  # here: it imports torch

    method = config.build(encoder)
    norms.replace(method, encoder.recipe.norm)
    return method


def _known(name: str) -> str:
    if name not in available():
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--method.name {name!r} is unknown: {hint}choose from {', '.join(available())}")
    return name


@cache
def options(name: str) -> type[MethodConfig]:
    """The ``Config`` of a method's file without the rest of it, which imports torch for seconds.

    Of the file only constants, light imports and that class are executed: it has the fields and checks of
    ``module(name).Config``, but is another class.  Where it needs more, it is that one.
    """
    path = Path(__file__).parent / f"{_known(name)}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    alone = ModuleType(f"sslx.methods.{name} (options)")
    alone.__file__ = str(path)  # where the texts of the options are read
    sys.modules[alone.__name__] = alone
    with suppress(Exception):
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.ClassDef) or (
                isinstance(node, ast.ImportFrom | ast.Import) and _is_light(node)
            ):
                exec(compile(ast.Module([node], []), str(path), "exec"), vars(alone))
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                found: Any = vars(alone)["Config"]
                found()  # its checks may need what was left out
                return found
    return module(name).Config


def _is_light(node: ast.ImportFrom | ast.Import) -> bool:
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(name.partition(".")[0] in sys.stdlib_module_names or name in _LIGHT for name in names)


def summary(name: str) -> str:
    """The first line of the method's file: what it is, and where it was published."""
    text = (Path(__file__).parent / f"{_known(name)}.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())


def encoders(name: str) -> tuple[Literal["resnet", "vit"], ...]:
    """The kinds of encoder that the method is tested with."""
    return options(name).encoders
