"""Official files: what sslx makes of them is what timm's own converters make of them, and each layout is documented."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sslx
from kit.errors import raises_one_line
from kit.random_models import randomized
from sslx.encoders import weights
from sslx.encoders.weights import describe, identify, layouts
from sslx.errors import DataError

State = dict[str, Tensor]


def to_official(renames: dict[str, str], state: State) -> State:
    """The state under the names of the official code: the other direction, by expressions of its own."""
    named: State = {}
    for name, value in state.items():
        for pattern, new in renames.items():
            name = re.sub(pattern, new, name)
        named[name] = value
    return named


def with_class_position(state: State) -> State:
    """The official DINOv2 has a position for the class token, and registers under another name."""
    first = torch.randn(state["cls_token"].shape)
    return {
        **state,
        "cls_token": state["cls_token"] - first,
        "pos_embed": torch.cat([first, state["pos_embed"]], 1),
        "mask_token": torch.zeros(1, 64),
    }


def with_mask_token(state: State) -> State:
    return {**state, "mask_token": torch.zeros(1, 64)}


def with_whole_bias(state: State) -> State:
    """The official DINOv3 has one bias of queries, keys and values, and a mask of it."""
    whole = {name: value for name, value in state.items() if not name.endswith(("q_bias", "v_bias"))}
    for name in (name for name in state if name.endswith("q_bias")):
        q, v = state[name], state[name.replace("q_bias", "v_bias")]
        whole[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.full_like(q, torch.nan), v])
        whole[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(q))
    return {**whole, "rope_embed.periods": torch.ones(16), "mask_token": torch.zeros(1, 64)}


def linear(state: State) -> State:
    return {name: value.flatten(1) if ".pwconv" in name and value.ndim > 2 else value for name, value in state.items()}


SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32, "patch_size": 8}
OF_CONVNEXT = {
    r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
    r"^stem\.": "downsample_layers.0.",
    r"\.blocks\.": ".",
    "conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"mlp\.grn\.weight": "grn.gamma",
    r"mlp\.grn\.bias": "grn.beta",
    r"^head\.norm\.": "norm.",
}
OFFICIAL: dict[str, tuple[str, str, dict[str, Any], dict[str, str], Callable[[State], State]]] = {
    "DINOv2": ("timm", "vit_small_patch14_dinov2", SMALL, {}, with_mask_token),
    "DINOv2 in chunks": (
        "dinov2", "vit_small_patch14_dinov2", SMALL, {r"^blocks\.": "blocks.0."}, with_mask_token
    ),
    "DINOv2 with registers": (
        "dinov2", "vit_small_patch14_reg4_dinov2", SMALL, {"reg_token": "register_tokens"}, with_class_position
    ),
    "DINOv2, SwiGLU": (
        "dinov2", "vit_giant_patch14_dinov2", {**SMALL, "mlp_ratio": 4}, {"fc1": "w12", "fc2": "w3"}, with_mask_token
    ),
    "DINOv3": (
        "dinov3", "vit_small_patch16_dinov3_qkvb", SMALL,
        {"reg_token": "storage_tokens", r"gamma_([12])": r"ls\1.gamma"}, with_whole_bias,
    ),
    "ConvNeXt": ("convnext", "convnext_tiny", {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 32]}, OF_CONVNEXT, linear),
    "ConvNeXt V2": ("convnext", "convnextv2_atto", {"depths": [1, 2, 1, 1], "dims": [8] * 4}, OF_CONVNEXT, linear),
    "Swin": (
        "swin", "swin_tiny_patch4_window7_224",
        {"depths": [2, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4, "img_size": 32},
        {r"layers\.1\.downsample": "layers.0.downsample"}, lambda state: state,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
@torch.no_grad()
def test_official_files_become_what_timm_makes_of_them(name: str, tmp_path: Path, generator: torch.Generator):
    """The official code is in no package, so timm's converter for it, which sslx does not use here, is the oracle."""
    layout, model, options, renames, change = OFFICIAL[name]
    truth = randomized(timm.create_model(model, num_classes=0, **options), generator)
    official = change(to_official(renames, truth.state_dict()))
    torch.save({"teacher": {f"backbone.{key}": value for key, value in official.items()}}, tmp_path / "file.pth")
    trunk = timm.create_model(model, num_classes=0, **options)
    if "chunks" in name:  # which timm does not convert
        official = with_mask_token(truth.state_dict())
    convert = sys.modules[type(trunk).__module__].checkpoint_filter_fn
    trunk.load_state_dict(convert(dict(official), trunk), strict=layout != "dinov3")
    found, *_ = identify.identified(str(tmp_path / "file.pth"))
    assert (found.layout, found.misfit, found.part) == (layout, "", "teacher.backbone")
    loaded = timm.create_model(model, num_classes=0, **options)
    line = weights.load(loaded, str(tmp_path / "file.pth"), model)
    assert layout == "timm" or f"renamed from the layout {layout}" in line
    state = loaded.state_dict()
    for key, value in truth.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
    for key, value in trunk.state_dict().items():
        assert torch.equal(state[key], value)


