"""Weights of others: every layout whole or refused in words that say what the file is; a resume needs no file."""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.errors import raises_one_line
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
QUERY = under("module.encoder_q.", OWN)
SWAV = {**OWN, "projection_head.0.weight": HEAD, "prototypes.weight": HEAD}
BARLOW = under("module.backbone.", OWN) | {"module.projector.0.weight": HEAD}
VISSL = {"base_model": {"model": {"trunk": under("_feature_blocks.", OWN)}}}
LAYOUTS: dict[str, tuple[Any, str]] = {  # the content of a file, and words of what is said of it
    "plain": (OWN, "78 of 78 tensors"),
    "an encoder of sslx": (under("trunk.", OWN), "under trunk"),
    "with a classifier": (WHOLE, "left out: fc.weight, fc.bias"),
    "DataParallel": ({"state_dict": under("module.", WHOLE), "epoch": 90}, "under state_dict.module;"),
    "compiled": (under("_orig_mod.", WHOLE), "left out: fc.weight"),
    "compiled within": ({f"model._orig_mod.{k}": v for k, v in OWN.items()}, "under model"),
    "no counters": ({k: v for k, v in OWN.items() if not k.endswith("num_batches_tracked")}, "78 of 78"),
    "half, with its counters": ({k: v.half() for k, v in OWN.items()}, "78 of 78"),
    "settings": ({"model": OWN, "args": argparse.Namespace(lr=1e-3, out=Path("x")), "epoch": 3}, "under model"),
    "an int beside": ({**OWN, "epoch": 3}, "78 of 78"),
    "tutorial": ({"model_state_dict": OWN, "optimizer_state_dict": {"state": {}}}, "under model_state_dict"),
    "MoCo v2": ({"state_dict": QUERY | {"module.encoder_q.fc.0.weight": HEAD}}, "left out: fc.0"),
    "MoCo v2, both": ({"state_dict": QUERY | under("module.encoder_k.", OTHER)}, "under state_dict.module.encoder_q"),
    "SwAV": (under("module.", SWAV), "prototypes"),
    "Barlow Twins": ({"model": BARLOW}, "1 elsewhere"),
    "DINO": ({"student": under("module.backbone.", OTHER), "teacher": under("backbone.", OWN)}, "teacher.b"),
    "VISSL": ({"classy_state_dict": VISSL}, "trunk"),
    "a checkpoint of sslx elsewhere": (
        {"method": under("encoder.trunk.", OWN) | under("teacher.0.trunk.", OTHER)},
        "under method.encoder.trunk",
    ),
    "twice the same": ({"ema": OWN, "model": OWN}, "78 of 78"),
}
PARTS = {"MoCo v2, both": "encoder_q", "DINO": "teacher", "a part that is not there": "c"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_is_found_whole_and_accounted_for(layout: str, tmp_path: Path):
    content, words = LAYOUTS[layout]
    torch.save(content, tmp_path / "file.pt")
    trunk = resnet().eval()
    line = weights.load(trunk, str(tmp_path / "file.pt"), "resnet18", PARTS.get(layout))
    assert words in line, line
    assert "\n" not in line
    truth = resnet(3).eval()
    half = layout.startswith("half")
    truth.load_state_dict({k: v.half() if half else v for k, v in OWN.items()}, strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(trunk(x), truth(x), rtol=0, atol=0)


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "two encoders": ({"a": OWN, "b": OTHER}, ("holds 2 such encoders, under a, b", "--encoder.weights-part")),
    "a part that is not there": ({"a": OWN, "b": OTHER}, ("under a, b, not under --encoder.weights-part c",)),
    "a layer less": ({k: v for k, v in OWN.items() if "layer4" not in k}, ("missing (layer4.0.conv1.weight",)),
    "a layer more": ({**OWN, "layer4.1.conv1.weight": torch.zeros(16, 16, 3, 3)}, ("1 unexpected (layer4.1.conv1",)),
    "another norm behind it": ({**OWN, "fc_norm.weight": torch.zeros(16)}, ("1 unexpected (fc_norm.weight)",)),
    "a head only": ({"fc.weight": HEAD}, ("no tensor of resnet18", "1 others (fc.weight)")),
    "another stem": ({**OWN, "conv1.weight": torch.zeros(64, 3, 3, 3)}, ("use --encoder.stem small",)),
    "another width": (state_of(0, channels=[8, 8, 8, 24]), ("does not fit", "of another shape", "resnet18")),
    "gray": ({**OWN, "conv1.weight": torch.zeros(64, 1, 7, 7)}, ("conv1.weight (64, 3, 7, 7), not (64, 1, 7, 7)",)),
    "trained with group norm": ({k: v for k, v in OWN.items() if "running" not in k}, ("--batch-norm group",)),
    "integers": ({**OWN, "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}, ("is torch.int8",)),
    "complex": ({**OWN, "conv1.weight": torch.ones(64, 3, 7, 7) * 1j}, ("is torch.complex64",)),
    "sparse": ({**OWN, "conv1.weight": OWN["conv1.weight"].to_sparse()}, ("sparse",)),
    "no tensors": ({"epoch": 3, "lr": 0.1}, ("holds no weights", "a dict without tensors (it has epoch, lr)")),
    "a tensor": (torch.zeros(3), ("holds no weights", "one tensor of shape (3,) without a name")),
    "a numpy number beside": ({"state_dict": OWN, "best": np.float64(3)}, ("it holds a numpy", "was run")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_whole_encoder_is_refused_and_changes_nothing(kind: str, tmp_path: Path):
    content, words = REFUSED[kind]
    path = str(tmp_path / "file.pt")
    torch.save(content, path)
    trunk = resnet()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with raises_one_line(DataError, path, *words):
        weights.load(trunk, path, "resnet18", PARTS.get(kind))
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


def cut(file: BinaryIO) -> None:
    torch.save(OWN, file)
    file.truncate(9_000)


FILES: dict[str, tuple[bytes | Callable[[BinaryIO], object], str]] = {  # which are all named like weights
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n", "a Git LFS pointer"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "a web page, not weights"),
    "json": (b'{"weight_map": {"conv1.weight": "model-00001.safetensors"}}', "JSON text, not weights"),
    "npz": (lambda file: np.savez(file, weight=HEAD.numpy()), "an .npz archive of NumPy arrays"),
    "npy": (lambda file: np.save(file, HEAD.numpy()), "a single NumPy array"),
    "script": (lambda file: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file), "a TorchScript archive"),
    "model": (lambda file: torch.save(nn.Linear(2, 2), file), "it holds a torch.nn.modules.linear.Linear object"),
    "cut": (cut, "truncated or damaged"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "gzip": (b"\x1f\x8b" + bytes(100), "a compressed archive"),
    "empty": (b"", "is empty"),
    "text": ("Gewichte: später\n".encode(), "a text file, not weights"),
    "noise": (bytes(range(256)) * 4, "neither a torch nor a safetensors file"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", FILES)
def test_another_kind_of_file_is_named(kind: str, tmp_path: Path):
    content, words = FILES[kind]
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        with path.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
        with raises_one_line(DataError, words) as error:
            weights.load(resnet(), str(path), "resnet18")
        assert "weights_only" not in str(error.value)  # sslx has no such flag


def test_a_pipe_and_a_device_are_waited_for_by_nobody(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(DataError, match=f"^{path} is not a regular file: "):
            weights.load(resnet(), str(path), "resnet18")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_safetensors_file_is_read_under_any_name(name: str, tmp_path: Path):
    save_file(OWN, tmp_path / name)
    trunk = resnet()
    weights.load(trunk, str(tmp_path / name), "resnet18")
    assert all(torch.equal(value, OWN[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/a.pth", "is not a file"),
        ("hf-hub:timm/resnet18.a1_in1k", "is not a file"),
        ("no/such.pt", "does not exist"),
    ],
)
def test_what_is_no_file_says_what_is_taken(source: str, words: str):
    with raises_one_line(
        MissingInput, source, words, "'timm'", "a run folder of sslx, or a .pt, .pth or .safetensors file"
    ):
        weights.load(resnet(), source, "resnet18")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path):
    with raises_one_line(MissingInput, f"no checkpoint at {tmp_path}"):
        weights.load(resnet(), str(tmp_path), "resnet18")


@pytest.mark.parametrize("name", ["swiftformer_xs", "levit_128s", "efficientvit_b0", "deit_tiny_distilled_patch16_224"])
def test_timm_models_take_their_own_files_with_one_head_or_two(name: str, tmp_path: Path):
    torch.manual_seed(0)
    theirs = timm.create_model(name)
    torch.save(theirs.state_dict(), tmp_path / "file.pt")
    trunk = build(Config(name=name, weights=str(tmp_path / "file.pt")), 224).trunk
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())


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
    with raises_one_line(ConfigError, fits):
        build(Config(name=name, **options), size)


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
