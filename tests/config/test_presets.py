"""What is chosen where nobody says: it suits every method in every situation, and what a user says is kept."""

import itertools
import re
from pathlib import Path

import pytest

from sslx import config, methods
from sslx.config import flags, presets
from sslx.data import sources

FOLDER = sources.options("folder")(name="folder")
PHOTOS = ["--source.name", "folder", "--source.root", "photos", "--device", "cuda"]


@pytest.mark.parametrize("method", methods.available())
def test_every_method_says_what_it_is_and_has_values_for_every_situation(method: str):
    assert set(presets.about(method)) == {"what", "encoders", "cost", "paper"}
    for encoder, batch_size in itertools.product(("resnet50", "vit_small_patch16_224"), (64, 4096)):
        given = ["--method.name", method, "--encoder.name", encoder, "--batch-size", str(batch_size), *PHOTOS]
        loaded = config.load(given)
        for side in (32, 96):
            settings, reasons = config.settle(loaded, side)
            assert settings.optim.name == "adamw" or "vit" not in encoder
            assert settings.optim.name != "lars" or batch_size >= 1024 or method == "swav"  # as its authors do
            assert settings.augment.blur == 0 or side > 64
            assert reasons
        assert config.loads(config.dump(settings)) == settings


def test_a_users_values_and_a_recipes_stay(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[optim]\nname = "lars"\n[augment]\nblur = 0.3\n')
    chosen, reasons = config.settle(config.load([str(recipe), "--method.temperature", "0.5", *PHOTOS]), 32)
    assert (chosen.optim.name, chosen.augment.blur, chosen.method.temperature) == ("lars", 0.3, 0.5)  # type: ignore[attr-defined]
    assert (chosen.optim.lr, chosen.augment.brightness) == (0.3, 0.4)
    said = " ".join(reasons)
    assert "--optim.lr 0.3" in said
    assert "--augment.brightness 0.4" in said
    assert not any(flag in said for flag in ("--optim.name", "--augment.blur", "--method.temperature"))


def test_another_method_than_the_recipes_brings_its_own():
    recipe = config.load(["simclr_digits"])
    other = config.load(["simclr_digits", "--method.name", "byol", "--device", "cuda"])
    assert (other.method.name, other.optim.lr) == ("byol", 0.5)
    assert other.encoder == recipe.encoder
    assert other.data == recipe.data
    assert config.load(["simclr_digits", "--method.name", "simclr"]) == recipe


@pytest.mark.parametrize(
    ("given", "side", "is_smaller"),
    [
        ([], 32, True),
        ([], 96, False),
        (["--device", "cuda"], 32, False),
        (["--encoder.name", "resnet18"], 32, False),
        (["--encoder.stem", "small"], 32, False),
        (["--encoder.weights", "timm"], 32, False),
        (["--method.name", "mae"], 32, False),
    ],
)
def test_small_images_without_a_gpu_get_a_small_encoder_if_the_user_chose_none(
    given: list[str], side: int, is_smaller: bool
):
    settings, reasons = config.settle(config.load([*PHOTOS, "--device", "cpu", *given]), side)
    assert (settings.encoder.channels == (16, 32, 64, 256)) == is_smaller
    assert ("--encoder.channels 16 32 64 256 --encoder.stem narrow" in " ".join(reasons)) == is_smaller


def test_a_method_that_needs_a_vit_brings_one():
    settings = config.load(["--method.name", "mae", *PHOTOS])
    assert settings.encoder.name == "vit_small_patch16_224"
    assert config.settle(settings, 32)[0].encoder.patch == 4
    assert config.settle(settings, 224)[0].encoder.patch is None
    assert config.load(["--method.name", "mae", "--encoder.name", "vit_tiny_patch16_224"]).encoder.patch is None


def test_warm_up_is_ten_epochs_or_a_tenth():
    assert [config.load(["--epochs", epochs]).optim.warmup for epochs in ("20", "100", "400")] == [0.1, 0.1, 0.025]
    assert config.load(["--method.name", "simsiam", "--device", "cuda"]).optim.warmup == 0.0


def test_the_defaults_follow_the_batch_size_in_any_notation():
    for given in (["--batch-size", "2048"], ["--batch-size=2048"], ["--batch_size", "2048"]):
        assert config.load(given).optim.name == "lars"
    assert config.load([]).optim.name == "sgd"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("resnet18 wide_resnet50_2 regnety_032 efficientnet_b0", False),
        ("vit_base_patch16_224 deit_tiny_patch16_224 convnext_tiny", True),
        ("swin_tiny_patch4_window7_224 vit_small_r26_s32_224", True),
    ],
)
def test_transformers_are_told_from_convolutional_encoders(names: str, expected: bool):
    assert [name for name in names.split() if presets.is_transformer(name) != expected] == []


