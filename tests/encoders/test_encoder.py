"""Encoders: any timm trunk gives one vector an image; stems, shapes, weights, and what is refused."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.errors import raises_one_line
from kit.tiny import RESNET
from sslx.encoders import Config, Encoder, build
from sslx.errors import ConfigError, DataError
from sslx.runs import checkpoint


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.trunk.state_dict().items()}


def equal(encoder: Encoder, expected: dict[str, Tensor]) -> bool:
    own = encoder.trunk.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [
        ("resnet18", 64, 512),
        ("resnet50", 32, 2048),
        ("vit_tiny_patch16_224", 64, 192),
        ("convnext_atto", 64, 320),
        ("regnetx_002", 64, 368),
        ("efficientnet_b0", 64, 1280),
        pytest.param("swin_tiny_patch4_window7_224", 64, 768, marks=pytest.mark.slow),
        pytest.param("mobilevit_s", 64, 640, marks=pytest.mark.slow),
        pytest.param("resnet50d", 224, 2048, marks=pytest.mark.slow),
    ],
)
def test_any_trunk_gives_a_vector_an_image_and_is_channels_last(name: str, size: int, dim: int):
    encoder = build(Config(name=name), size)
    assert encoder.dim == dim
    assert encoder.training
    x = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert encoder(x).shape == (2, dim)
    maps = [p for p in encoder.parameters() if p.ndim == 4]
    assert maps
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
    names = [name for name, _ in encoder.named_parameters()]
    assert not {"trunk.fc.weight", "trunk.head.weight", "trunk.head.fc.weight", "trunk.classifier.weight"} & {*names}
    assert all(name.startswith("trunk.") for name in names)


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_small_views_keep_their_resolution_through_the_stem(name: str):
    for size, options, is_small in [
        (32, {}, True),
        (64, {}, True),
        (96, {}, False),
        (32, {"stem": "imagenet"}, False),
        (96, {"stem": "small"}, True),
        (96, {"stem": "narrow"}, True),
    ]:
        trunk: Any = build(replace(RESNET, name=name, **options), size).trunk
        x = torch.zeros(1, 3, size, size)
        with torch.no_grad():
            stem = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
        assert stem.shape[-1] == (size if is_small else size // 4)
        if is_small:
            assert (trunk.conv1.kernel_size, trunk.conv1.stride, trunk.conv1.padding) == ((3, 3), (1, 1), (1, 1))
            assert trunk.conv1.bias is None
            assert isinstance(trunk.maxpool, nn.Identity)


def test_a_resnet_of_other_layers_and_channels():
    encoder = build(Config(name="resnet18", layers=(1, 2, 1, 1), channels=(8, 12, 16, 24)), 32)
    trunk: Any = encoder.trunk
    assert [len(stage) for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)] == [1, 2, 1, 1]
    assert encoder.dim == 24
    assert build(Config(name="resnet50", layers=(1, 1, 1, 1), channels=(4, 4, 4, 8)), 32).dim == 32


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", (0, 1, 1, 1)), ("resnet18", (1, 0, 0, 1)), ("resnet50", (0, 1, 1, 1))]
)
def test_a_resnet_without_a_stage_trains_what_is_left(name: str, layers: tuple[int, ...]):
    encoder = build(Config(name=name, layers=layers, channels=(8, 8, 12, 16)), 32)
    whole = build(Config(name=name, layers=(1, 1, 1, 1), channels=(8, 8, 12, 16)), 32)
    assert encoder.dim == whole.dim
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in whole.parameters())
    features = encoder(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, encoder.dim)
    features.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_narrow_stem_is_as_wide_as_the_first_stage():
    shape: dict[str, Any] = {"name": "resnet18", "layers": (1, 1, 1, 1), "channels": (12, 16, 16, 24)}
    widths: dict[str, int] = {}
    for stem in ("small", "narrow"):
        trunk: Any = build(Config(**shape, stem=stem), 32).trunk
        widths[stem] = trunk.conv1.out_channels
        assert (trunk.layer1[0].downsample is None) == (stem == "narrow")
    assert widths == {"small": 64, "narrow": 12}
    usual: Any = build(Config(name="resnet18", stem="narrow"), 32).trunk
    assert usual.conv1.out_channels == 64


def test_the_weights_are_a_function_of_the_seed():
    made: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(weights(build(RESNET, 32)))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["conv1.weight"], made[2]["conv1.weight"])


def test_weights_of_timm_without_internet_are_told_how_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    words = "resnet18 with timm's weights", "download them elsewhere", "--encoder.weights FILE"
    with raises_one_line(ConfigError, *words):
        build(Config(weights="timm"), 64)


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"name": "resnet181"}, 32, ["--encoder.name 'resnet181'", "did you mean", "resnet18"]),
        ({"name": "zzzzzz"}, 32, ["not a timm model", "timm.list_models()"]),
        ({"name": "resnet18", "layers": (1, 1)}, 32, ["4 stages", "--encoder.layers"]),
        ({"name": "resnet18", "channels": (8, 8, 8, 0)}, 32, ["4 stages", ">= 1"]),
        ({"name": "resnet18", "channels": (0, 8, 8, 8)}, 32, ["4 stages", ">= 1"]),
        ({"name": "resnet18", "layers": (1, 1, 1, 0)}, 32, ["4 stages", "not the last"]),
        ({"name": "resnet18", "layers": (0, 0, 0, 1)}, 32, ["single block", "2 or more"]),
        ({"name": "resnet18", "layers": (-1, 1, 1, 1)}, 32, ["4 stages", ">= 1"]),
        ({"name": "convnext_atto", "layers": (1, 1, 1, 1)}, 32, ["--encoder.layers", "convnext_atto is neither"]),
        ({"name": "convnext_atto", "stem": "small"}, 32, ["--encoder.stem small", "convnext_atto is not one"]),
        ({"name": "vit_tiny_patch16_224"}, 8, ["vit_tiny_patch16_224", "8 px"]),
        ({"name": "convnext_atto"}, 8, ["convnext_atto cannot take views of 8 px", "--data.size"]),
    ],
)
def test_what_cannot_be_built_is_one_line(options: dict[str, Any], size: int, words: list[str]):
    with raises_one_line(ConfigError, *words):
        build(Config(**options), size)


def test_weights_from_a_run(tmp_path: Path):
    """A run folder, a checkpoint in it or a file in that; the projector stays behind."""
    torch.manual_seed(0)
    source = build(RESNET, 32)
    method: dict[str, object] = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    state: dict[str, object] = {"method": {**method, "projector.0.weight": torch.zeros(4, 16)}}
    step = checkpoint.save(tmp_path / "run", 5, state, keep=3)
    for path in (tmp_path / "run", step, step / "method.pt", step / "encoder.safetensors"):
        torch.manual_seed(1)
        assert equal(build(replace(RESNET, weights=str(path)), 32), weights(source)), path


def test_a_trunk_whose_norm_is_in_its_head_takes_its_own_weights(tmp_path: Path):
    """ConvNeXt keeps ``head.norm`` without a classifier: not everything under head. is one."""
    source = build(Config(name="convnext_atto"), 32)
    assert any(name.startswith("head.") for name in weights(source))
    torch.save(weights(source) | {"head.fc.weight": torch.zeros(10, 320)}, tmp_path / "w.pt")
    assert equal(build(Config(name="convnext_atto", weights=str(tmp_path / "w.pt")), 32), weights(source))


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_not_run(tmp_path: Path):
    proof = tmp_path / "run"
    torch.save({"conv1.weight": _Touch(proof)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"conv1.weight": _Touch(proof)}))
    for name in ("zip.pt", "plain.pt"):
        with raises_one_line(DataError, "cannot load weights from"):
            build(replace(RESNET, weights=str(tmp_path / name)), 32)
        assert not proof.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert proof.exists()  # it would have done it


@pytest.mark.slow
def test_a_trunk_of_one_size_is_refused_where_probes_have_another():
    words = "swin_tiny_patch4_window7_224 cannot take views of 256 px", "(256)", "--data.eval-size"
    with raises_one_line(ConfigError, *words):
        build(Config(name="swin_tiny_patch4_window7_224"), 224, 256)


def test_a_vit_of_other_patches_depth_and_width_takes_small_crops_too():
    encoder = build(Config(name="vit_tiny_patch16_224", patch=4, layers=(3,), channels=(128,)), 32, 16, 48)
    trunk: Any = encoder.trunk
    assert (len(trunk.blocks), trunk.blocks[0].attn.num_heads, trunk.patch_embed.num_patches) == (3, 2, 64)
    assert (encoder.dim, encoder.size) == (128, 32)
    assert [encoder(torch.zeros(2, 3, size, size)).shape for size in (32, 16, 48)] == [(2, 128)] * 3
    words = "vit_tiny_patch16_224 cannot take views of 18 px", "divisible by patch size (4)"
    with raises_one_line(ConfigError, *words):
        build(Config(name="vit_tiny_patch16_224", patch=4), 32, 18)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "vit_tiny_patch16_224", "layers": (1, 1, 1, 1)}, ["a ViT has one stage", "one number each"]),
        ({"name": "vit_tiny_patch16_224", "channels": (196,)}, ["multiple of 4 x heads", "got 196"]),
        ({"name": "vit_tiny_patch16_224", "channels": (18,)}, ["multiple of 4", "got 18"]),
        ({"name": "vit_tiny_patch16_224", "patch": 0}, ["--encoder.patch", "at least 1"]),
        ({"patch": 4}, ["--encoder.patch applies to timm's vit_* and deit_*", "resnet18 is not one"]),
    ],
)
def test_a_shape_that_no_vit_has_is_one_line(options: dict[str, Any], words: list[str]):
    with raises_one_line(ConfigError, *words):
        build(Config(**options), 32)


def test_a_method_that_needs_a_vit_says_so():
    with raises_one_line(ConfigError, "mae needs a ViT, not ResNet: use --encoder.name vit_small_patch16_224"):
        build(RESNET, 32).check_tokens("mae")


@pytest.mark.slow
def test_timm_does_not_bring_wandb():
    """And leaves it to those who import it."""
    code = "import sys; from sslx.encoders import trunk; trunk.check_name('resnet18'); assert 'timm' in sys.modules\n"
    code += "assert 'wandb' not in sys.modules; from importlib.util import find_spec; assert find_spec('wandb')"
    subprocess.run([sys.executable, "-c", code], check=True)
