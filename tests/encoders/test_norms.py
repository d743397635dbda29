"""Norms: one choice for the encoder and for the heads on it, made before weights are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslx import methods
from sslx.encoders import Config, Norm, build
from sslx.encoders.group_norm import GroupNorm
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.train.verify import narrow

RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16)}
NORMS: tuple[Norm, ...] = ("batch", "sync", "group")


def kinds(module: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in module.modules() if isinstance(layer, (_BatchNorm, GroupNorm))}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", methods.available())
def test_every_norm_of_a_method_is_that_of_its_encoder(method: str, norm: Norm):
    resnet = "resnet" in methods.encoders(method)
    config = Config(**RESNET) if resnet else Config(name="vit_tiny_patch16_224", patch=4, layers=(1,), channels=(16,))
    built = methods.build(narrow(methods.module(method).Config()), build(config, 24, 16, 8, norm=norm))
    allowed = {"batch": {nn.BatchNorm1d, nn.BatchNorm2d}, "sync": {SyncBatchNorm}, "group": {GroupNorm}}[norm]
    assert kinds(built) <= allowed
    if resnet:
        assert kinds(built.encoder) == allowed - {nn.BatchNorm1d}


@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_changes_no_initial_weight_and_draws_no_number(norm: Norm):
    torch.manual_seed(0)
    plain, after = build(Config(**RESNET), 16), torch.get_rng_state()
    torch.manual_seed(0)
    encoder = build(Config(**RESNET), 16, norm=norm)
    assert torch.equal(torch.get_rng_state(), after)
    state = plain.state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("saved", NORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_an_encoder_takes_weights_of_its_own_norm_and_of_one_with_more(saved: Norm, norm: Norm, tmp_path: Path):
    source = build(Config(**RESNET), 16, norm=saved)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    config = Config(**RESNET, weights=str(tmp_path / "file.pt"))
    if saved == "group" != norm:
        with pytest.raises(Exception, match=r"^[^\n]*running_mean[^\n]*it was trained with group norm[^\n]*$"):
            build(config, 16, norm=norm)
        return
    state = source.state_dict()
    encoder = build(config, 16, norm=norm)
    assert kinds(encoder) == kinds(build(Config(**RESNET), 16, norm=norm))
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
