"""Batch: what every loader delivers and every method receives."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """The views of this rank's B samples.

    views: one (B, 3, H, W) tensor per view, sizes may differ (multi-crop); channels_last, normalised with the
      view's mean and std, in the compute dtype, on the compute device.
    label: (B,) int64 on the same device, or None where the source has no labels.
    index: (B,) int64 on the CPU: each sample's place in its source.
    draws: (B, num_draws) float32 in [0, 1) on the compute device, a function of (seed, epoch, sample), for what a
      method draws itself (masks, permutations); None where its ``num_draws`` is 0.
    """

    views: tuple[Tensor, ...]
    label: Tensor | None
    index: Tensor
    draws: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The same batch on a device and in a compute dtype; channels_last survives."""
        return Batch(
            tuple(view.to(device, dtype, non_blocking=True) for view in self.views),
            None if self.label is None else self.label.to(device, non_blocking=True),
            self.index,
            None if self.draws is None else self.draws.to(device, non_blocking=True),
        )
