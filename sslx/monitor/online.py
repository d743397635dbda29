"""The online probe: kNN accuracy of the encoder while it trains, on a bounded sample of labeled images."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from sslx import rng
from sslx.console import activity
from sslx.data import Loader
from sslx.data.sources import Source
from sslx.monitor.config import OnlineConfig as Config
from sslx.probe import features, knn

HELD_OUT_DIVISOR = 5
"""Without a test split, one in this many training images is held out and classified."""


class OnlineProbe:
    """Measures the kNN accuracy of a fixed sample of one split on a fixed sample of the other.

    evaluation: makes this rank's loader of a source.  All ranks must call ``accuracy`` together.
    """

    def __init__(
        self,
        config: Config,
        train: Source,
        test: Source | None,
        evaluation: Callable[[Source], Loader],
        autocast: torch.dtype | None,
        seed: int,
    ) -> None:
        assert train.facts.has_classes
        order = rng.permutation(seed, "online probe", size=len(train))
        if test is None or test.facts.labels is None:
            num_held_out = min(config.num_queries, len(train) // HELD_OUT_DIVISOR)
            test, order = train.take(np.sort(order[:num_held_out])), order[num_held_out:]
        else:
            chosen = rng.permutation(seed, "online probe test", size=len(test))[: config.num_queries]
            test = test.take(np.sort(chosen))
        self._splits = train.take(np.sort(order[: config.num_references])), test
        self._num_classes, self._evaluation, self._autocast = len(train.facts.classes or ()), evaluation, autocast

    @activity.doing("probing the features (kNN)")
    def look(self, encoder: nn.Module) -> dict[str, float]:
        """Return the accuracy as the metric ``knn``."""
        return {"knn": self.accuracy(encoder)}

    def accuracy(self, encoder: nn.Module) -> float:
        """Return the kNN accuracy in [0, 1] (k = 200, or all of a smaller bank; temperature 0.07)."""
        bank, queries = (
            features.extract(encoder, self._evaluation(split), autocast=self._autocast, num_samples=len(split))
            for split in self._splits
        )
        return knn.accuracy(bank, queries, self._num_classes)
