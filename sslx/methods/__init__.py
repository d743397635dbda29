"""Methods, which are found by file name: each is a file ``sslx/methods/<name>.py`` with a Config and a Method."""

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
    shared=("base", "config", "heads", "ema", "masks"),
    light=("sslx.errors", "sslx.methods.config", "sslx.data.augment"),
)


def available() -> tuple[str, ...]:
    """Return the names of all methods."""
    return _FAMILY.available()


def module(name: str) -> ModuleType:
    """Return the module of a method, which has its ``Config``."""
    return _FAMILY.module(name)


def options(name: str) -> type[MethodConfig]:
    """Return a method's ``Config``, read without importing torch (see ``by_name.Family.options``)."""
    return _FAMILY.options(name)


def summary(name: str) -> str:
    """Return the first line of a method's file: its name and its publication."""
    return _FAMILY.summary(name)


def build(config: MethodConfig, encoder: "Encoder", average: float | None = None) -> "Method":
    """Return a config's method around an encoder; heads and moving averages get the norm of the encoder's recipe.

    average: the momentum of a moving average of the encoder that is kept beside it, or None.
    """
    from sslx.encoders import norms  # here: it imports torch

    method = config.build(encoder)
    norms.replace(method, encoder.recipe.norm)
    if average is not None:
        method.keep_average(average)
    return method


def encoders(name: str) -> tuple[Literal["resnet", "vit"], ...]:
    """Return the kinds of encoder that the method is tested with."""
    return options(name).encoders
