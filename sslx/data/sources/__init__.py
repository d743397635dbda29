"""Sources: what to read.  One file each; ``build`` makes the one that a config names."""

from typing import TYPE_CHECKING

from sslx import later

if TYPE_CHECKING:
    from sslx.data.sources.base import Config as Config
    from sslx.data.sources.base import Source as Source
    from sslx.data.sources.base import Split as Split
    from sslx.data.sources.base import build as build
    from sslx.data.sources.base import pretrains_on_more as pretrains_on_more
else:  # so that type checkers know every name
    __getattr__ = later.names(__name__, {"base": ("Config", "Source", "Split", "build", "pretrains_on_more")})
