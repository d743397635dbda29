"""Probes: what frozen features are worth, by kNN, a linear classifier and a few labels per class."""

from typing import TYPE_CHECKING

from sslx import later
from sslx.probe.config import Config as Config

if TYPE_CHECKING:
    from sslx.probe.probes import Score as Score
    from sslx.probe.probes import as_json as as_json
    from sslx.probe.probes import evaluate as evaluate
    from sslx.probe.probes import possible as possible
    from sslx.probe.probes import table as table
else:  # so that type checkers know every name
    __getattr__ = later.names(
        __name__,
        {
            "probes": ("Score", "as_json", "evaluate", "possible", "table"),
        },
    )
