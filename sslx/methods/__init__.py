"""Methods, found by file name: a file ``sslx/methods/<name>.py`` with a Config that builds a Method is one."""

from types import ModuleType
from typing import TYPE_CHECKING, Literal

from sslx.by_name import Family
from sslx.methods.config import MethodConfig

if TYPE_CHECKING:
    from sslx.encoders import Encoder
    from sslx.methods.base import Method

_FAMILY = Family[MethodConfig](
    "sslx.methods",
    "--method.name",
    shared=("base", "config", "heads", "ema"),
    light=("sslx.errors", "sslx.methods.config", "sslx.data.augment"),
)


def available() -> tuple[str, ...]:
    """The names of all methods."""
    return _FAMILY.available()


def module(name: str) -> ModuleType:
    """The method's module, with its ``Config``."""
    return _FAMILY.module(name)


def options(name: str) -> type[MethodConfig]:
    """The ``Config`` of a method's file, read without torch: see ``by_name.Family.options``."""
    return _FAMILY.options(name)


def summary(name: str) -> str:
    """The first line of the method's file: what it is, and where it was published."""
    return _FAMILY.summary(name)


def build(config: MethodConfig, encoder: "Encoder") -> "Method":
    """The method of a config around an encoder; its heads and moving averages have the norm of the encoder's recipe."""
    from sslx.encoders import norms  # here: it imports torch

    method = config.build(encoder)
    norms.replace(method, encoder.recipe.norm)
    return method


def encoders(name: str) -> tuple[Literal["resnet", "vit"], ...]:
    """The kinds of encoder that the method is tested with."""
    return options(name).encoders
