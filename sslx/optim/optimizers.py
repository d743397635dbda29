"""Builds the optimizers LARS, SGD and AdamW by name, and restores their state."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sslx.errors import DataError
from sslx.optim.adamw import adamw
from sslx.optim.config import Config
from sslx.optim.groups import Groups, split
from sslx.optim.lars import LARS

_STATE_KEYS: dict[type, set[str]] = {
    LARS: {"velocity"},
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def build(config: Config, module: nn.Module, trunk: nn.Module | None = None) -> torch.optim.Optimizer:
    """Build the optimizer for the module's trainable parameters.

    trunk: the encoder's trunk within the module, needed only if ``config.layer_decay`` is not 1.
    ``Schedule.apply`` sets the optimizer's learning rate and weight decay.  If the module has a method
    ``late_parameters()``, it returns the parameters that are frozen at first (see ``methods.base`` and ``adamw``).
    """
    late = getattr(module, "late_parameters", tuple)()
    return of_groups(config, split(module, trunk, config.layer_decay), late)


def of_groups(config: Config, groups: Groups, late: Iterable[Tensor] = ()) -> torch.optim.Optimizer:
    """Build the optimizer for parameter groups that ``groups.split`` has made.  late: as for ``adamw``."""
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    decay = config.weight_decay
    match config.name:
        case "lars":
            return LARS(groups, config.lr, momentum=config.momentum, weight_decay=decay, trust=config.trust)
        case "sgd":
            return _sgd(groups, config.lr, momentum=config.momentum, weight_decay=decay)
        case "adamw":
            return adamw(groups, config.lr, betas=config.betas, weight_decay=decay, late=late)


def _sgd(params: Groups, lr: float, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return torch's fused SGD, which can skip a step on the device (see ``train.finite``), even the first one."""
    optimizer = torch.optim.SGD(params, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # if the first step is skipped, torch leaves momentum buffers of its own uninitialized
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: str) -> None:
    """Restore a state from ``optimizer.state_dict()``, except the groups' settings, which come from the config.

    source: where the state comes from, for the error message.
    Raises DataError for the state of another optimizer or of other parameters.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = _STATE_KEYS[type(optimizer)]
    fits = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in own["param_groups"]]
    for number, state in saved["state"].items():
        fits = fits and number < len(parameters) and state.keys() in (expected, set[str]())
        fits = fits and all(
            isinstance(value, Tensor) and value.shape in (parameters[number].shape, torch.Size())
            for value in state.values()
        )
    if not fits:
        raise DataError(f"{source} has the state of another optimizer or of other parameters: use another checkpoint")
    optimizer.load_state_dict({"state": own["state"] | saved["state"], "param_groups": own["param_groups"]})
