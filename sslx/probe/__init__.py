"""Probes, which measure the quality of frozen features by kNN, linear and few-label classifiers."""

from typing import TYPE_CHECKING

from sslx import lazy
from sslx.probe.config import Config as Config

if TYPE_CHECKING:
    from sslx.probe.probes import Score as Score
    from sslx.probe.probes import as_json as as_json
    from sslx.probe.probes import evaluate as evaluate
    from sslx.probe.probes import feasible_probes as feasible_probes
else:  # at run time, these names are imported on first use
    __getattr__ = lazy.names(
        __name__,
        {
            "probes": ("Score", "as_json", "evaluate", "feasible_probes"),
        },
    )
