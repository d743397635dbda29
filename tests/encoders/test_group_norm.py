"""Group norm in the place of batch norm."""

import pytest
import timm
import torch
from torch import nn

from sslx.encoders.group_norm import GroupNorm, group_norm, has_batch_norm


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "efficientnet_b0"])
def test_a_trunks_batch_norms_become_group_norms_and_keep_weights_and_activations(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    before = {key: value for key, value in net.state_dict().items() if "running" not in key and "num_b" not in key}
    assert has_batch_norm(net)
    assert group_norm(net) is net
    assert not has_batch_norm(net)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    images = torch.randn(4, 3, 64, 64)
    together = net.eval()(images)
    one_by_one = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_is_torchs_group_norm_with_the_activation_after_it(generator: torch.Generator) -> None:
    norm = nn.BatchNorm1d(48, eps=1e-3).train()
    norm.act = nn.ReLU()
    converted = group_norm(norm)
    assert isinstance(converted, GroupNorm)
    assert converted.num_groups == 3
    x = torch.randn(5, 48, generator=generator)
    grouped = x.view(5, 3, 16)
    expected = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(converted(x), expected.view(5, 48).relu())
    assert group_norm(nn.BatchNorm2d(8, affine=False)).weight is None


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 1), (64, 4), (2048, 128), (20, 5), (30, 1), (7, 1)])
def test_no_group_is_so_small_that_only_signs_are_left(channels: int, groups: int) -> None:
    assert group_norm(nn.BatchNorm2d(channels)).num_groups == groups
