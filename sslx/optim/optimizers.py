"""Optimizers by name: LARS, SGD and AdamW, with weight decay where it belongs."""

from typing import Any

import torch
from torch import Tensor, nn

from sslx.errors import DataError
from sslx.optim.adamw import adamw
from sslx.optim.config import Config
from sslx.optim.groups import Groups, split
from sslx.optim.lars import LARS

_STATE: dict[type, set[str]] = {
    LARS: {"velocity"},
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def build(config: Config, module: nn.Module, trunk: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimizer for the module's trainable parameters.  ``Schedule.apply`` sets its learning rate and weight decay.

    trunk: the encoder's trunk, a part of the module, whose layers learn at different rates where
      ``config.layer_decay`` is not 1; it may be left out where that is 1.
    The module may have ``late_parameters()``, those that are frozen at first (``methods.base``, ``adamw``).
    """
    groups = split(module, trunk, config.layer_decay)
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    decay = config.weight_decay
    match config.name:
        case "lars":
            return LARS(groups, config.lr, momentum=config.momentum, weight_decay=decay, trust=config.trust)
        case "sgd":
            return _sgd(groups, config.lr, momentum=config.momentum, weight_decay=decay)
        case "adamw":
            late = getattr(module, "late_parameters", tuple)()
            return adamw(groups, config.lr, betas=config.betas, weight_decay=decay, late=late)


def _sgd(params: Groups, lr: float, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """torch's fused SGD, which can leave a step out on the device (``train.finite``), from its first step on."""
    optimizer = torch.optim.SGD(params, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # torch takes the first step's from memory that it has not written to where that step is left out
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any], what: str) -> None:
    """Put back what ``optimizer.state_dict()`` gave, but for the groups' settings, which are the config's.

    what: where it is from, for the message.  DataError where it is of other parameters or of another optimizer.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = _STATE[type(optimizer)]
    fits = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in own["param_groups"]]
    for number, state in saved["state"].items():
        fits = fits and number < len(parameters) and state.keys() in (expected, set[str]())
        fits = fits and all(
            isinstance(value, Tensor) and value.shape in (parameters[number].shape, torch.Size())
            for value in state.values()
        )
    if not fits:
        raise DataError(f"{what} has another optimizer's state, or of other parameters: take another checkpoint")
    optimizer.load_state_dict({"state": own["state"] | saved["state"], "param_groups": own["param_groups"]})