def test_a_method_of_ones_own_gets_plain_defaults():
    for encoder, optimizer in (("resnet18", "sgd"), ("vit_tiny_patch16_224", "adamw")):
        chosen = presets.choices("mine", encoder, 256, 100, FOLDER, gpu=True)
        assert presets.merged(chosen)["optim.name"] == optimizer
    assert presets.names("mine", FOLDER) >= {"optim.name", "optim.lr", "optim.warmup"}


def test_options_are_read_from_flags_in_any_notation():
    assert flags.names(["--optim.weight-decay", "0", "--steps", "3", "-x"]) == {"optim.weight_decay", "steps"}
    assert flags.last(["--batch_size", "1", "--batch-size", "2"], "batch-size") == "2"
    assert flags.last(["--steps"], "steps", "none") == "none"


def test_what_is_unset_is_in_no_file_until_it_is_settled():
    settings = config.load(["--method.name", "dino", *PHOTOS])
    assert not re.search('"(min_scale|unset)"', config.dump(settings))
    settled, _ = config.settle(settings, 224)
    assert '"min_scale": 0.14' in config.dump(settled)
    assert settled.unset == ()


def test_without_a_gpu_batches_epochs_and_views_are_smaller(monkeypatch: pytest.MonkeyPatch):
    small = config.load([*PHOTOS[:4], "--device", "cpu"])
    assert (small.batch_size, small.epochs) == (64, 30)
    for side, expected in ((224, 96), (96, None), (32, None)):
        settled, reasons = config.settle(small, side)
        assert settled.data.size == expected
        assert ("--data.size 96" in " ".join(reasons)) == (expected == 96)
    large = config.load(PHOTOS)
    assert (large.batch_size, large.epochs) == (256, 100)
    assert config.settle(large, 224)[0].data.size is None
    given = config.load([*PHOTOS[:4], "--device", "cpu", "--data.size", "224", "--batch-size", "32"])
    assert config.settle(given, 224)[0].data.size == 224
    assert given.batch_size == 32
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert config.load(PHOTOS[:4]).batch_size == 64


OTHERS = {"mae", "jigsaw", "rotation", "byol"}  # a ViT; what suits both; other batches; SGD takes 700 steps


@pytest.mark.parametrize("method", [name for name in methods.available() if name not in OTHERS])
def test_short_runs_on_a_cpu_take_what_the_recipes_for_cpus_were_tuned_with(method: str):
    recipe = config.load([f"{method}_cifar10_cpu"])
    settings = config.load(["--method.name", method, "--encoder.name", recipe.encoder.name, "--device", "cpu"])
    assert settings.optim.name == recipe.optim.name
    assert settings.optim.lr == recipe.optim.lr


def test_a_batch_that_nobody_set_is_no_larger_than_the_images():
    for num_images, expected in ((2, 2), (3, 2), (40, 32), (64, 64), (1000, 64)):
        settings = config.load([*PHOTOS[:4], "--device", "cpu"])
        assert config.settle(settings, 32, num_images)[0].batch_size == expected
    given = config.load([*PHOTOS, "--batch-size", "128"])
    assert config.settle(given, 32, 40)[0].batch_size == 128


def test_a_reason_is_not_given_for_values_that_another_choice_has_replaced():
    found = [
        presets.Choice("SGD as in the paper", {"optim.name": "sgd", "optim.lr": 0.03, "method.head_norm": True}),
        presets.Choice("no GPU: LARS", {"optim.name": "lars", "optim.lr": 3.0}),
    ]
    names = {"optim.name", "optim.lr", "method.head_norm"}
    of_the_method, without_gpu = presets.words(found, names)
    assert of_the_method == "other defaults of the method (--method.head-norm)"
    assert without_gpu == "no GPU: LARS (--optim.name lars --optim.lr 3)"
    assert presets.words(found[:1], names)[0].startswith("SGD as in the paper (")
    assert presets.words(found[:1], {"optim.lr"}) == ["SGD as in the paper (--optim.lr 0.03)"]
