"""sslx: self-supervised pretraining of image encoders.  Importing it imports nothing heavy.

``sslx.pretrain(recipe, dataset=...)`` trains an encoder: see ``sslx.train.python``.  ``sslx.load(path)`` reads a
checkpoint: see ``sslx.trained``.  ``sslx.image_paths(folder)`` lists images.
"""

from typing import TYPE_CHECKING

from sslx import lazy

__version__ = "0.2.0"

if TYPE_CHECKING:
    from sslx.train.python import pretrain as pretrain
    from sslx.trained import Trained as Trained
    from sslx.trained import image_paths as image_paths
    from sslx.trained import load as load
else:  # so that type checkers know every name
    __getattr__ = lazy.names(__name__, {"trained": ("Trained", "image_paths", "load"), "train.python": ("pretrain",)})
