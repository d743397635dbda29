"""Find parts, such as methods and sources, by the name of their file, or by a user's own file or class."""

import ast
import difflib
import inspect
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from sslx.errors import ConfigError, MissingInput

Options = TypeVar("Options")
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Family(Generic[Options]):
    """A package whose modules are parts, each with a class ``Config`` that holds the part's options.

    flag: the option that chooses a part.  shared: files of the package that are not parts.  light: modules, apart from
    the standard library, that import neither torch nor numpy.
    """

    package: str
    flag: str
    shared: tuple[str, ...]
    light: tuple[str, ...]

    def available(self) -> tuple[str, ...]:
        """Return the names of all parts."""
        return _available(self)

    def module(self, name: str) -> ModuleType:
        """Import the module with this name, or the user's own file at this path.

        For a user's own class, as in ``my_module:MyClass``, return a module with that class as its ``Config``.  Raises
        ConfigError for an unknown name, with a similar one, and for what cannot be imported, and MissingInput for a
        file or module that does not exist.
        """
        if is_class(name):
            module = ModuleType(name)
            vars(module)["Config"] = _own_class(name, self.flag)
            return module
        path = self.path(name)
        return _own_module(path, self.flag) if is_own(name) else import_module(f"{self.package}.{name}")

    def options(self, name: str) -> type[Options]:
        """Return the ``Config`` of a part without importing the rest of its file, which may import torch for seconds.

        Only the file's constants, light imports and ``Config`` are executed.  The resulting class has the fields and
        checks of ``module(name).Config`` but is another class.  If executing only these fails, the result is
        ``module(name).Config``.  Raises what ``module`` raises.
        """
        return _options(self, absolute(name))

    def summary(self, name: str) -> str:
        """Return the first paragraph of the docstring of a part's file, or of a user's own class."""
        if is_class(name):
            return " ".join((inspect.getdoc(_own_class(name, self.flag)) or "").partition("\n\n")[0].split())
        text = self.path(name).read_text(encoding="utf-8")
        return " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())

    def path(self, name: str) -> Path:
        """Return the file of a part.  Raises ConfigError or MissingInput as ``module`` does."""
        if is_own(name):
            path = Path(absolute(name))
            if not path.is_file():
                raise MissingInput(f"{self.flag} {name}: there is no such file; a name without .py is one of sslx")
            return path
        if name not in self.available():
            close = difflib.get_close_matches(name, self.available(), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"{self.flag} {name!r} is unknown: {hint}choose from {', '.join(self.available())}, or give the path "
                "of a .py file or module:Class"
            )
        return _folder(self.package) / f"{name}.py"


def is_own(name: str) -> bool:
    """Return whether this is the path of a user's own file and not a name."""
    return name.endswith(".py")


def is_class(name: str) -> bool:
    """Return whether this is a class in a user's own module, ``my_module:MyClass``, and not a name."""
    return _CLASS.fullmatch(name) is not None


def absolute(name: str) -> str:
    """Return the name, or the absolute path of a user's own file."""
    return os.path.abspath(os.path.expanduser(name)) if is_own(name) else name


def label(name: str) -> str:
    """Return a part's name, which for a user's own file is its name without .py, and for a class that of the class."""
    return Path(name).stem if is_own(name) else name.rpartition(":")[2]


def _folder(package: str) -> Path:
    return Path(__file__).parent.joinpath(*package.split(".")[1:])


@cache
def _available(family: Family[Any]) -> tuple[str, ...]:
    names = {path.stem for path in _folder(family.package).glob("*.py")}
    return tuple(sorted(names - {"__init__", *family.shared}))


def _own_module(path: Path, flag: str) -> ModuleType:
    """Import a user's file as a module.  Its folder is appended to ``sys.path``, also for worker processes."""
    name = path.stem
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.origin or not os.path.samefile(spec.origin, path):
        other = f": there is another module of this name, {spec.origin}" if spec else ""
        raise ConfigError(f"{flag} {path} cannot be imported as the module {name}{other}: rename the file")
    try:
        return import_module(name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{flag} {path} cannot be imported: {reason}") from error


def _own_class(name: str, flag: str) -> type[Any]:
    """Import a user's class of options from a module that is installed, or is a file in the current folder."""
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:  # also for worker processes
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        if error.name not in (module_name, module_name.partition(".")[0]):
            raise ConfigError(f"{flag} {name} cannot be imported: {error}") from error
        raise MissingInput(f"{flag} {name}: no module {module_name} is installed or in {os.getcwd()}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{flag} {name} cannot be imported: {reason}") from error
    if not isinstance(found, type) or not is_dataclass(found):
        what = "does not exist" if found is None else "is no dataclass of options, as the Config of a file is"
        raise ConfigError(f"{flag} {name} cannot be used: {class_name} {what}")
    return found


@cache
def _options(family: Family[Any], name: str) -> type[Any]:
    if is_class(name):
        return _own_class(name, family.flag)
    path = family.path(name)
    with suppress(Exception):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        stand_in = ModuleType(f"{family.package}.{path.stem} (options)")
        stand_in.__file__ = str(path)  # the options' help texts are read from there
        sys.modules[stand_in.__name__] = stand_in
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.ClassDef) or _is_light(node, family.light):
                exec(compile(ast.Module([node], []), str(path), "exec"), vars(stand_in))
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                options: Any = vars(stand_in)["Config"]
                options()  # its checks may need names that were not executed
                return options
    module = family.module(name)
    if not hasattr(module, "Config"):
        raise ConfigError(f"{family.flag} {path} has no class Config, which holds its options")
    return module.Config


def _is_light(node: ast.stmt, light: tuple[str, ...]) -> bool:
    """Return whether this statement imports only modules that import neither torch nor numpy."""
    if isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return False
    return all(name.partition(".")[0] in sys.stdlib_module_names or name in light for name in names)
