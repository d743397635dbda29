"""Models with random numbers in every tensor, so that an error in any of them changes what the model computes."""

import torch
from torch import nn


@torch.no_grad()
def randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """The model, with no weight at its initial 0 or 1: an error in any tensor changes the features."""
    for parameter in model.parameters():
        scale = 0.5 * (parameter[0].numel() if parameter.ndim > 1 else 25) ** -0.5
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
    return model.eval()
