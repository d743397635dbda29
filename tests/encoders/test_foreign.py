"""Encoders that sslx did not train: prepared as their own library prepares images, and refused in one line if bad.

Every layout is loaded by ``sslx.load`` in test_layouts.py, and every export in tests/export/test_targets.py.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import sslx
from kit.errors import raises_one_line
from kit.random_models import randomized
from sslx import cli
from sslx.data.pictures import Transform
from sslx.data.views import ResizedView
from sslx.encoders.weights import preprocessing
from sslx.errors import ConfigError, DataError, MissingInput

Prepare = Callable[[Image.Image], Tensor]
SIDES = [(40, 51), (57, 40), (64, 64), (90, 33)]
NARROW: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "num_classes": 0}


@pytest.fixture
def photos(generator: torch.Generator) -> list[Image.Image]:
    pixels = [torch.randint(256, (*side, 3), generator=generator, dtype=torch.uint8).numpy() for side in SIDES]
    return [Image.fromarray(array) for array in pixels]


def transformers(module: str, name: str, **options: Any) -> Callable[[Path], Prepare]:
    def save(folder: Path) -> Prepare:
        file = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
        processor = getattr(file, f"{name}Pil")(**options)
        processor.save_pretrained(folder)
        return lambda image: torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])

    return save


def of_timm(**options: Any) -> Callable[[Path], Prepare]:
    def save(folder: Path) -> Prepare:
        model = timm.create_model("resnet18", **NARROW, pretrained_cfg_overlay=options)
        timm.models.save_for_hf(model, folder)
        return timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    return save


def open_clip(**options: Any) -> Callable[[Path], Prepare]:
    def save(folder: Path) -> Prepare:
        transform = import_module("open_clip.transform")
        settings = {"model_cfg": {"vision_cfg": {"image_size": 31}}, "preprocess_cfg": options}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        return transform.image_transform_v2(transform.PreprocessCfg(size=31, **options), is_train=False)

    return save


@pytest.mark.parametrize(
    "save",
    {
        "ViT": transformers("vit", "ViTImageProcessor", size={"height": 33, "width": 33}),
        "CLIP": transformers("clip", "CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=32, resample=1),
        "BEiT": transformers("beit", "BeitImageProcessor", size={"height": 37, "width": 37}, crop_size=32,
                             do_center_crop=True, do_normalize=False),
        "ConvNeXt": transformers("convnext", "ConvNextImageProcessor", size={"shortest_edge": 31}, crop_pct=0.9),
        "large ConvNeXt": transformers("convnext", "ConvNextImageProcessor", size={"shortest_edge": 384}),
        "timm": of_timm(input_size=(3, 33, 33), crop_pct=0.9, interpolation="bicubic", mean=(0.1, 0.2, 0.3)),
        "timm, whole image": of_timm(input_size=(3, 32, 32), crop_pct=0.95, crop_mode="squash"),
        "open_clip": open_clip(mean=[0.5, 0.4, 0.3], interpolation="bilinear"),
        "open_clip, whole image": open_clip(resize_mode="squash"),
    }.items(),
    ids=lambda pair: pair[0],
)  # fmt: skip
def test_images_are_prepared_as_the_library_does(
    save: tuple[str, Callable[[Path], Prepare]], tmp_path: Path, photos: list[Image.Image]
):
    prepare = save[1](tmp_path)
    found = preprocessing.view_beside(tmp_path)
    assert found is not None
    for image in photos:
        torch.testing.assert_close(Transform(found[0])(image), prepare(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"size": 32, "do_resize": False}, {"size": {"longest_edge": 32}}, {"size": {"shortest_edge": 32}}),
        *({"size": 32, "resample": 4}, {"size": 32, "rescale_factor": 1 / 127.5}, {"size": 32, "image_std": [1, 0, 1]}),
        *({"size": -1}, {"size": "32"}, {"size": 10**9}, {"size": {"height": 32, "width": 24}}, []),
        {"size": 32, "do_center_crop": True, "crop_size": 40},
    ],
)
def test_other_settings_are_not_taken(settings: Any, tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert preprocessing.view_beside(tmp_path) is None


@torch.no_grad()
def test_a_folder_of_timm_may_have_any_of_its_models(
    tmp_path: Path, photos: list[Image.Image], generator: torch.Generator
):
    model: Any = randomized(timm.create_model("mobilenetv3_small_050", num_classes=0), generator)
    timm.models.save_for_hf(model, tmp_path)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    trained = sslx.load(tmp_path)
    expected = model(torch.stack([prepare(image) for image in photos]))
    assert (trained.embed(photos) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert trained.recipe is not None
    assert (trained.recipe.name, trained.view.size) == ("mobilenetv3_small_050", 224)


@pytest.mark.parametrize("quick_gelu", [False, True])
@torch.no_grad()
def test_the_tower_of_a_whole_clip_model_has_its_activation_and_heads(
    quick_gelu: bool, tmp_path: Path, photos: list[Image.Image], generator: torch.Generator
):
    models, transform = (import_module(f"open_clip.{name}") for name in ("model", "transform"))
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model: Any = randomized(models.CLIP(24, vision, text, quick_gelu=quick_gelu), generator)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    prepare = transform.image_transform_v2(transform.PreprocessCfg(size=32), is_train=False)
    model.visual.proj = None
    expected = model.visual(torch.stack([prepare(image) for image in photos]))
    vectors = sslx.load(tmp_path).embed(photos)
    assert (vectors - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture
def teacher_and_student(tmp_path: Path, generator: torch.Generator) -> Path:
    """A file as DINO saves it, with two encoders."""
    parts = {
        name: {
            f"module.backbone.{key}": value
            for key, value in randomized(timm.create_model("resnet18", **NARROW), generator).state_dict().items()
        }
        for name in ("student", "teacher")
    }
    torch.save(parts, tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


def test_one_of_two_encoders_is_chosen_by_its_part_and_images_are_prepared_as_usual(
    teacher_and_student: Path, photos: list[Image.Image]
):
    with raises_one_line(DataError, "holds 2 such encoders, under student.module.backbone, teacher.module", "--part"):
        sslx.load(teacher_and_student)
    trained = sslx.load(teacher_and_student, part="teacher")
    saved = torch.load(teacher_and_student, weights_only=True)["teacher"]
    weight = trained.encoder.state_dict()["trunk.layer4.0.conv1.weight"]
    assert torch.equal(weight, saved["module.backbone.layer4.0.conv1.weight"])
    assert trained.notes[1].startswith("preprocessing: 224 px, with the mean and standard deviation of ImageNet")
    small = trained.with_view_size(48)
    assert small.embed(photos).shape == (4, 16)
    assert (small.view.size, small.view.mean) == (48, (0.485, 0.456, 0.406))
    resized = replace(small, view=ResizedView(size=32, resized=36)).with_view_size(64)
    assert resized.view == ResizedView(size=64, resized=72)
    untrained = [one.untrained_encoder().state_dict()["trunk.layer4.0.conv1.weight"] for one in (small, trained)]
    assert torch.equal(untrained[0], untrained[1])
    assert not torch.equal(untrained[0], weight)
    for only_of_a_run in (trained.averaged, trained.method, lambda: trained.settings):
        with raises_one_line(ConfigError, "dino.pth has no ", "because it is no run of sslx"):
            only_of_a_run()


class Code:
    """What runs code as soon as it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_bad_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator):
    monkeypatch.chdir(tmp_path)
    state = timm.create_model("resnet18", **NARROW).state_dict()
    torch.save(state, "good.pth")
    content = Path("good.pth").read_bytes()
    Path("damaged.pth").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.randn(3, 3, generator=generator)}, "other.pt")
    torch.save({name: value for name, value in state.items() if "layer3.0.conv2" not in name}, "part.pt")
    torch.save({"x": Code()}, "code.pt")
    Path("onnx").mkdir()
    Path("onnx/model.onnx").write_bytes(b"\x08\x07")
    Path("exported").mkdir()
    torch.save(state, "exported/model.pth")
    Path("exported/sslx.json").write_text('{"sslx": "1", "recipe": {"name": 3}, "view": {}}')
    for path, kind, words in (
        ("none.pth", MissingInput, "no checkpoint at none.pth"),
        ("damaged.pth", DataError, "truncated or damaged"),
        ("other.pt", DataError, "other.pt holds no encoder that is recognized: sslx weights FILE shows"),
        ("part.pt", DataError, "part.pt holds no encoder that is recognized"),
        ("code.pt", DataError, "none of it was run"),
        ("onnx", DataError, "onnx holds an ONNX file"),
        ("exported", DataError, "exported/sslx.json is not as sslx export wrote it"),
    ):
        with raises_one_line(kind, words):
            sslx.load(path)
    assert not Path("ran").exists()
    with raises_one_line(DataError, "recognized under teacher"):
        sslx.load("good.pth", part="teacher")


