"""Moving averages: every parameter of the target follows its own, in the arithmetic of the definition."""

import copy

import torch
from torch import nn

from sslx.methods import ema


def networks(generator: torch.Generator) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A target and the two parts of what it follows, of other weights."""
    body, head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 5)
    target = ema.frozen_copy(nn.Sequential(body, head))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return target, body, head


def test_each_parameter_follows_its_own_and_buffers_stay(generator: torch.Generator) -> None:
    target, body, head = networks(generator)
    average, momentum = ema.Average(target, body, head), torch.tensor(0.9)
    buffers = copy.deepcopy(list(target.buffers()))
    for _ in range(3):
        before = [p.clone() for p in target.parameters()]
        average.update(momentum)
        for old, new, online in zip(before, target.parameters(), [*body.parameters(), *head.parameters()], strict=True):
            assert torch.equal(new, old + (online - old) * (1 - momentum))
        with torch.no_grad():
            head.weight.add_(1.0)
    assert all(map(torch.equal, buffers, target.buffers()))


def test_it_goes_on_with_other_parameters_and_in_a_copy(generator: torch.Generator) -> None:
    """As after a move that makes new ones, and in a method that is copied."""
    target, body, head = networks(generator)
    average, all_at_once = ema.Average(target, body, head), torch.zeros(())
    average.update(torch.ones(()))
    other, copied = copy.deepcopy((target, average))
    for module in (target, body, head):
        for layer in module.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.detach().double(), requires_grad=parameter.requires_grad))
    average.update(all_at_once)
    online = [*body.parameters(), *head.parameters()]
    assert all(map(torch.equal, target.parameters(), online))
    assert not any(torch.allclose(a.double(), b) for a, b in zip(other.parameters(), online, strict=True))
    copied.update(all_at_once)
    assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(other.parameters(), online, strict=True))
