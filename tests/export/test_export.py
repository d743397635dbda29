"""Exports are loaded by the library that they are for, and computed by it on random images."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch

import sslx
from sslx import cli
from sslx.export import exporter
from sslx.runs import records

SMALL = "--steps 1 --batch-size 32 --data.size 16 --online.every 0 --name run".split()
RESNET = "simclr_digits --encoder.stem imagenet --encoder.channels 8 8 8 16".split()
VIT = "mae_digits --encoder.patch 4 --data.eval-size 24".split()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    assert cli.main(["pretrain", *RESNET, *SMALL, "--runs", str(folder)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    assert cli.main(["pretrain", *VIT, *SMALL, "--runs", str(folder)]) == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_timm_computes_the_encoders_features_and_prepares_images_as_the_probes(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path = request.getfixturevalue(name)
    assert cli.main(["export", str(run), "--to", "timm"]) == 0
    folder = run / "export" / "timm"
    line = f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    assert f"load it:\n  import timm\n  {line}\n" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert line in card
    start = records.read_starts(run)[0]
    assert f"| trained on | 1 rank on {start.device}, " in card
    assert f"torch {start.versions['torch']}" in card
    assert f"```bash\n{start.command}\n```" in card
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin", "README.md", "sslx.json"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    trained = sslx.load(run)
    view = trained.view
    prepared = timm.data.resolve_model_data_config(model)
    assert tuple(prepared["input_size"]) == (3, view.size, view.size)
    assert (tuple(prepared["mean"]), tuple(prepared["std"]), prepared["crop_pct"]) == (view.mean, view.std, view.center)
    images = torch.randn(3, 3, view.size, view.size)
    with torch.no_grad():
        expected = trained.encoder(images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert trained.encoder(images[:1]).std() > 0


TARGET = '''
"""A target of one's own."""
import json, pathlib, timm, torch

def write(trained, folder):
    torch.save(trained.encoder.trunk.state_dict(), folder / "weights.pt")
    (folder / "arguments.json").write_text(json.dumps(trained.encoder.recipe.arguments))

def read(trained, folder):
    arguments = json.loads((folder / "arguments.json").read_text())
    model = timm.create_model("resnet18", num_classes=0, **arguments)
    weights = torch.load(folder / "weights.pt")
    weights["bn1.weight"] *= {factor}
    model.load_state_dict(weights)
    return model

def usage(trained, folder):
    return f"read({{folder}})"
'''


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.001, 65), (math.nan, 65)])
def test_an_export_that_computes_something_else_leaves_no_trace(
    resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, code: int
) -> None:
    target = tmp_path / f"target_{code}_{str(factor).replace('.', '_')}.py"
    target.write_text(TARGET.format(factor=f"float('{factor}')"))
    assert cli.main(["export", str(resnet), "--to", str(target), "-o", str(tmp_path / "out" / "model")]) == code
    if code:
        assert "its features differ by" in capsys.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []
    else:
        assert json.loads((tmp_path / "out" / "model" / "arguments.json").read_text())["channels"] == [8, 8, 8, 16]


def test_the_help_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--help"]) == 0
    text = capsys.readouterr().out
    assert exporter.TARGETS.available() == ("hf", "onnx", "safetensors", "timm", "torchvision")
    assert all(target in text for target in exporter.TARGETS.available())


def test_bad_input_is_one_line(resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for argv, code, words in (
        ([tmp_path / "none"], 66, "no checkpoint"),
        ([resnet, "--to", "tim"], 64, "--to 'tim' is unknown: did you mean timm?"),
        ([resnet, "-o", tmp_path / "there"], 64, "exists: remove it, or name another folder by --output"),
        ([resnet, "-o", tmp_path / "file" / "x"], 74, "cannot write"),
        ([resnet, "-o", tmp_path / "\udcff"], 64, "/\\xff is no name that other libraries open"),
    ):
        assert cli.main(["export", *map(str, argv)]) == code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
