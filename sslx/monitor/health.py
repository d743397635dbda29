"""Label-free health of an encoder while it trains: effective rank, spread, alignment and uniformity of its features.

Each measurement uses a few images of the current step, so it needs neither a separate loader nor another pass over the
data.
"""

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

MINIMA = {"feature_rank": 1.05, "feature_std": 0.005, "std": 0.5}
"""A run has collapsed if a metric is below its minimum.  Values of the digits recipes, from step 40 on:

- ``feature_rank`` and ``feature_std``, of encoders that learn: 15 to 53 and 0.18 to 0.6 for ResNets, but 1.2 to 2.9 and
  0.015 to 0.13 for small ViTs (MAE, DINO); of untrained ones at least 3 and 0.12.  Rotation at lr 30 and SimCLR at lr
  100, whose features no longer depend on the image: 1.01 and 0.0002 or less.
- ``std``, the spread of the embeddings that a loss compares by their direction, as a method logs it (losses.spread):
  0.7 to 1 for SimCLR, BYOL, SimSiam, MoCo v3, SupCon, Barlow Twins and VICReg; 0.2 to 0.45 for SimSiam without its
  stop-gradient, 0.003 without batch norm.  The features do not show this collapse: batch norm keeps each channel's
  variance up, and the gradient of a collapsed loss is too small to change the encoder.  Embeddings that are compared
  with prototypes may share a direction, so a low spread means nothing, and these methods log it by another name.
"""

MIN_JUDGED_STEP = 40
"""Runs that end before this step are not judged by ``MINIMA``: they have not learned anything yet."""
MAX_WEIGHT_RMS = 100.0
"""Weights are useless if the root mean square of a parameter tensor is larger.  It is 0.01 to 2 in runs that learn,
also after loading published weights, and 1,000 or more at a learning rate of 1e6, where features may not collapse."""


class Health:
    """Measures the features of a run from time to time.

    All ranks must call ``look`` together, and all get the same numbers.
    autocast: the dtype to autocast the encoder to, or None for full precision.
    """

    def __init__(self, config: Config, autocast: torch.dtype | None) -> None:
        self.every, self._config, self._autocast = config.every, config, autocast
        self._last_healthy_step, self._has_warned = 0, False

    @activity.doing("looking at the features")
    def look(self, encoder: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
        """Return ``feature_rank`` (RankMe), ``feature_std`` (spread), ``feature_alignment``, ``feature_uniformity``.

        They describe the encoder's features in evaluation mode, for the first samples of each rank's batches: the same
        number on each rank, and config.num_samples in total if there are as many.  Alignment compares the first two
        views of one size or, if there is only one view, the image and its mirror image.
        """
        num_own = max(1, self._config.num_samples // distributed.world_size())
        pairs = [_two_views(batch, num_own) for batch in batches[: -(-num_own // len(batches[0]))]]
        device = pairs[0][0].device
        with (
            evaluation_mode(encoder),
            torch.no_grad(),
            torch.autocast(device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None),
        ):
            x, y = (
                torch.cat([encoder(views) for views in first_or_second])[:num_own]
                for first_or_second in zip(*pairs, strict=True)
            )
        # One gather for both; in fp64, which the smallest singular values need.
        x, y = distributed.all_gather(torch.cat([x, y], 1).double()).chunk(2, 1)
        values = {
            "feature_rank": rank_me(x),
            "feature_std": spread(x),
            "feature_alignment": alignment(x, y),
            "feature_uniformity": uniformity(x),
        }
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        numbers = distributed.broadcast_object(numbers)  # so that all ranks decide the same
        return dict(zip(values, numbers, strict=True))

    def warning(self, step: int, numbers: Mapping[str, float], saved: int) -> str:
        """Return a line when a metric first falls below its minimum; else, or until all have recovered, "".

        numbers: those of ``look``, and the method's own ``std`` if it has one.  saved: the step of the last checkpoint,
        or 0 if there is none.  Raises CollapseError with that line if config.on_collapse is stop.
        """
        low = _low(numbers)
        had_warned, self._has_warned = self._has_warned, bool(low)
        if not low:
            self._last_healthy_step = step
        if had_warned or not low:
            return ""
        since = f"not yet at step {self._last_healthy_step:,}" if self._last_healthy_step else "at the first look"
        line = (
            f"collapse at step {step:,}, {since}: {', '.join(low)}: lower --optim.lr, take a larger --batch-size, or "
            "check what keeps the method from collapse: its stop-gradient, loss weights, batch norm"
        )
        if self._config.on_collapse == "warn":
            return line
        when = "from before" if saved <= self._last_healthy_step else "perhaps from after"
        last = f"the last checkpoint, step {saved:,}, is {when}" if saved else "there is no checkpoint"
        raise CollapseError(f"{line}; {last}")

    def last_word(self, step: int, numbers: Mapping[str, float], method: nn.Module) -> str:
        """Return one line at the end of a run that says why its weights are useless; "" if they are not.

        numbers: as for ``warning``.  Raises CollapseError with that line if config.on_collapse is stop.
        """
        name, size = largest(method)
        reasons = _low(numbers) if step >= MIN_JUDGED_STEP else []
        if size > MAX_WEIGHT_RMS:
            reasons.append(f"the root mean square of {name} is {size:.2g}, above {MAX_WEIGHT_RMS:g}")
        if not reasons:
            return ""
        line = f"this run's weights are useless at its end, step {step:,}: {', '.join(reasons)}: lower --optim.lr"
        if self._config.on_collapse == "stop":
            raise CollapseError(line)
        return line


def _low(numbers: Mapping[str, float]) -> list[str]:
    """Return a phrase for each metric that is below its minimum."""
    measured = {name: numbers[name] for name in MINIMA if name in numbers}
    return [f"{name} {value:.2g} is below {MINIMA[name]}" for name, value in measured.items() if value < MINIMA[name]]


@torch.no_grad()
def largest(module: nn.Module) -> tuple[str, float]:
    """Return the name and root mean square of the parameter tensor whose root mean square is largest, or ("", 0)."""
    named = [(name, p.detach()) for name, p in module.named_parameters() if p.numel()]
    if not named:
        return "", 0.0
    squares = torch.stack([p.double().square().mean() for _, p in named])
    return max(zip((name for name, _ in named), squares.sqrt().tolist(), strict=True), key=lambda pair: pair[1])


def _two_views(batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return two views of one size of the first ``num_samples`` samples."""
    same_size = [view[:num_samples] for view in batch.views if view.shape == batch.views[0].shape]
    first = same_size[0]
    return first, same_size[1] if len(same_size) > 1 else first.flip(3)
