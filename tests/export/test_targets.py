"""Each target on small encoders: the code in the export's README, run as a user would, computes the same features."""

import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import sslx
from kit import exports
from kit.exports import CONVNEXT, NARROW, VIT, recipe
from sslx import config
from sslx.data.views import ResizedView, ViewSpec
from sslx.encoders import Encoder, Recipe
from sslx.encoders.weights import preprocessing
from sslx.errors import ConfigError, DataError
from sslx.export import exporter
from sslx.export import preprocessing as export_preprocessing
from sslx.trained import Trained

SHALLOW = {"layers": [1, 1, 1, 1]}
ENCODERS = {
    "resnet18": (recipe("resnet18", {}), 32),
    "shallow": (recipe("resnet18", {"layers": [1, 2, 1, 1]}), 32),
    "bottlenecks": (recipe("resnet50", SHALLOW), 32),
    "resnext": (recipe("resnext50_32x4d", {}), 32),
    "wide": (recipe("wide_resnet50_2", SHALLOW), 32),
    "deep stem": (recipe("resnet18d", SHALLOW), 32),
    "narrow wide": (recipe("wide_resnet50_2", NARROW), 32),
    "narrow": (recipe("resnet18", NARROW), 32),
    "narrow bottlenecks": (recipe("resnet50", NARROW), 32),
    "five channels": (recipe("resnet18", NARROW, channels=5), 32),
    "two blocks": (recipe("resnet18", NARROW | {"layers": [1, 0, 0, 1]}, stem="small"), 16),
    "small stem": (recipe("resnet18", NARROW, stem="small"), 16),
    "group norm": (recipe("resnet18", NARROW, norm="group"), 32),
    "no third stage": (recipe("resnet18", NARROW | {"layers": [1, 1, 0, 1]}), 32),
    "vit": (recipe("vit_tiny_patch16_224", VIT), 16),
    "resized vit": (recipe("vit_tiny_patch16_224", VIT), 24),
    "layer scale": (recipe("deit3_small_patch16_224", VIT), 24),
    "mean of patches": (recipe("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "fc_norm": False}), 16),
    "norm after mean": (recipe("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}), 16),
    "registers": (recipe("vit_small_patch14_reg4_dinov2", VIT), 24),
    "no class token": (recipe("vit_little_patch16_reg4_gap_256", VIT), 16),
    "convnext": (recipe("convnext_atto", CONVNEXT, size=64), 64),
    "convnextv2": (recipe("convnextv2_atto", CONVNEXT, size=64), 64),
    "mobilenet": (recipe("mobilenetv3_small_050", {}), 32),
}
FAST = [
    ("torchvision", "shallow"),
    ("torchvision", "resized vit"),
    ("torchvision", "layer scale"),
    ("torchvision", "convnext"),
    ("hf", "narrow"),
    ("hf", "narrow bottlenecks"),
    ("hf", "resized vit"),
    ("hf", "mean of patches"),
    ("hf", "registers"),
    ("hf", "convnext"),
    ("safetensors", "small stem"),
    ("safetensors", "resized vit"),
]
SLOW = [
    ("timm", "resized vit"),
    ("torchvision", "resnet18"),
    ("safetensors", "group norm"),
    ("timm", "registers"),
    ("torchvision", "bottlenecks"),
    ("torchvision", "resnext"),
    ("torchvision", "wide"),
    ("hf", "bottlenecks"),
    ("hf", "five channels"),
    ("hf", "layer scale"),
    ("safetensors", "five channels"),
    ("safetensors", "no class token"),
    ("onnx", "narrow"),
    ("onnx", "resized vit"),
    ("onnx", "five channels"),
    ("onnx", "group norm"),
    ("onnx", "vit"),
    ("onnx", "registers"),
    ("onnx", "no class token"),
    ("onnx", "convnext"),
    ("onnx", "mobilenet"),
]
REFUSED = [
    ("timm", "small stem", "timm has no resnet18 with a small stem", "safetensors or onnx, or pretrain with"),
    ("timm", "group norm", "timm has no resnet18 with group norm", "safetensors or onnx, or pretrain with"),
    ("torchvision", "small stem", "torchvision has no resnet18 with a small stem", "safetensors or onnx, or pretrain"),
    ("torchvision", "narrow", "with other widths", "timm, hf, safetensors or onnx"),
    ("torchvision", "five channels", "for 5 channels", "timm, hf, safetensors or onnx"),
    ("torchvision", "no third stage", "with a stage without blocks", "timm, safetensors or onnx"),
    ("torchvision", "registers", "with register tokens", "timm, hf, safetensors or onnx"),
    ("torchvision", "mean of patches", "with its pooling (avg)", "timm, hf, safetensors or onnx"),
    ("torchvision", "deep stem", "with its stem", "timm, safetensors or onnx"),
    ("torchvision", "mobilenet", "for torchvision, not mobilenetv3_small_050", "timm, safetensors or onnx"),
    ("hf", "group norm", "transformers has no resnet18 with group norm", "safetensors or onnx, or pretrain with"),
    ("hf", "no class token", "without a class token", "timm, safetensors or onnx"),
    ("hf", "norm after mean", "with a norm after pooling", "timm, safetensors or onnx"),
    ("hf", "narrow wide", "with wide or grouped convolutions", "timm, torchvision, safetensors or onnx"),
    ("hf", "convnextv2", "with stages.0.blocks.0.mlp.grn.weight", "timm, safetensors or onnx"),
    ("hf", "mobilenet", "for transformers, not mobilenetv3_small_050", "timm, safetensors or onnx"),
]


def features_by(code: str, images: Tensor) -> Tensor:
    """What code that is meant for a user computes."""
    names: dict[str, Any] = {"images": images}
    with torch.no_grad():
        exec(code, names)
    return torch.as_tensor(names["features"])


def check(target: str, trained: Trained, folder: Path, generator: torch.Generator) -> None:
    """Export and compare the features, from the README's code, of batches and sizes that the encoder takes."""
    difference = exporter.export(trained, target, folder)
    tolerance = 1e-4 if target == "onnx" else 1e-5
    assert difference <= tolerance
    load, _ = exports.code(folder)
    dynamic = "dynamic_img_size" in trained.encoder.recipe.arguments
    fixed = trained.encoder.kind == "vit" and (target in ("torchvision", "hf") or not dynamic)
    for size in (trained.view.size, *([] if fixed else [trained.view.size + 24])):
        for num_images in (3, 1):
            shape = (num_images, trained.encoder.recipe.channels, size, size)
            images = torch.randn(shape, generator=generator)
            with torch.no_grad():
                expected = trained.encoder(images)
            largest = expected.abs().max().item()
            assert largest > 0
            torch.testing.assert_close(features_by(load, images), expected, rtol=0, atol=tolerance * largest)
            if target != "onnx" and size == trained.view.size:
                again = sslx.load(folder)
                assert again.view == trained.view
                with torch.no_grad():
                    torch.testing.assert_close(again.encoder(images), expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(("target", "name"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_librarys_model_computes_the_encoders_features(
    target: str, name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    check(target, exports.trained(*ENCODERS[name], generator), tmp_path / "out", generator)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchvision", "hf", "safetensors", "onnx"])
@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224"])
def test_encoders_of_the_usual_size(target: str, name: str, tmp_path: Path, generator: torch.Generator) -> None:
    arguments = {} if name == "resnet50" else {"img_size": 224}
    check(target, exports.trained(recipe(name, arguments, size=224), 224, generator), tmp_path / "out", generator)


@pytest.mark.parametrize(("target", "name", "reason", "instead"), REFUSED)
def test_what_a_library_does_not_have_is_refused_in_one_line(
    target: str, name: str, reason: str, instead: str, tmp_path: Path, generator: torch.Generator
) -> None:
    with pytest.raises(ConfigError) as error:
        exporter.export(exports.trained(*ENCODERS[name], generator), target, tmp_path / "out")
    message = str(error.value)
    assert reason in message
    assert f"use --to {instead}" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


MEAN_STD: dict[str, Any] = {"mean": exports.MEAN, "std": exports.STD}
VIEWS = {
    "of sslx": ViewSpec(size=16, center=0.875, **MEAN_STD),
    "resized": ResizedView(size=16, resized=19, interpolation="bicubic", rounds_down=True, **MEAN_STD),
    "whole": ResizedView(size=16, resized=16, keeps_ratio=False, rounds_down=True, **MEAN_STD),
}


@pytest.mark.parametrize("view", VIEWS)
def test_how_images_are_prepared_is_read_back(view: str, tmp_path: Path) -> None:
    """From what other libraries read, not from sslx.json.  timm has no views of sslx, and another rounding."""
    text = json.dumps(export_preprocessing.of_hugging_face(VIEWS[view]))
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert preprocessing.view_beside(tmp_path) == (VIEWS[view], "preprocessor_config.json")
    if view == "of sslx":
        return
    (tmp_path / "preprocessor_config.json").unlink()
    for size in range(16, 400, 7):
        resized = replace(VIEWS[view], size=size, resized=size + size // 7, rounds_down=False)
        config = {"input_size": [3, size, size], **export_preprocessing.of_timm(resized)}
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": config}))
        assert preprocessing.view_beside(tmp_path) == (resized, "config.json")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("target", ["torchvision", "hf"])
def test_the_code_of_the_card_prepares_images_as_the_probes_do(
    target: str, view: str, tmp_path: Path, generator: torch.Generator
) -> None:
    trained = replace(exports.trained(recipe("vit_tiny_patch16_224", VIT), 16, generator), view=VIEWS[view])
    exporter.export(trained, target, tmp_path / "out")
    _, prepare = exports.code(tmp_path / "out")
    for height, width in ((48, 61), (200, 40), (104, 104)):
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        names: dict[str, Any] = {"image": Image.fromarray(pixels.numpy())}
        exec(prepare, names)
        expected = trained.transform(pixels.numpy())
        # Torch's resizing differs from PIL's by a level.  Before version 5, transformers resized by PIL.
        by_pil = transformers.__version__ < "5"
        level = 1.01 / 255 / min(exports.STD) if target == "hf" and by_pil == (view == "of sslx") else 1e-6
        torch.testing.assert_close(names["images"], expected[None], rtol=0, atol=level)


def test_transformers_finds_every_tensor_and_no_other(tmp_path: Path, generator: torch.Generator) -> None:
    for name, kind in (("vit", "ViTModel"), ("registers", "Dinov2WithRegistersModel"), ("narrow", "ResNetModel")):
        exporter.export(exports.trained(*ENCODERS[name], generator), "hf", tmp_path / name)
        loaded: tuple[nn.Module, dict[str, Any]] = transformers.AutoModel.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert type(loaded[0]).__name__ == kind
        assert not any(loaded[1].values()), loaded[1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("two blocks", ["batch", 3, "height", "width"], marks=pytest.mark.slow),
        pytest.param("vit", ["batch", 3, 16, 16], marks=pytest.mark.slow),
    ],
)
def test_an_onnx_file_takes_any_batch_and_says_how_images_are_prepared(
    name: str, shape: list[Any], tmp_path: Path, generator: torch.Generator
) -> None:
    trained = exports.trained(*ENCODERS[name], generator)
    check("onnx", trained, tmp_path / "out", generator)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "model.onnx", "sslx.json"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(each.name, each.shape) for each in session.get_inputs()] == [("images", shape)]
    assert [(each.name, each.shape) for each in session.get_outputs()] == [("features", ["batch", 16])]
    check_facts(session.get_modelmeta().custom_metadata_map, trained)


def test_a_safetensors_file_has_timms_names_and_says_how_images_are_prepared(
    tmp_path: Path, generator: torch.Generator
) -> None:
    trained = exports.trained(*ENCODERS["small stem"], generator)
    exporter.export(trained, "safetensors", tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trained.encoder.trunk.state_dict())
        check_facts(file.metadata(), trained)


def check_facts(metadata: dict[str, str], trained: Trained) -> None:
    assert Recipe(**json.loads(metadata["recipe"])) == trained.encoder.recipe
    assert json.loads(metadata["view"]) == json.loads(json.dumps(asdict(trained.view)))


class Bessel(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x.mean((2, 3)))


@pytest.mark.soak
def test_an_operator_that_onnx_does_not_have_is_one_line(tmp_path: Path, generator: torch.Generator) -> None:
    trained = exports.trained(*ENCODERS["two blocks"], generator)
    vars(trained)["encoder"] = Encoder(Bessel(), 3, recipe("bessel", {}))  # in place of the cached one
    with pytest.raises(ConfigError) as error:
        exporter.export(trained, "onnx", tmp_path / "out")
    assert str(error.value).startswith("bessel cannot be written as ONNX, which may not have all of its operators (")
    assert "bessel_j0" in str(error.value)
    assert str(error.value).endswith("use --to safetensors")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "package"), [("onnx", "onnxscript"), ("hf", "transformers")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    target: str, package: str, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    command = rf"^--to {target} needs {package}, which is not installed: pip install [a-z ]*{package}[a-z ]*$"
    with pytest.raises(ConfigError, match=command):
        exporter.export(exports.trained(*ENCODERS["vit"], generator), target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_confused_tensors_are_found(
    tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same shape, so transformers loads them without a word."""
    module: Any = exporter.TARGETS.module("hf")
    swap = {"before": "after", "after": "before"}
    rules = [(old, re.sub("before|after", lambda m: swap[m[0]], new)) for old, new in module._VIT]
    monkeypatch.setattr(module, "_VIT", rules)
    with pytest.raises(DataError, match=r"^hf loads the exported encoder, but its features differ by [^\n]*$"):
        exporter.export(exports.trained(*ENCODERS["vit"], generator), "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_card_has_the_command_and_the_scores(tmp_path: Path, generator: torch.Generator) -> None:
    (tmp_path / "run").mkdir()
    knn, low = (float(x) for x in np.round(np.random.default_rng().random(2), 3))
    scores = [{"name": "a | b", "knn": knn, "k": 20, "low_shot": {"5": {"mean": low}}}, {"name": "pixels", "knn": 0.5}]
    record = {"step": 12, "source": "digits", "split": "test", "num_images": 355, "scores": scores}
    (tmp_path / "run" / "probe.json").write_text(json.dumps(record))
    trained = exports.trained(*ENCODERS["vit"], generator, folder=tmp_path / "run")
    exporter.export(trained, "safetensors", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "on 355 images of the test split of digits, at step 12" in text
    assert "| score | a \\| b | pixels |" in text
    assert f"| knn | {knn:.4g} | 0.5 |" in text
    assert f"| low_shot.5.mean | {low:.4g} |  |" in text
    (command,) = exports.code(tmp_path / "out", "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["sslx", "pretrain"]
    assert config.load(words[2:]) == trained.settings
    (tmp_path / "run" / "probe.json").write_text("[")
    exporter.export(trained, "safetensors", tmp_path / "again")
    assert "cannot be read" in (tmp_path / "again" / "README.md").read_text()
