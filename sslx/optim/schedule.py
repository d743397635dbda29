"""What the learning rate and the weight decay are at every moment of the training."""

import math
from dataclasses import dataclass

import torch

from sslx import schedules
from sslx.optim.config import Config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate and the weight decay as functions of the share of the training that is done.

    peak_lr: the learning rate after the warm-up.  warmup: the share of the training that the warm-up takes.
    weight_decay, weight_decay_end: at the beginning and at the end of the training.

    Nothing is remembered from one step to the next.  So a run that goes on from a checkpoint has the same values as
    one that was never interrupted, and a step that is skipped because it is not finite changes no later value.

        schedule = optim.Schedule.of(config, batch_size)
        schedule.apply(optimizer, (step + 0.5) / num_steps)
    """

    peak_lr: float
    warmup: float
    weight_decay: float
    weight_decay_end: float

    @classmethod
    def of(cls, config: Config, batch_size: int) -> "Schedule":
        """The schedule that a config asks for at this global batch size."""
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return cls(
            peak_lr=peak_lr(config, batch_size),
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            weight_decay_end=end,
        )

    def lr_at(self, progress: float) -> float:
        """The learning rate: a linear warm-up, then half a cosine to 0 (arXiv 2002.05709 §2.2)."""
        return self.peak_lr * schedules.warmup_cosine(progress, warmup=self.warmup)

    def weight_decay_at(self, progress: float) -> float:
        """The weight decay: half a cosine over the whole training, without warm-up.

        As in the code of DINO (arXiv 2104.14294, section 3.2: from 0.04 to 0.4), iBOT (2111.07832), DINOv2 (2304.07193)
        and I-JEPA (2301.08243, whose paper calls it linear).
        """
        return schedules.cosine(progress, self.weight_decay, self.weight_decay_end)

    def apply(self, optimizer: torch.optim.Optimizer, progress: float) -> dict[str, float]:
        """Set both in every group of an optimizer that ``optim.build`` has made.  Returns what is worth a log line.

        progress: the share of the training that is done, in [0, 1].
        A group's learning rate is multiplied by its ``lr_scale``; groups that are not ``decayed`` keep a decay of 0.
        """
        lr, weight_decay = self.lr_at(progress), self.weight_decay_at(progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0
        if self.weight_decay == self.weight_decay_end:
            return {"lr": lr}
        return {"lr": lr, "weight_decay": weight_decay}


def peak_lr(config: Config, batch_size: int) -> float:
    """The learning rate after warm-up for a global batch size (arXiv 2002.05709 §2.2 and appendix B.1)."""
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]
