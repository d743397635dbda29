"""Encoders of other sizes than the file's: what is interpolated, adapted, split or allowed to be missing, and said."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import beit, vision_transformer
from torch import Tensor, nn

from kit.errors import raises_one_line
from kit.random_models import randomized
from sslx.encoders import Config, build, weights
from sslx.errors import DataError

VIT = {"depth": 1, "embed_dim": 64, "num_heads": 1, "patch_size": 8, "num_classes": 0}


def model(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def saved(theirs: nn.Module, folder: Path) -> str:
    torch.save({"model": theirs.state_dict()}, folder / "file.pt")
    return str(folder / "file.pt")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("vit_base_patch16_224", vision_transformer, "pos_embed interpolated from 4 x 4 to 6 x 6 patches"),
        ("vit_small_patch14_reg4_dinov2", vision_transformer, "pos_embed interpolated from 4 x 4 to 6 x 6 patches"),
        ("beit_base_patch16_224", beit, "relative_position_bias_table interpolated from 4 x 4 to 6 x 6 patches"),
    ],
)
def test_positions_of_another_grid_are_interpolated_as_timm_does(
    name: str, module: Any, words: str, tmp_path: Path, generator: torch.Generator
):
    theirs = randomized(model(name, img_size=32, **VIT), generator)
    trunk, expected = (model(name, img_size=48, **VIT) for _ in range(2))
    assert words in weights.load(trunk, saved(theirs, tmp_path), name)
    expected.load_state_dict(module.checkpoint_filter_fn(theirs.state_dict(), expected))
    assert equal(trunk.state_dict(), expected.state_dict())


@torch.no_grad()
def test_one_channel_sees_a_gray_image_as_three_do(tmp_path: Path, generator: torch.Generator):
    theirs = randomized(model("resnet18", num_classes=0), generator)
    encoder = build(Config(name="resnet18", weights=saved(theirs, tmp_path), stem="imagenet"), 64, channels=1).eval()
    gray = torch.randn(2, 1, 64, 64, generator=generator)
    expected = theirs(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(gray), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_more_channels_repeat_the_three_and_say_so(tmp_path: Path, generator: torch.Generator):
    theirs = randomized(model("vit_base_patch16_224", img_size=32, **VIT), generator)
    trunk = model("vit_base_patch16_224", img_size=32, in_chans=5, **VIT)
    line = weights.load(trunk, saved(theirs, tmp_path), "vit")
    assert "patch_embed.proj.weight adapted from 3 to 5 input channels" in line
    expected = theirs.patch_embed.proj.weight[:, [0, 1, 2, 0, 1]] * (3 / 5)
    torch.testing.assert_close(trunk.patch_embed.proj.weight, expected)


@torch.no_grad()
def test_joined_projections_are_split_for_an_encoder_that_has_three(tmp_path: Path, generator: torch.Generator):
    options = {**VIT, "img_size": 32}
    theirs = randomized(model("eva02_base_patch14_224", qkv_fused=True, **options), generator)
    trunk = model("eva02_base_patch14_224", qkv_fused=False, **options)
    assert "3 split" in weights.load(trunk, saved(theirs, tmp_path), "eva02_base_patch14_224")
    x = torch.randn(2, 3, 32, 32, generator=generator)
    torch.testing.assert_close(trunk(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_patches_of_another_side_are_refused_and_change_nothing(tmp_path: Path):
    theirs = model("vit_base_patch16_224", img_size=64, **{**VIT, "patch_size": 16})
    trunk = model("vit_base_patch16_224", img_size=32, **VIT)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with raises_one_line(DataError, "patch_embed.proj.weight (64, 3, 8, 8), not (64, 3, 16, 16)"):
        weights.load(trunk, saved(theirs, tmp_path), "vit_base_patch16_224")
    assert equal(before, trunk.state_dict())


def test_what_is_missing_is_named_with_the_nearest_and_may_be_allowed(tmp_path: Path):
    theirs = model("vit_base_patch16_224", img_size=32, **VIT)
    trunk = model("vit_base_patch16_224", img_size=32, global_pool="avg", **VIT)
    path, before = saved(theirs, tmp_path), {name: value.clone() for name, value in trunk.state_dict().items()}
    for missing in ((), ("blocks.*",)):
        with raises_one_line(DataError, "2 missing (fc_norm.weight, fc_norm.bias)", "norm.weight for fc_norm.weight"):
            weights.load(trunk, path, "vit", missing=missing)
        assert equal(before, trunk.state_dict())
    torch.save({key: x for key, x in theirs.state_dict().items() if key.split(".")[0] != "norm"}, path)
    line = weights.load(trunk, path, "vit", missing=("fc_norm.*", "cls_token"))
    assert "16 of 18 tensors" in line
    assert "2 left as initialized, as --encoder.missing allows: fc_norm.weight, fc_norm.bias" in line
    after = trunk.state_dict()
    assert torch.equal(after["cls_token"], theirs.cls_token), "it is in the file"
    assert torch.equal(after["fc_norm.weight"], before["fc_norm.weight"])


def test_a_pattern_of_nothing_and_a_pattern_of_everything_are_refused(tmp_path: Path):
    trunk = model("resnet18", num_classes=0)
    path = saved(nn.Linear(2, 2), tmp_path)
    with raises_one_line(DataError, "--encoder.missing norn.* matches no tensor of resnet18"):
        weights.load(trunk, path, "resnet18", missing=("norn.*",))
    with raises_one_line(DataError, "has no tensor of resnet18"):
        weights.load(trunk, path, "resnet18", missing=("*",))


def test_the_flag_reaches_the_encoder(tmp_path: Path):
    theirs = model("resnet18", num_classes=0)
    torch.save({key: x for key, x in theirs.state_dict().items() if not key.startswith("conv1.")}, tmp_path / "file.pt")
    said: list[str] = []
    config = Config(weights=str(tmp_path / "file.pt"), missing=("conv1.*",), stem="imagenet")
    build(config, 64, say=said.append)
    assert f"{len(theirs.state_dict()) - 1} of {len(theirs.state_dict())} tensors" in said[0]
