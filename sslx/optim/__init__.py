"""Optimizers by name: LARS, SGD and AdamW, with weight decay where it belongs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sslx.errors import ConfigError
from sslx.optim.adamw import adamw
from sslx.optim.groups import split
from sslx.optim.lars import LARS

__all__ = ["LARS", "Config", "build", "peak_lr", "set_lr"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The optimizer and its learning rate.  The defaults are SimCLR's (arXiv 2002.05709 §2.2)."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """lars: for batches from 1024 on; sgd: smaller ones; adamw: transformers, lr 1e-3, weight decay 0.05."""
    lr: float = 0.3
    """Peak learning rate, before it is scaled by the batch size."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch size / 256; sqrt: lr * sqrt(batch size) (SimCLR: lr 0.075); none: lr as it is."""
    weight_decay: float = 1e-6
    """L2 penalty (adamw: decoupled decay, times lr) on weights; biases and norms have none."""
    momentum: float = 0.9
    """Share of the last step that the next one keeps, in [0, 1); lars and sgd."""
    warmup: float = 0.1
    """Share of the training in which lr rises from 0 to its peak; then it falls along half a cosine."""
    trust: float = 0.001
    """lars: length of a step relative to the tensor's own norm, at a learning rate of 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw: shares that the running means of the gradient and of its square keep, each in [0, 1)."""

    def __post_init__(self) -> None:
        _expect(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        _expect(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", self.weight_decay)
        _expect(0 <= self.momentum < 1, "momentum", "a share in [0, 1)", self.momentum)
        _expect(0 <= self.warmup <= 1, "warmup", "a share of the training in [0, 1]", self.warmup)
        _expect(0 < self.trust < math.inf, "trust", "a positive number", self.trust)
        _expect(all(0 <= beta < 1 for beta in self.betas), "betas", "two shares in [0, 1)", self.betas)


def _expect(holds: bool, field: str, what: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"expected optim.{field} to be {what}, got {got}")


def build(config: Config, module: nn.Module, groups: Iterable[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
    """The optimizer for the module's trainable parameters; its learning rate is set by ``set_lr``.

    groups: a method's ``param_groups()``, or None for one of all parameters.  A group may have ``lr_scale``,
      a factor of the learning rate, and its own ``weight_decay``.  Each is cut in two by ``groups.split``.
    The module may have ``late_parameters()``, those that are frozen at first (``methods.base``, ``adamw``).
    """
    halves = split(module, groups)
    decay = config.weight_decay
    match config.name:
        case "lars":
            return LARS(halves, config.lr, momentum=config.momentum, weight_decay=decay, trust=config.trust)
        case "sgd":
            return torch.optim.SGD(halves, config.lr, momentum=config.momentum, weight_decay=decay, foreach=True)
        case "adamw":
            late = getattr(module, "late_parameters", tuple)()
            return adamw(halves, config.lr, betas=config.betas, weight_decay=decay, late=late)


def peak_lr(config: Config, batch_size: int) -> float:
    """The learning rate after warm-up for a global batch size (arXiv 2002.05709 §2.2 and appendix B.1)."""
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}
    return config.lr * scale[config.lr_scaling]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: lr times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
