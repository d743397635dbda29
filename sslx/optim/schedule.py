"""Schedule of the learning rate and the weight decay."""

import math
from dataclasses import dataclass

import torch

from sslx.optim.config import Config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate and the weight decay as functions of progress, the fraction of training that is done.

    peak_lr: learning rate after the warm-up.  warmup: fraction of training that the warm-up takes.
    weight_decay, weight_decay_end: weight decay at the beginning and at the end of training.

    A schedule has no state.  A run that resumes from a checkpoint therefore has the same values as an uninterrupted
    one, and a step that is skipped because it is not finite does not affect later values.

        schedule = optim.Schedule.of(config, batch_size)
        schedule.apply(optimizer, (step + 0.5) / num_steps)
    """

    peak_lr: float
    warmup: float
    weight_decay: float
    weight_decay_end: float

    @classmethod
    def of(cls, config: Config, batch_size: int) -> "Schedule":
        """Return the schedule of a config at a global batch size."""
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return cls(
            peak_lr=peak_lr(config, batch_size),
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            weight_decay_end=end,
        )

    def lr_at(self, progress: float) -> float:
        """Return the learning rate: a linear warm-up, then half a cosine to 0 (arXiv 2002.05709 §2.2)."""
        return self.peak_lr * warmup_cosine(progress, warmup=self.warmup)

    def weight_decay_at(self, progress: float) -> float:
        """Return the weight decay: half a cosine over the whole training, without warm-up.

        As in the code of DINO (arXiv 2104.14294, section 3.2: from 0.04 to 0.4), iBOT (2111.07832), DINOv2 (2304.07193)
        and I-JEPA (2301.08243, whose paper calls it linear).
        """
        return cosine(progress, self.weight_decay, self.weight_decay_end)

    def apply(self, optimizer: torch.optim.Optimizer, progress: float) -> dict[str, float]:
        """Set the learning rate and weight decay of every group of an optimizer that ``optim.build`` has built.

        progress: fraction of training that is done, in [0, 1].
        A group's learning rate is multiplied by its ``lr_scale``; groups that are not ``decayed`` keep a decay of 0.
        Returns the values to log, which include the weight decay only if it changes during training.
        """
        lr, weight_decay = self.lr_at(progress), self.weight_decay_at(progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        if self.weight_decay == self.weight_decay_end:
            return {"lr": lr}
        return {"lr": lr, "weight_decay": weight_decay}


def peak_lr(config: Config, batch_size: int) -> float:
    """Return the learning rate after warm-up for a global batch size (arXiv 2002.05709 §2.2 and appendix B.1)."""
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def cosine(progress: float, start: float, end: float) -> float:
    """Return a value that goes from ``start`` at progress 0 to ``end`` at progress 1 along half a cosine.

    Progress outside [0, 1] gives the value at the nearer end.  Sources: arXiv 1608.03983, equation 5, with one cycle;
    the momentum of BYOL, arXiv 2006.07733 §3.1.
    """
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(progress: float, *, warmup: float, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: linear from 0 to 1, then along half a cosine to ``final``.

    warmup: fraction of training that the linear part takes, in [0, 1].  final: the factor at the end, in [0, 1].
    This is SimCLR's schedule (arXiv 2002.05709 §2.2: warm-up in 10 of 100 epochs, then a cosine without restarts).
    """
    if progress < warmup:
        return max(progress, 0.0) / warmup
    return cosine((progress - warmup) / (1 - warmup), 1.0, final) if warmup < 1 else 1.0