def test_commands_take_weights_and_write_nothing_beside_them(
    teacher_and_student: Path,
    photos: list[Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number, image in enumerate(photos):
        image.save(images / f"{number}.png")
    weights = [str(teacher_and_student), "--part", "student"]
    source = ["--source.root", str(images), "--data.eval-size", "32", "--data.backend", "torchvision"]
    assert cli.main(["embed", *weights, *source, "-o", str(out / "x.npy")]) == 0
    assert "weights: 78 of 78 tensors, under student.module.backbone" in capsys.readouterr().out
    trained = sslx.load(teacher_and_student, part="student").with_view_size(32)
    np.testing.assert_allclose(np.load(out / "x.npy"), trained.embed(images, as_numpy=True), rtol=1e-5, atol=1e-6)
    first = [weights[0], str(images / "0.png"), *weights[1:], *source]
    assert cli.main(["neighbors", *first, "-o", str(out / "x.png")]) == 0
    assert cli.main(["export", *weights, "--to", "timm", "-o", str(out / "timm")]) == 0
    assert "An encoder that sslx" in (out / "timm" / "README.md").read_text()
    capsys.readouterr()
    for command in (["neighbors", *first], ["export", *weights]):
        assert cli.main(command) == 64
        assert "is no run of sslx, so nothing is written there: name an --output" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out", "dino.pth"}


@pytest.mark.slow
def test_the_scores_of_weights_go_only_where_the_user_says(
    teacher_and_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["probe", str(teacher_and_student), "--part", "student", "--source.name", "digits"]
    command += ["--data.eval-size", "32", "--probe.num-views", "2", "--probe.shots", "--probe.fractions"]
    assert cli.main(command) == 0
    assert "scores without labels on 355 test images, 32 px" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"dino.pth"}
    assert cli.main([*command, "--output", str(tmp_path / "scores")]) == 0
    folder = tmp_path / "scores" / "dino.pth"
    rows = {row["name"]: row for row in json.loads((folder / "probe.json").read_text())["scores"]}
    assert list(rows) == ["raw pixels", "untrained encoder", "pretrained encoder"]
    assert rows["pretrained encoder"]["linear"] > 0.12
    assert list((folder / "features").iterdir())
    assert cli.main([*command[:2], *command[1:], "--output", str(tmp_path / "x")]) == 64
    assert "no two of them by the same name" in capsys.readouterr().err