def test_timms_own_converter_is_asked_where_no_layout_fits(tmp_path: Path, generator: torch.Generator):
    options = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4), "num_classes": 0}
    truth = randomized(timm.create_model("pvt_v2_b0", **options), generator)
    renames = {rf"^stages\.{i}\.downsample\.": f"patch_embed{i + 1}." for i in range(1, 4)}
    renames |= {r"^patch_embed\.": "patch_embed1."}
    renames |= {rf"^stages\.{i}\.blocks\.": f"block{i + 1}." for i in range(4)}
    renames |= {rf"^stages\.{i}\.norm\.": f"norm{i + 1}." for i in range(4)}
    official = {f"module.{key}": value for key, value in to_official(renames, truth.state_dict()).items()}
    torch.save({"model": official}, tmp_path / "file.pth")
    trunk = timm.create_model("pvt_v2_b0", **options).eval()
    assert "timm's converter" in weights.load(trunk, str(tmp_path / "file.pth"), "pvt_v2_b0")
    x = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert torch.equal(trunk(x), truth(x))


@torch.no_grad()
def test_checkpoints_of_frameworks_have_several_encoders(tmp_path: Path, generator: torch.Generator):
    """With the names that their code gives: solo-learn's of momentum methods, stable-pretraining's of a teacher."""
    shape = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}
    student, teacher = (randomized(timm.create_model("resnet18", num_classes=0, **shape), generator) for _ in range(2))
    queue = {"classifier.weight": torch.randn(10, 512, generator=generator), "queue": torch.randn(2, 8, 16)}
    for parts, others in (
        (("backbone", "momentum_backbone"), {**queue, "projector.0.weight": torch.randn(8, 512)}),
        (("backbone.student", "backbone.teacher"), {"backbone.ema_coefficient": torch.tensor(0.99)}),
    ):
        state = {
            f"{part}.{name}": value
            for part, model in zip(parts, (student, teacher), strict=True)
            for name, value in model.state_dict().items()
        }
        torch.save({"epoch": 3, "state_dict": {**state, **others}, "hyper_parameters": {}}, tmp_path / "last.ckpt")
        with raises_one_line(DataError, "holds 2 such encoders", *(f"state_dict.{part}" for part in parts)):
            sslx.load(tmp_path / "last.ckpt")
        x = torch.randn(2, 3, 32, 32, generator=generator)
        encoder = sslx.load(tmp_path / "last.ckpt", part=parts[1]).encoder
        torch.testing.assert_close(encoder(x), teacher(x), rtol=0, atol=1e-5)


def test_a_model_that_no_encoder_equals_is_refused_with_the_reason(tmp_path: Path):
    """lightly's "lightly_sequential", as its documentation builds it."""
    from lightly.models import ResNetGenerator

    backbone = nn.Sequential(*list(ResNetGenerator("resnet-18", width=0.125).children())[:-1], nn.AdaptiveAvgPool2d(1))
    torch.save({f"backbone.{name}": value for name, value in backbone.state_dict().items()}, tmp_path / "model.pt")
    for load in (
        lambda path: sslx.load(path),
        lambda path: weights.load(timm.create_model("resnet18"), str(path), "resnet18"),
    ):
        with raises_one_line(DataError, "lightly's ResNetGenerator in an nn.Sequential", "is not supported"):
            load(tmp_path / "model.pt")
    assert "is not supported" in describe.lines(str(tmp_path / "model.pt"))[-1]


def test_parts_of_other_shapes_are_refused_in_one_line(tmp_path: Path, generator: torch.Generator):
    names = ("norm1.weight", "ls1.gamma", "attn.qkv.bias", "mlp.w12.weight")
    official = {f"blocks.0.{name}": torch.randn((), generator=generator) for name in names}
    official |= {name: torch.randn(3, generator=generator) for name in ("mask_token", "register_tokens", "pos_embed")}
    official |= {"cls_token": torch.randn(4, generator=generator), "patch_embed.proj.weight": torch.randn(2, 2)}
    torch.save(official, tmp_path / "file.pth")
    trunk = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **SMALL)
    with raises_one_line(DataError, "does not fit", "27 missing", "8 of another shape"):
        weights.load(trunk, str(tmp_path / "file.pth"), "vit_small_patch14_reg4_dinov2")
    assert identify.identified(str(tmp_path / "file.pth")) == []


def test_the_readme_lists_every_layout_with_its_test():
    text = (Path(weights.__file__).parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    assert rows == {name: layouts.summary(name).removesuffix(".") for name in layouts.available()}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*layouts.py"))
    assert [name for name in layouts.available() if f'"{name}"' not in tests] == []
