"""Encoders: any timm trunk by name, without its classifier, in channels_last."""

from typing import TYPE_CHECKING

from sslx import later
from sslx.encoders.config import Config as Config
from sslx.encoders.recipe import Norm as Norm
from sslx.encoders.recipe import Recipe as Recipe

if TYPE_CHECKING:
    from sslx.encoders.encoder import Encoder as Encoder
    from sslx.encoders.encoder import build as build
    from sslx.encoders.encoder import rebuild as rebuild
    from sslx.encoders.encoder import takes as takes
    from sslx.encoders.vit import Tokens as Tokens
else:  # so that type checkers know every name
    __getattr__ = later.names(
        __name__,
        {
            "encoder": ("Encoder", "build", "rebuild", "takes"),
            "vit": ("Tokens",),
        },
    )
