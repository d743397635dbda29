"""Health of an encoder while it trains, without labels: effective rank, spread, alignment, uniformity; collapse.

A look uses a few images of the present step, so it needs no loader of its own and no second pass over the data.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sslx import distributed
from sslx.console import activity
from sslx.data.batch import Batch
from sslx.errors import CollapseError
from sslx.losses import spread
from sslx.monitor.config import HealthConfig as Config
from sslx.probe.features import evaluation_mode
from sslx.probe.geometry import alignment, rank_me, uniformity

LEAST = {"feature_rank": 1.05, "feature_std": 0.005, "std": 0.5}
"""A run has collapsed if it is below one of these.  Values of the digits recipes, from step 40 on:

- ``feature_rank`` and ``feature_std``, of encoders that learn: 15 to 53 and 0.18 to 0.6 for ResNets, but 1.2 to 2.9 and
  0.015 to 0.13 for small ViTs (MAE, DINO); of untrained ones at least 3 and 0.12.  Rotation at lr 30 and SimCLR at lr
  100, whose features no longer depend on the image: 1.01 and 0.0002 or less.
- ``std``, the spread of the embeddings that a loss compares by their direction, as a method logs it (losses.spread):
  0.7 to 1 for SimCLR, BYOL, SimSiam, MoCo v3, SupCon, Barlow Twins and VICReg; 0.2 to 0.45 for SimSiam without its
  stop-gradient, 0.003 without batch norm.  The features do not tell these: batch norm keeps each channel's variance
  up, and the gradient of a collapsed loss is too small to change the encoder.  Methods with prototypes compare what is
  left of a common direction: a low spread means nothing there, and they log theirs by another name.
"""

SETTLED = 40
"""``LEAST`` is judged at the end from this step on: a run that ends earlier has not learned what it could lose."""
MOST_WEIGHT = 100.0
"""A parameter tensor with a larger root mean square has been thrown about.  It is 0.01 to 2 in runs that learn, also
after loading published weights, and 1,000 or more at a learning rate of 1e6, where features need not collapse."""


class Health:
    """Looks at the features of a run from time to time.

    Every rank must call ``look`` together, and all get the same numbers.
    autocast: the dtype to autocast the encoder to, or None for full precision.
    """

    def __init__(self, config: Config, autocast: torch.dtype | None) -> None:
        self.every, self._config, self._autocast = config.every, config, autocast
        self._healthy, self._told = 0, False

    @activity.doing("looking at the features")
    def look(self, encoder: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
        """Return ``feature_rank`` (RankMe), ``feature_std`` (spread), ``feature_alignment``, ``feature_uniformity``.

        They describe the encoder's features in evaluation mode, for the first samples of this rank's batches of the
        step: equally many on each rank, config.num_samples in total or as many as there are.  Alignment compares the
        first two views of one size or, if there is only one view, the image and its mirror image.
        """
        share = max(1, self._config.num_samples // distributed.world_size())
        pairs = [_two_views(batch, share) for batch in batches[: -(-share // len(batches[0]))]]
        device = pairs[0][0].device
        with (
            evaluation_mode(encoder),
            torch.no_grad(),
            torch.autocast(device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None),
        ):
            x, y = (torch.cat([encoder(views) for views in same])[:share] for same in zip(*pairs, strict=True))
        # One gather for both; in fp64, which the smallest singular values need.
        x, y = distributed.all_gather(torch.cat([x, y], 1).double()).chunk(2, 1)
        values = {
            "feature_rank": rank_me(x),
            "feature_std": spread(x),
            "feature_alignment": alignment(x, y),
            "feature_uniformity": uniformity(x),
        }
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        return dict(zip(values, distributed.broadcast_object(numbers), strict=True))  # so that all decide alike

    def warning(self, step: int, numbers: Mapping[str, float], saved: int) -> str:
        """Return one line when a number first falls below ``LEAST``; else, or until all have recovered, "".

        numbers: those of ``look``, and the method's own ``std`` if it has one.  saved: the step of the last checkpoint,
        or 0 if there is none.  Raises CollapseError with that line if config.on_collapse is stop.
        """
        low = _low(numbers)
        was_told, self._told = self._told, bool(low)
        if not low:
            self._healthy = step
        if was_told or not low:
            return ""
        since = f"not yet at step {self._healthy:,}" if self._healthy else "at the first look"
        line = (
            f"collapse at step {step:,}, {since}: {', '.join(low)}: lower --optim.lr, take a larger --batch-size, or "
            "check what keeps the method from collapse: its stop-gradient, loss weights, batch norm"
        )
        if self._config.on_collapse == "warn":
            return line
        when = "from before" if saved <= self._healthy else "perhaps from after"
        last = f"the last checkpoint, step {saved:,}, is {when}" if saved else "there is no checkpoint"
        raise CollapseError(f"{line}; {last}")

    def last_word(self, step: int, numbers: Mapping[str, float], method: nn.Module) -> str:
        """Return one line at the end of a run that says why its weights are useless; "" if they are not.

        numbers: as for ``warning``.  Raises CollapseError with that line if config.on_collapse is stop.
        """
        name, size = largest(method)
        reasons = _low(numbers) if step >= SETTLED else []
        if size > MOST_WEIGHT:
            reasons.append(f"the root mean square of {name} is {size:.2g}, above {MOST_WEIGHT:g}")
        if not reasons:
            return ""
        line = f"this run's weights are useless at its end, step {step:,}: {', '.join(reasons)}: lower --optim.lr"
        if self._config.on_collapse == "stop":
            raise CollapseError(line)
        return line


def _low(numbers: Mapping[str, float]) -> list[str]:
    """Return the numbers that are below ``LEAST``, in words."""
    known = {name: numbers.get(name, math.inf) for name in LEAST}
    return [f"{name} {known[name]:.2g} is below {least}" for name, least in LEAST.items() if known[name] < least]


@torch.no_grad()
def largest(module: nn.Module) -> tuple[str, float]:
    """Return the name and the root mean square of the parameter tensor where it is largest; ("", 0) if none."""
    named = [(name, p.detach()) for name, p in module.named_parameters() if p.numel()]
    if not named:
        return "", 0.0
    squares = torch.stack([p.double().square().mean() for _, p in named])
    return max(zip((name for name, _ in named), squares.sqrt().tolist(), strict=True), key=lambda pair: pair[1])


def _two_views(batch: Batch, share: int) -> tuple[Tensor, Tensor]:
    """Return two views of one size of the first ``share`` samples."""
    same = [view[:share] for view in batch.views if view.shape == batch.views[0].shape]
    return (same[0], same[1]) if len(same) > 1 else (same[0], same[0].flip(3))
