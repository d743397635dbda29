"""Optimizers by name: LARS, SGD and AdamW, with weight decay where it belongs."""

from typing import TYPE_CHECKING

from sslx import later
from sslx.optim.config import Config as Config

if TYPE_CHECKING:
    from sslx.optim.lars import LARS as LARS
    from sslx.optim.optimizers import build as build
    from sslx.optim.optimizers import load_state as load_state
    from sslx.optim.optimizers import peak_lr as peak_lr
    from sslx.optim.optimizers import set_lr as set_lr
else:  # so that type checkers know every name
    __getattr__ = later.names(
        __name__,
        {
            "lars": ("LARS",),
            "optimizers": ("build", "load_state", "peak_lr", "set_lr"),
        },
    )
