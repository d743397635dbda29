"""Sources, found by file name: each file ``sslx/data/sources/<name>.py`` has a Config that builds a Source."""

from typing import TYPE_CHECKING

from sslx import lazy
from sslx.by_name import Family
from sslx.data.sources.config import SourceConfig as SourceConfig
from sslx.data.sources.config import Split as Split

_FAMILY = Family[SourceConfig](
    "sslx.data.sources",
    "--source.name",
    shared=(
        "base",
        "channels",
        "config",
        "labels",
        "listing",
        "listing_cache",
        "located",
        "packed",
        "paths",
        "remote",
        "row_groups",
        "shard_cache",
        "shards",
        "sides",
        "splits",
        "torchvision_sets",
    ),
    light=(
        "sslx.errors",
        "sslx.data.sources.config",
        "sslx.data.sources.splits",
        "sslx.data.sources.torchvision_sets",
    ),
)


def available() -> tuple[str, ...]:
    """Return the names of all sources."""
    return _FAMILY.available()


def options(name: str) -> type[SourceConfig]:
    """Return the ``Config`` of a source's file, read without numpy: see ``by_name.Family.options``."""
    return _FAMILY.options(name)


def config(name: str) -> type[SourceConfig]:
    """Return the ``Config`` of a source's file, which can build the source."""
    return _FAMILY.module(name).Config


def summary(name: str) -> str:
    """Return the first paragraph of the docstring of a source's file."""
    return _FAMILY.summary(name)


if TYPE_CHECKING:
    from sslx.data.sources.base import Context as Context
    from sslx.data.sources.base import Encoded as Encoded
    from sslx.data.sources.base import Files as Files
    from sslx.data.sources.base import Pixels as Pixels
    from sslx.data.sources.base import Source as Source
    from sslx.data.sources.base import build as build
else:  # so that type checkers know every name
    __getattr__ = lazy.names(__name__, {"base": ("Context", "Encoded", "Files", "Pixels", "Source", "build")})
