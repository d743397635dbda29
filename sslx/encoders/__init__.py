"""Encoders: any timm trunk by name, without its classifier, in channels_last."""

from typing import TYPE_CHECKING

from sslx import later
from sslx.encoders.config import Config as Config

if TYPE_CHECKING:
    from sslx.encoders.encoder import SMALL as SMALL
    from sslx.encoders.encoder import Encoder as Encoder
    from sslx.encoders.encoder import build as build
    from sslx.encoders.encoder import is_plain_vit as is_plain_vit
    from sslx.encoders.encoder import takes as takes
else:  # so that type checkers know every name
    __getattr__ = later.names(
        __name__,
        {
            "encoder": ("Encoder", "SMALL", "build", "is_plain_vit", "takes"),
        },
    )
