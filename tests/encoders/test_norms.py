"""Norms: one choice for the encoder and for the heads on it, made before weights are loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kit.tiny import ENCODERS, RESNET
from sslx import methods
from sslx.encoders import Norm, build
from sslx.encoders.group_norm import GroupNorm
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.train.verify import narrow

NORMS: tuple[Norm, ...] = ("batch", "sync", "group")


def kinds(module: nn.Module) -> set[type[nn.Module]]:
    return {type(layer) for layer in module.modules() if isinstance(layer, (_BatchNorm, GroupNorm))}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", methods.available())
def test_every_norm_of_a_method_is_that_of_its_encoder(method: str, norm: Norm):
    resnet = "resnet" in methods.encoders(method)
    encoder = build(ENCODERS["resnet" if resnet else "vit"], 24, 16, 8, norm=norm)
    built = methods.build(narrow(methods.module(method).Config()), encoder)
    allowed = {"batch": {nn.BatchNorm1d, nn.BatchNorm2d}, "sync": {SyncBatchNorm}, "group": {GroupNorm}}[norm]
    assert kinds(built) <= allowed
    if resnet:
        assert kinds(built.encoder) == allowed - {nn.BatchNorm1d}


@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_changes_no_initial_weight_and_draws_no_number(norm: Norm):
    torch.manual_seed(0)
    plain, after = build(RESNET, 16), torch.get_rng_state()
    torch.manual_seed(0)
    encoder = build(RESNET, 16, norm=norm)
    assert torch.equal(torch.get_rng_state(), after)
    state = plain.state_dict()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("saved", NORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_an_encoder_takes_weights_of_its_own_norm_and_of_one_with_more(saved: Norm, norm: Norm, tmp_path: Path):
    source = build(RESNET, 16, norm=saved)
    nn.init.uniform_(source.trunk.get_parameter("bn1.weight"))
    torch.save(source.state_dict(), tmp_path / "file.pt")
    config = replace(RESNET, weights=str(tmp_path / "file.pt"))
    if saved == "group" != norm:
        with pytest.raises(Exception, match=r"^[^\n]*running_mean[^\n]*it was trained with group norm[^\n]*$"):
            build(config, 16, norm=norm)
        return
    state = source.state_dict()
    said: list[str] = []
    encoder = build(config, 16, norm=norm, say=said.append)
    assert kinds(encoder) == kinds(build(RESNET, 16, norm=norm))
    assert ("left out: bn1.running_mean" in said[0]) == (norm == "group" != saved)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
