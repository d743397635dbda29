"""Weights of others: every layout whole or refused in words that say what the file is; a resume needs no file."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.processes import outside
from sslx.encoders import Config, build, weights
from sslx.errors import ConfigError, DataError, MissingInput

SHAPE: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}


def resnet(seed: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet18", **{**SHAPE, "num_classes": 0, **options})


def state_of(seed: int, **options: Any) -> dict[str, Tensor]:
    """Weights, with running statistics that are not those of a new model."""
    model = resnet(seed, **options)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return {name: value.clone() for name, value in model.state_dict().items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WHOLE = state_of(0, num_classes=5)
OWN = {name: value for name, value in WHOLE.items() if not name.startswith("fc.")}
OTHER = state_of(2)
HEAD = torch.ones(4, 16)
LAYOUTS: dict[str, tuple[Any, str | None, str]] = {
    "plain": (OWN, None, "78 of 78 tensors"),
    "with a classifier": (WHOLE, None, "left out: fc.weight, fc.bias"),
    "DataParallel": ({"state_dict": under("module.", WHOLE), "epoch": 90}, None, "under state_dict.module;"),
    "compiled": (under("_orig_mod.", WHOLE), None, "left out: fc.weight"),
    "compiled within": ({f"model._orig_mod.{k}": v for k, v in OWN.items()}, None, "under model"),
    "no counters": ({k: v for k, v in OWN.items() if not k.endswith("num_batches_tracked")}, None, "78 of 78"),
    "half, with its counters": ({k: v.half() for k, v in OWN.items()}, None, "78 of 78"),
    "settings": ({"model": OWN, "args": argparse.Namespace(lr=1e-3, out=Path("x")), "epoch": 3}, None, "under model"),
    "an int beside": ({**OWN, "epoch": 3}, None, "78 of 78"),
    "tutorial": ({"model_state_dict": OWN, "optimizer_state_dict": {"state": {}}}, None, "under model_state_dict"),
    "MoCo v2": ({"state_dict": under("module.encoder_q.", {**OWN, "fc.0.weight": HEAD})}, None, "left out: fc.0"),
    "MoCo v2, both": (
        {"state_dict": under("module.encoder_q.", OWN) | under("module.encoder_k.", OTHER)},
        "encoder_q",
        "under state_dict.module.encoder_q",
    ),
    "SwAV": (
        under("module.", {**OWN, "projection_head.0.weight": HEAD, "prototypes.weight": HEAD}),
        None,
        "prototypes",
    ),
    "Barlow Twins": (
        {"model": under("module.backbone.", OWN) | {"module.projector.0.weight": HEAD}},
        None,
        "1 elsewhere",
    ),
    "DINO": ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.", OWN)}, "teacher", "teacher.b"),
    "VISSL": (
        {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", OWN)}}}},
        None,
        "trunk",
    ),
    "a checkpoint of sslx elsewhere": (
        {"method": under("encoder.trunk.", OWN) | under("teacher.0.trunk.", OTHER)},
        None,
        "under method.encoder.trunk",
    ),
    "twice the same": ({"ema": OWN, "model": OWN}, None, "78 of 78"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_is_found_whole_and_accounted_for(layout: str, tmp_path: Path):
    content, part, words = LAYOUTS[layout]
    torch.save(content, tmp_path / "file.pt")
    trunk = resnet().eval()
    line = weights.load(trunk, str(tmp_path / "file.pt"), "resnet18", part)
    assert words in line, line
    assert "\n" not in line
    truth = resnet(3).eval()
    half = layout.startswith("half")
    truth.load_state_dict({k: v.half() if half else v for k, v in OWN.items()}, strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trunk(x), truth(x), rtol=0, atol=0)


REFUSED: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
    "two encoders": ({"a": OWN, "b": OTHER}, None, ("holds 2 such encoders, under a, b", "--encoder.weights-part")),
    "a part that is not there": ({"a": OWN, "b": OTHER}, "c", ("under a, b, not under --encoder.weights-part c",)),
    "a layer less": ({k: v for k, v in OWN.items() if "layer4" not in k}, None, ("missing (layer4.0.conv1.weight",)),
    "a layer more": (
        {**OWN, "layer4.1.conv1.weight": torch.zeros(16, 16, 3, 3)},
        None,
        ("1 unexpected (layer4.1.conv1",),
    ),
    "another norm behind it": ({**OWN, "fc_norm.weight": torch.zeros(16)}, None, ("1 unexpected (fc_norm.weight)",)),
    "a head only": ({"fc.weight": HEAD}, None, ("no tensor of resnet18", "1 others (fc.weight)")),
    "another stem": ({**OWN, "conv1.weight": torch.zeros(64, 3, 3, 3)}, None, ("use --encoder.stem small",)),
    "gray": (
        {**OWN, "conv1.weight": torch.zeros(64, 1, 7, 7)},
        None,
        ("conv1.weight (64, 3, 7, 7), not (64, 1, 7, 7)",),
    ),
    "trained with group norm": ({k: v for k, v in OWN.items() if "running" not in k}, None, ("--batch-norm group",)),
    "integers": ({**OWN, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, None, ("is torch.int8",)),
    "complex": ({**OWN, "conv1.weight": torch.ones(64, 3, 7, 7) * 1j}, None, ("is torch.complex64",)),
    "sparse": ({**OWN, "conv1.weight": OWN["conv1.weight"].to_sparse()}, None, ("sparse",)),
    "no tensors": ({"epoch": 3, "lr": 0.1}, None, ("holds no weights", "a dict without tensors (it has epoch, lr)")),
    "a tensor": (torch.zeros(3), None, ("one tensor of shape (3,) without a name",)),
    "a numpy number beside": ({"state_dict": OWN, "best": np.float64(3)}, None, ("it holds a numpy", "was run")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_whole_encoder_is_refused_and_changes_nothing(kind: str, tmp_path: Path):
    content, part, words = REFUSED[kind]
    torch.save(content, tmp_path / "file.pt")
    trunk = resnet()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with pytest.raises(DataError) as error:
        weights.load(trunk, str(tmp_path / "file.pt"), "resnet18", part)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "file.pt") in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def write(kind: str, path: Path) -> None:
    """A file of this kind, which is named like weights."""
    match kind:
        case "lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n")
        case "html":
            path.write_text("\n<!DOCTYPE html><html>404</html>")
        case "json":
            path.write_text(json.dumps({"weight_map": {"conv1.weight": "model-00001.safetensors"}}))
        case "npz":
            with open(path, "wb") as file:
                np.savez(file, **{"conv1.weight": OWN["conv1.weight"].numpy()})
        case "npy":
            with open(path, "wb") as file:
                np.save(file, OWN["conv1.weight"].numpy())
        case "script":
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
        case "model":
            torch.save(nn.Linear(2, 2), path)
        case "cut":
            torch.save(OWN, path)
            path.write_bytes(path.read_bytes()[:9_000])
        case "hdf5":
            path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        case "gzip":
            path.write_bytes(b"\x1f\x8b" + bytes(100))
        case _:
            path.touch()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lfs", "a Git LFS pointer"),
        ("html", "a web page, not weights"),
        ("json", "JSON text, not weights"),
        ("npz", "an .npz archive of NumPy arrays"),
        ("npy", "a single NumPy array"),
        ("script", "a TorchScript archive"),
        ("model", "it holds a torch.nn.modules.linear.Linear object"),
        ("cut", "truncated or damaged"),
        ("hdf5", "an HDF5 file"),
        ("gzip", "a compressed archive"),
        ("empty", "is empty"),
    ],
)
def test_another_kind_of_file_is_named(kind: str, words: str, tmp_path: Path):
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        write(kind, path)
        with pytest.raises(DataError) as error:
            weights.load(resnet(), str(path), "resnet18")
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)  # sslx has no such flag


def test_a_pipe_and_a_device_are_waited_for_by_nobody(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(DataError, match=f"^{path} is not a regular file: "):
            weights.load(resnet(), str(path), "resnet18")


def test_a_safetensors_file_is_read_under_any_name(tmp_path: Path):
    save_file(OWN, tmp_path / "model.pt")
    trunk = resnet()
    weights.load(trunk, str(tmp_path / "model.pt"), "resnet18")
    assert all(torch.equal(value, OWN[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("source", ["https://example.org/a.pth", "hf-hub:timm/resnet18.a1_in1k", "no/such.pt"])
def test_what_is_no_file_says_what_is_taken(source: str):
    with pytest.raises(MissingInput) as error:
        weights.load(resnet(), source, "resnet18")
    assert source in str(error.value)
    assert "a run folder of sslx, or a .pt, .pth or .safetensors file" in str(error.value)


@pytest.mark.parametrize("name", ["swiftformer_xs", "levit_128s", "efficientvit_b0", "deit_tiny_distilled_patch16_224"])
def test_timm_models_take_their_own_files_with_one_head_or_two(name: str, tmp_path: Path):
    torch.manual_seed(0)
    theirs = timm.create_model(name)
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    trunk = build(Config(name=name, weights=str(tmp_path / "file.pt")), 224).trunk
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())


def test_group_norm_takes_weights_of_both_norms(tmp_path: Path):
    shape = Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
    said: list[str] = []
    for norm in ("batch", "group"):
        source = build(shape, 32, norm=norm)
        nn.init.uniform_(source.trunk.get_parameter("bn1.weight"))
        torch.save(source.trunk.state_dict(), tmp_path / "file.pt")
        other = build(
            Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16), weights=str(tmp_path / "file.pt")),
            32,
            norm="group",
            say=said.append,
        )
        mine, theirs = other.trunk.state_dict(), source.trunk.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert "left out: bn1.running_mean" in said[0]
    assert "left out" not in said[1]


@pytest.mark.parametrize(
    ("name", "options", "size", "fits"),
    [
        ("vit_tiny_patch16_224", {"layers": (1,)}, 40, "use 32 or 48 px"),
        ("vit_tiny_patch16_224", {"layers": (1,), "patch": 7}, 32, "use 28 or 35 px"),
        ("convnext_atto", {}, 46, "use 44 or 48 px"),
        ("mixer_s32_224", {}, 40, "use 32 or 64 px"),
    ],
)
def test_patches_that_leave_a_border_unseen_are_refused(name: str, options: dict[str, Any], size: int, fits: str):
    with pytest.raises(ConfigError) as error:
        build(Config(name=name, **options), size)
    assert fits in str(error.value)
    assert "\n" not in str(error.value)


def test_a_view_is_looked_at_up_to_its_border():
    encoder = build(Config(name="deit_tiny_patch16_224", layers=(1,), patch=8), 40).eval()
    x = torch.randn(1, 3, 40, 40)
    y = x.clone()
    y[..., 39] += 1
    assert not torch.equal(encoder(x), encoder(y))


@pytest.mark.slow
def test_a_run_goes_on_without_the_file_that_it_began_with(tmp_path: Path):
    every = ["--batch-norm", "group", "--checkpoint.every", "1"]
    assert outside(tmp_path, *every)[0] == 0
    shutil.copytree(tmp_path / "r", tmp_path / "first")
    shutil.rmtree(tmp_path / "r")
    begun = [*every, "--encoder.weights", tmp_path / "first"]
    code, out, err = outside(tmp_path, *begun)
    assert code == 0, err
    assert "tensors, under encoder.trunk" in out
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step_2")
    code, out, err = outside(tmp_path, *begun, "--resume", "auto")
    assert code == 0, err
    assert "resumed" in out
