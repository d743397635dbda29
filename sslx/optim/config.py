"""Settings of the optimizer.  This module does not import torch, so that --help and flag errors are fast."""

import math
from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The optimizer and its learning rate.  The defaults are SimCLR's (arXiv 2002.05709 §2.2)."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """lars: convolutional encoders at batch sizes of 1,024 or more.  sgd: smaller batches.  adamw: transformers."""
    lr: float = 0.3
    """Peak learning rate before scaling by the batch size."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch size / 256.  sqrt: lr * sqrt(batch size); SimCLR uses lr 0.075 with it.  none: lr itself."""
    weight_decay: float = 1e-6
    """L2 penalty on weights (for adamw, decoupled decay times lr).  Biases and norms are not decayed."""
    weight_decay_end: float | None = None
    """Weight decay at the end of training, reached along half a cosine (DINO: 0.04 to 0.4).  Constant by default."""
    momentum: float = 0.9
    """Momentum of lars and sgd, in [0, 1)."""
    warmup: float = 0.1
    """Fraction of training in which the learning rate rises to its peak, before it falls along half a cosine."""
    trust: float = 0.001
    """Trust coefficient of lars: a step's length relative to the tensor's norm, at a learning rate of 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adamw's running means of the gradient and of its square, each in [0, 1)."""

    clip: float = 0.0
    """Clip the norm of the gradient of all parameters to this value (DINO: 3); 0 disables clipping."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer of the encoder further from the heads (DINOv2: 0.9)."""

    def __post_init__(self) -> None:
        _expect(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        _expect(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", self.weight_decay)
        end = self.weight_decay_end
        _expect(end is None or 0 <= end < math.inf, "weight_decay_end", "0 or more", end)
        _expect(0 <= self.momentum < 1, "momentum", "a number in [0, 1)", self.momentum)
        _expect(0 <= self.warmup <= 1, "warmup", "a fraction of training in [0, 1]", self.warmup)
        _expect(0 < self.trust < math.inf, "trust", "a positive number", self.trust)
        _expect(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)", self.betas)
        _expect(0 <= self.clip < math.inf, "clip", "0 or more", self.clip)
        _expect(0 < self.layer_decay <= 1, "layer_decay", "a factor in (0, 1]", self.layer_decay)


def _expect(is_valid: bool, field: str, expected: str, got: object) -> None:
    if not is_valid:
        raise ConfigError(f"expected optim.{field} to be {expected}, got {got}")
