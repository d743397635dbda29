"""Optimizers by name (LARS, SGD, AdamW), their parameter groups, schedules and gradient clipping."""

from typing import TYPE_CHECKING

from sslx import lazy
from sslx.optim.config import Config as Config

if TYPE_CHECKING:
    from sslx.optim.clipping import clip_by_norm as clip_by_norm
    from sslx.optim.clipping import global_norm as global_norm
    from sslx.optim.lars import LARS as LARS
    from sslx.optim.optimizers import build as build
    from sslx.optim.optimizers import load_state as load_state
    from sslx.optim.optimizers import of_groups as of_groups
    from sslx.optim.schedule import Schedule as Schedule
    from sslx.optim.schedule import peak_lr as peak_lr
else:  # at run time, these names are imported on first use
    __getattr__ = lazy.names(
        __name__,
        {
            "clipping": ("clip_by_norm", "global_norm"),
            "lars": ("LARS",),
            "optimizers": ("build", "load_state", "of_groups"),
            "schedule": ("Schedule", "peak_lr"),
        },
    )
