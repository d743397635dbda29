"""Replaces the batch norms of an encoder and its heads by another norm."""

from torch import nn

from sslx.encoders.group_norm import group_norm
from sslx.encoders.recipe import Norm
from sslx.encoders.sync_bn import sync_batch_norm


def replace(module: nn.Module, norm: Norm) -> nn.Module:
    """Replace every batch norm in the module (or the module itself) by ``norm``, and return the module.

    Weights and biases stay the same tensors, and no random numbers are drawn.
    """
    if norm == "sync":
        return sync_batch_norm(module)
    if norm == "group":
        return group_norm(module)
    return module
