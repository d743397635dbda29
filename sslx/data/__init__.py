"""Data: read, decode and augment the images of a source into Batches, restartable at any batch and world size."""

from typing import TYPE_CHECKING

from sslx import lazy
from sslx.data.config import Config as Config

if TYPE_CHECKING:
    from sslx.data.loader import Backend as Backend
    from sslx.data.loader import Indices as Indices
    from sslx.data.loader import Loader as Loader
    from sslx.data.loader import evaluation as evaluation
    from sslx.data.loader import has_dali as has_dali
    from sslx.data.loader import in_order as in_order
    from sslx.data.loader import training as training
else:  # so that type checkers know every name
    __getattr__ = lazy.names(
        __name__,
        {
            "loader": ("Backend", "Indices", "Loader", "evaluation", "has_dali", "in_order", "training"),
        },
    )
