"""``sslx weights FILE``: what it shows, and that its flags build an encoder that takes the file."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from kit.random_models import randomized
from sslx import cli, config, encoders

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 2, 1, 1], "channels": [8, 8, 8, 16]}),
    "bottleneck": ("resnet50", {"layers": [1, 1, 1, 1]}),
    "vit": ("vit_base_patch16_224", {"depth": 2, "embed_dim": 192, "num_heads": 3, "patch_size": 8, "img_size": 32}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 28}),
    "without a class token": (
        "vit_huge_patch14_gap_224",
        {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 28},
    ),
    "convnext": ("convnext_atto", {}),
    "swin": ("swin_tiny_patch4_window7_224", {}),
}

LARGE = ("without a class token", "convnext", "swin")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in MODELS]
)
def test_its_flags_build_the_encoder_of_the_file(
    name: str, tmp_path: Path, generator: torch.Generator, capsys: pytest.CaptureFixture[str]
):
    model, options = MODELS[name]
    theirs = randomized(timm.create_model(model, num_classes=3, **options), generator)
    torch.save({"state_dict": {f"module.{key}": x for key, x in theirs.state_dict().items()}}, tmp_path / "my file.pt")
    assert cli.main(["weights", str(tmp_path / "my file.pt")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"state_dict: {len(theirs.state_dict())} tensors" in out
    flags = shlex.split(out.splitlines()[-1])
    settings = config.parse(["--source.root", str(tmp_path), *flags], quiet=True)
    size = settings.data.size or 64
    said: list[str] = []
    encoder = encoders.build(settings.encoder, size, say=said.append).eval()
    assert "left out: " in said[0]
    theirs.reset_classifier(0)
    x = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), theirs(x), rtol=1e-5, atol=1e-4)


def test_two_encoders_are_told_apart_by_their_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    states = [timm.create_model("resnet18", num_classes=0).state_dict() for _ in range(2)]
    both = {f"encoder_{which}.{key}": x for which, state in zip("qk", states, strict=True) for key, x in state.items()}
    torch.save({"state_dict": both | {"queue": torch.randn(8, 4)}, "optimizer": {}}, tmp_path / "file.pt")
    assert cli.main(["weights", str(tmp_path / "file.pt")]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"--encoder.weights-part (\S+)", out) == ["state_dict.encoder_q", "state_dict.encoder_k"]
    assert "  queue: 1 tensor, 32 numbers, float32" in out


def test_what_is_not_recognized_and_what_is_no_file_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"weight": torch.randn(3, 2), "conv1.weight": torch.randn(3)}, tmp_path / "file.pt")
    assert cli.main(["weights", str(tmp_path / "file.pt")]) == 0
    assert "no encoder in it is recognized" in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("words")
    for name, code in (("text.pt", 65), ("no.pt", 66)):
        assert cli.main(["weights", str(tmp_path / name)]) == code
        assert len(capsys.readouterr().err.splitlines()) == 1
