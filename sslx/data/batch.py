"""Batch: the views, labels, texts and draws that loaders deliver to methods."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """The views of this rank's B samples.

    views: one (B, C, H, W) tensor for each view; sizes may differ (multi-crop).  They are channels_last, normalized
      with the view's mean and std, in the compute dtype and on the compute device.
    label: (B,) int64 on the same device, or None if the source has no labels.
    index: (B,) int64 on the CPU, each sample's place in its source.
    text: (B, L) int64 on the device, the tokens of a caption of each sample, if the method asks for texts.
    draws: the arrays that ``Method.draw`` made for this batch (masks, permutations), on the compute device.
    """

    views: tuple[Tensor, ...]
    label: Tensor | None
    index: Tensor
    draws: tuple[Tensor, ...] = ()
    text: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Return the same batch on a device and in a compute dtype, still channels_last."""
        return Batch(
            tuple(view.to(device, dtype, non_blocking=True) for view in self.views),
            None if self.label is None else self.label.to(device, non_blocking=True),
            self.index,
            tuple(draw.to(device, non_blocking=True) for draw in self.draws),
            None if self.text is None else self.text.to(device, non_blocking=True),
        )
