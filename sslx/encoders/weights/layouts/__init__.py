"""Layouts, found by file name: each file ``sslx/encoders/weights/layouts/<name>.py`` has a ``LAYOUT`` (README.md)."""

from sslx.by_name import Family
from sslx.encoders.weights.layouts.base import Layout as Layout

_FAMILY = Family[object]("sslx.encoders.weights.layouts", "the layout", shared=("base",), light=())


def available() -> tuple[str, ...]:
    """Return the names of all layouts."""
    return _FAMILY.available()


def layout(name: str) -> Layout:
    """Return the layout with this name."""
    return _FAMILY.module(name).LAYOUT


def summary(name: str) -> str:
    """Return the first paragraph of a layout's file: whose names it has."""
    return _FAMILY.summary(name)
