"""``sslx look``: the views are those of training, and each augmentation is shown alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kit.processes import is_one_line
from kit.sources import in_memory, noise
from sslx import cli, config, data
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.distributed import Ranks
from sslx.plot import look

READ = "--data.backend torchvision --data.threads 0 --device cpu".split()


def settings(*flags: str) -> config.PretrainConfig:
    return config.load([*READ, "--data.size", "16", *flags])


def test_the_views_are_those_that_a_run_of_one_rank_trains_on() -> None:
    chosen = settings("--method.name", "byol", "--seed", "5")
    source = in_memory(np.random.default_rng().integers(0, 256, (12, 20, 30, 3), dtype=np.uint8))
    views = chosen.method.inputs(chosen.augment, 16).views
    specs = [*views, *(step.spec for step in look.operations(views)), eval_view(16)]
    epochs, number = look._batches(chosen, source, specs, 4, 2, lambda _: None)
    training = data.training(
        chosen.data, source, views, batch_size=4, seed=5, ranks=Ranks(device=torch.device("cpu")), dtype=torch.float32
    )
    assert (number, len(epochs)) == (4, 2)
    for view, expected in zip(epochs[0], next(training).views, strict=False):
        assert torch.equal(view, expected)
    assert not torch.equal(epochs[1][0], epochs[0][0])


def views_of(augment: Augment) -> dict[str, Tensor]:
    """What is drawn for each operation, and without any ("")."""
    source = in_memory(np.random.default_rng().integers(0, 256, (6, 20, 30, 3), dtype=np.uint8))
    view = ViewSpec(size=16, augment=augment, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    steps = look.operations([view])
    plain = replace(view, augment=None)
    epochs, _ = look._batches(settings(), source, [*(step.spec for step in steps), plain], 6, 1, lambda _: None)
    return dict(zip([*(step.name for step in steps), ""], epochs[0], strict=True))


def test_each_operation_is_alone_and_always_applied() -> None:
    geometry = {"flip": 0.01, "vertical_flip": 0.01, "right_angles": 0.01, "rotate": 0.01}
    views = views_of(Augment(**geometry, jitter=0.01, gray=0.01, blur=0.01, solarize=0.01, gain=0.01, noise=0.01))
    others = {"flip", "vertical flip", "right angles", "rotation", "color jitter", "gray", "solarize", "gain", "noise"}
    assert [*views] == ["crop", "flip", "vertical flip", "right angles", "rotation", "color jitter", "gray", "blur",
                        "solarize", "gain", "noise", ""]  # fmt: skip
    plain = views[""]
    torch.testing.assert_close(views["flip"], plain.flip(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(views["vertical flip"], plain.flip(2), rtol=0, atol=1e-6)
    levels = (plain * 255).round()
    inverted = torch.where(levels >= 128, 255 - levels, levels) / 255
    torch.testing.assert_close(views["solarize"], inverted, rtol=0, atol=1e-6)
    gray = views["gray"]
    assert torch.equal(gray, gray[:, :1].expand_as(gray))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(gray[:, 0], (plain * weights).sum(1), rtol=0, atol=2 / 255)
    for image in range(6):
        changed = {name for name in views if name and not torch.equal(views[name][image], plain[image])}
        assert changed >= {"crop", *others}  # not of blur, whose sigma may be 0.1
    assert (views["blur"].flatten(1).std(1) <= plain.flatten(1).std(1) + 1e-6).all()
    assert [*views_of(Augment(flip=0, jitter=0, gray=0, blur=0))] == ["crop", ""]


def test_details_say_which_view_uses_an_operation_how_often() -> None:
    byol = settings("--method.name", "byol")
    steps = look.operations(byol.method.inputs(byol.augment, 96).views)
    details = {step.name: step.detail.replace("\xa0", " ") for step in steps}
    assert details["blur"] == "sigma 0.1 to 2 px; always in view 1, p = 0.1 in view 2"
    assert details["solarize"] == "inverts values of 128 and more; p = 0.2 in view 2"
    assert "flip" not in details, "which digits do not bear"
    assert details["color jitter"].endswith("p = 0.8")
    dino = settings("--method.name", "dino")
    steps = look.operations(dino.method.inputs(dino.augment, 96).views)
    crops = [step for step in steps if step.name == "crop"]
    assert [step.detail.partition("; ")[2] for step in crops] == ["always in views 1, 2", "always in views 3 to 10"]
    assert crops[0].spec.size > crops[1].spec.size


def test_the_command_draws_a_sheet_without_an_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = noise(tmp_path / "photos", 9, side=24)
    flags = ["--source.root", str(photos), "--encoder.weights", "nowhere.pt", "--method.name", "swav"]
    assert cli.main(["look", *READ, *flags]) == 0
    assert capsys.readouterr().out.endswith("wrote swav_folder_look.png\n")
    assert cli.main(["look", *READ, *flags, "--augment.gray", "0", "--num-images", "3", "-o", "few.png"]) == 0
    with Image.open("swav_folder_look.png") as many, Image.open("few.png") as few:
        assert many.height > few.height > 300
        assert many.height > few.height > 300, "one row less"


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code, words in (
        (["simclr_digits", "-o", "x.txt"], 64, "must end in .png or .svg"),
        (["simclr_digits", "--num-images", "0"], 64, "--num-images must be from 1 to 24"),
        (["simclr_digits", "--num-images", "many"], 64, "invalid int value"),
        (["simclr_digit"], 66, "did you mean simclr_digits?"),
        (["simclr_digits", *READ, "-o", "/proc/none/x.png"], 74, "cannot write"),
    ):
        assert cli.main(["look", *argv]) == code
        is_one_line(capsys.readouterr().err, words)
