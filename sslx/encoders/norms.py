"""Which norm an encoder and the heads on it have: the one place where norms are replaced."""

from torch import nn

from sslx.encoders.group_norm import group_norm
from sslx.encoders.recipe import Norm
from sslx.encoders.sync_bn import sync_batch_norm


def replace(module: nn.Module, norm: Norm) -> nn.Module:
    """Replace every batch norm in the module (or the module itself) by the norm that is asked for.

    Returns the module.  Weights and biases stay the same tensors, and no random number is drawn.
    """
    if norm == "sync":
        return sync_batch_norm(module)
    if norm == "group":
        return group_norm(module)
    return module
