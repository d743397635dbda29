"""An encoder's recipe: through JSON and back to the same encoder, of any norm, stem and number of channels."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kit import tiny
from kit.errors import raises_one_line
from kit.tiny import RESNET, VIT
from sslx import methods, optim, rng
from sslx.data.batch import Batch
from sslx.encoders import Config, Encoder, Recipe, build, rebuild
from sslx.errors import ConfigError
from sslx.train.step import train_step
from sslx.train.verify import narrow

CASES: dict[str, tuple[Config, tuple[int, ...], dict[str, Any]]] = {
    "small stem": (RESNET, (16,), {}),
    "narrow stem": (replace(RESNET, stem="narrow"), (16, 24), {}),
    "timm's stem": (RESNET, (96,), {}),
    "group norm": (RESNET, (16,), {"norm": "group"}),
    "sync batch norm": (replace(RESNET, name="resnet50"), (16,), {"norm": "sync"}),
    "one channel": (RESNET, (16,), {"channels": 1}),
    "vit": (VIT, (16,), {}),
    "vit of any size": (VIT, (16, 24), {}),
    "vit with registers": (replace(VIT, name="vit_little_patch16_reg4_gap_256"), (16,), {"channels": 5}),
    "convnext": (Config(name="convnext_atto"), (32,), {}),
    "efficientnet": (Config(name="efficientnet_b0"), (32,), {"norm": "group"}),
}


def equal(one: Encoder, other: Encoder) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_is_built_again_from_the_json_of_its_recipe(case: str, generator: torch.Generator):
    config, sizes, options = CASES[case]
    seed = int(torch.randint(2**31, (), generator=generator))
    rng.seed_torch(seed)
    encoder = build(config, *sizes, **options)
    after = torch.get_rng_state()
    recipe = Recipe(**json.loads(json.dumps(asdict(encoder.recipe))))
    assert recipe == encoder.recipe
    rng.seed_torch(seed)
    again = rebuild(recipe)
    assert torch.equal(torch.get_rng_state(), after), "it draws the same numbers"
    assert equal(encoder, again)
    assert again.recipe == recipe
    assert (again.kind, again.dim, again.size, again.patch) == (encoder.kind, encoder.dim, encoder.size, encoder.patch)
    assert {type(module) for module in again.modules()} == {type(module) for module in encoder.modules()}
    for size in sizes:
        x = torch.randn(2, recipe.channels, size, size, generator=generator)
        assert torch.equal(encoder.eval()(x), again.eval()(x))


def test_a_recipe_says_what_was_built():
    resnet = build(replace(RESNET, stem="narrow"), 16, norm="group", channels=2).recipe
    shape = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4}
    assert resnet == Recipe(name="resnet18", size=16, arguments=shape, stem="narrow", norm="group", channels=2)
    vit = build(VIT, 16, 24).recipe
    shape = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 1, "img_size": 16, "dynamic_img_size": True}
    assert vit == Recipe(name="vit_tiny_patch16_224", size=16, arguments=shape)


def test_an_encoder_that_is_built_again_may_take_further_sizes(generator: torch.Generator):
    encoder = build(VIT, 16)
    again = rebuild(encoder.recipe, 24)
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 16, 16, generator=generator)
    assert torch.equal(encoder(x), again(x))
    assert again(torch.randn(2, 3, 24, 24, generator=generator)).shape == (2, 16)
    with pytest.raises(ConfigError, match=r"^vit_tiny_patch16_224 cannot take views of 18 px: [^\n]*$"):
        rebuild(encoder.recipe, 18)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 0}, "at least 1, got 0 and 3"),
        ({"channels": -1}, "at least 1, got 16 and -1"),
        ({"stem": "large"}, "got 'large' and 'batch'"),
        ({"norm": "layer"}, "got 'imagenet' and 'layer'"),
        ({"arguments": {"pretrained": True}}, "must not set pretrained"),
        ({"arguments": {"checkpoint_path": "x.pt"}}, "must not set checkpoint_path"),
        ({"arguments": {"layers": (1, 1)}}, "to be plain JSON"),
        ({"arguments": {"norm_layer": torch.nn.LayerNorm}}, "to be plain JSON"),
        ({"arguments": {"depth": torch.ones(2)}}, "to be plain JSON"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(wrong: dict[str, Any], words: str):
    with raises_one_line(ConfigError, words):
        Recipe(**{"name": "resnet18", "size": 16, **wrong})


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(name="resnet181", size=16), "'resnet181' is not a timm model"),
        (Recipe(name="convnext_atto", size=32, stem="small"), "convnext_atto is not one"),
        (Recipe(name="resnet18", size=16, arguments={"depth": 3}), "cannot build resnet18"),
    ],
)
def test_what_cannot_be_built_again_is_one_line(recipe: Recipe, words: str):
    with raises_one_line(ConfigError, words):
        rebuild(recipe)


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(
    ("method", "config"),
    [("simclr", RESNET), ("simclr", replace(RESNET, stem="imagenet")), ("mocov3", VIT), ("mae", VIT)],
)
def test_images_of_other_channels_train(method: str, config: Config, channels: int, generator: torch.Generator):
    encoder = build(config, 16, channels=channels)
    parts = methods.build(narrow(methods.module(method).Config()), encoder)
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    optimizer = optim.build(optim.Config(name="sgd"), parts)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    num_views = len(tiny.specs(parts.config))
    views = tuple(torch.randn(4, channels, 16, 16, generator=generator) for _ in range(num_views))
    images = Batch(views, None, torch.arange(4), tiny.drawn(parts, 4, generator))
    losses = [train_step(parts, [images], optimizer, 0.0, None)["loss"] for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    moved = [name for name, p in parts.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert any(name.startswith("encoder.") for name in moved)
    first: Tensor = next(p for p in encoder.parameters() if p.ndim == 4)
    assert first.shape[1] == channels


def test_the_picture_of_a_reconstruction_has_the_images_channels(generator: torch.Generator):
    encoder = build(VIT, 16, channels=5)
    method = methods.build(narrow(methods.module("mae").Config()), encoder)
    views = (torch.randn(2, 5, 16, 16, generator=generator),)
    images = Batch(views, None, torch.arange(2), tiny.drawn(method, 2, generator))
    assert [rows.shape for _, rows in method.picture(images)] == [(2, 5, 16, 16)] * 3
