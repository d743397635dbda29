"""Layer-wise learning rates: which layer each parameter belongs to, by name, and what its steps come to."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from sslx.errors import ConfigError
from sslx.optim import Config, Schedule, build
from sslx.optim.groups import layers_of, lr_scales, split


def vit(**arguments: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2, "depth": 3, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments})


def resnet(**arguments: Any) -> nn.Module:
    sizes = {"layers": [1, 2, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 0}
    return timm.create_model("resnet18", **{**sizes, **arguments})


class Method(nn.Module):
    """A trunk between two heads, of which one comes first."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.predictor = nn.Linear(3, 2)
        self.trunk = trunk
        self.projector = nn.Linear(2, 3)


def of_mae(name: str, depth: int) -> int:
    """``get_layer_id_for_vit`` of MAE's code, util/lr_decay.py."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return depth + 1


def test_a_vit_has_maes_layers() -> None:
    layers, depth = layers_of(vit())
    assert depth == 3
    assert layers == {name: of_mae(name, 3) for name in layers}
    assert len(layers) == 3 * 12 + 6
    assert lr_scales(vit(), 0.5) == {name: 0.5 ** (4 - layer) for name, layer in layers.items()}


def test_a_vits_tokens_and_first_norm_learn_as_its_embeddings_and_its_last_norm_as_the_heads() -> None:
    """timm 1.0.20's own groups put register tokens and the norm before the blocks into the last layer."""
    trunk = vit(reg_tokens=2, pre_norm=True, global_pool="avg", fc_norm=True)
    layers, depth = layers_of(trunk)
    outside = {name: layer for name, layer in layers.items() if not name.startswith("blocks.")}
    assert depth == 3
    assert outside == {
        "cls_token": 0,
        "reg_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "norm_pre.weight": 0,
        "norm_pre.bias": 0,
        "fc_norm.weight": 4,
        "fc_norm.bias": 4,
    }


@pytest.mark.parametrize("stages", [[1, 2, 1, 1], [1, 0, 0, 2]])
def test_a_resnets_layers_are_its_stem_and_its_stages(stages: list[int]) -> None:
    layers, depth = layers_of(resnet(layers=stages))
    present = [f"layer{number + 1}" for number, blocks in enumerate(stages) if blocks]
    assert depth == len(present)
    by_layer = {layer: {name.split(".")[0] for name in layers if layers[name] == layer} for layer in range(depth + 2)}
    assert by_layer == {0: {"conv1", "bn1"}, **{1 + i: {name} for i, name in enumerate(present)}, depth + 1: set()}


SMALL = {
    "convnext_atto": ({}, 4),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)}, 4),
    "efficientnet_b0": ({}, 7),
    "beit_base_patch16_224": ({"depth": 3, "embed_dim": 24, "num_heads": 2}, 3),
}


@pytest.mark.parametrize("name", list(SMALL))
def test_other_trunks_have_layers_from_the_image_to_the_features(name: str) -> None:
    arguments, expected = SMALL[name]
    layers, depth = layers_of(timm.create_model(name, num_classes=0, **arguments))
    numbers = list(layers.values())
    assert depth == expected
    assert set(numbers) in ({*range(depth + 1)}, {*range(depth + 2)})
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("make", [vit, resnet])
def test_groups_by_name(make: Any) -> None:
    method = Method(make())
    optimizer = build(Config(name="adamw", lr=0.2, weight_decay=0.05, layer_decay=0.5), method, method.trunk)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    shapes = {name: parameter.ndim for name, parameter in method.named_parameters()}
    layers, depth = layers_of(method.trunk)
    groups = {(group["lr_scale"], group["decayed"]): group for group in optimizer.param_groups}
    assert len(groups) == len(optimizer.param_groups)
    for (scale, decayed), group in groups.items():
        members = {names[id(parameter)] for parameter in group["params"]}
        expected = {f"trunk.{name}" for name, layer in layers.items() if 0.5 ** (depth + 1 - layer) == scale}
        if scale == 1:
            expected |= {f"{head}.{kind}" for head in ("predictor", "projector") for kind in ("weight", "bias")}
        assert members == {name for name in expected if (shapes[name] > 1) == decayed}
        assert (group["lr"], group["weight_decay"], group["adapt"]) == (0.2 * scale, 0.05 * decayed, decayed)
    assert sum(len(group["params"]) for group in groups.values()) == len(names)


def test_without_layer_decay_there_are_the_two_groups_of_older_checkpoints() -> None:
    method = Method(vit())
    weights, others = split(method)
    assert [id(p) for p in weights["params"]] == [id(p) for p in method.parameters() if p.ndim > 1]
    assert [id(p) for p in others["params"]] == [id(p) for p in method.parameters() if p.ndim <= 1]
    assert split(method, method.trunk, 1.0) == [weights, others]


def test_every_layers_step_is_scaled(generator: torch.Generator) -> None:
    method = Method(vit()).double()
    config = Config(name="sgd", lr=0.3, lr_scaling="none", warmup=0.0, weight_decay=0.0, layer_decay=0.7)
    optimizer, schedule = build(config, method, method.trunk), Schedule.of(config, 8)
    for parameter in method.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    assert schedule.apply(optimizer, 0.5) == {"lr": pytest.approx(0.15)}
    optimizer.step()
    for name, parameter in method.named_parameters():
        inside = name.removeprefix("trunk.")
        scale = 0.7 ** (4 - of_mae(inside, 3)) if inside != name else 1.0
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), before[name] - 0.15 * scale * parameter.grad)


def test_frozen_layers_are_left_out() -> None:
    method = Method(resnet())
    for parameter in method.trunk.get_submodule("layer1").parameters():
        parameter.requires_grad_(False)
    groups = split(method, method.trunk, 0.5)
    assert {group["lr_scale"] for group in groups} == {0.5**5, 0.5**3, 0.5**2, 0.5, 1.0}


def test_a_trunk_whose_blocks_nobody_knows_is_refused() -> None:
    method = Method(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"^--optim\.layer-decay needs an encoder .* got Linear: use"):
        build(Config(layer_decay=0.9), method, method.trunk)
    assert len(build(Config(), method, method.trunk).param_groups) == 2
