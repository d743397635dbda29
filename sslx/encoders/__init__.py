"""Encoders: any timm model by name, without its classifier, in the channels_last memory format."""

from typing import TYPE_CHECKING

from sslx import lazy
from sslx.encoders.config import Config as Config
from sslx.encoders.recipe import Norm as Norm
from sslx.encoders.recipe import Recipe as Recipe

if TYPE_CHECKING:
    from sslx.encoders.encoder import Encoder as Encoder
    from sslx.encoders.encoder import accepts_size as accepts_size
    from sslx.encoders.encoder import build as build
    from sslx.encoders.encoder import rebuild as rebuild
    from sslx.encoders.vit import Tokens as Tokens
else:  # at run time, these names are imported on first use
    __getattr__ = lazy.names(
        __name__,
        {
            "encoder": ("Encoder", "build", "rebuild", "accepts_size"),
            "vit": ("Tokens",),
        },
    )
