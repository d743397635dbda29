"""Files and folders of weights: shards, save_pretrained, DCP, and damage or code in them, which is never run."""

import pickle
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from kit.errors import raises_one_line
from kit.full_batch import RunOnRanks
from kit.random_models import randomized
from sslx.encoders import weights
from sslx.encoders.weights import identify
from sslx.errors import DataError

SHAPE: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "num_classes": 0}


def resnet() -> nn.Module:
    return timm.create_model("resnet18", **SHAPE)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def theirs(generator: torch.Generator) -> nn.Module:
    return randomized(resnet(), generator)


@pytest.fixture
def shards(tmp_path: Path, generator: torch.Generator) -> tuple[Path, dict[str, Tensor]]:
    """A ResNet of transformers, saved in several files, and its tensors."""
    models, configs = (
        import_module(f"transformers.models.resnet.{kind}_resnet") for kind in ("modeling", "configuration")
    )
    config = configs.ResNetConfig(
        embedding_size=64, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    model = randomized(models.ResNetModel(config), generator)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards", model.state_dict()


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards_are_read_by_their_folder_or_their_index(name: str, shards: tuple[Path, dict[str, Tensor]]):
    folder, state = shards
    assert len(list(folder.glob("*.safetensors"))) > 1
    trunk = resnet()
    line = weights.load(trunk, str(folder / name), "resnet18")
    assert "renamed from the layout huggingface_resnet" in line
    own = trunk.state_dict()
    assert torch.equal(own["conv1.weight"], state["embedder.embedder.convolution.weight"])
    last = [value for key, value in state.items() if key.endswith("1.normalization.running_var")][-1]
    assert torch.equal(own["layer4.0.bn2.running_var"], last)


def test_an_index_is_followed_only_to_files_beside_it(shards: tuple[Path, dict[str, Tensor]], tmp_path: Path):
    folder, _ = shards
    index = folder / "model.safetensors.index.json"
    text, first = index.read_text(), min(path.name for path in folder.glob("*.safetensors"))
    (folder / first).rename(tmp_path / first)
    with raises_one_line(DataError, f"names the file {first}, which is not beside it"):
        weights.load(resnet(), str(folder), "resnet18")
    index.write_text(text.replace(first, f"../{first}"))
    with raises_one_line(DataError, f"names the file ../{first}, which is not beside it"):
        weights.load(resnet(), str(index), "resnet18")
    for damage in ("[]", '{"weight_map": 3}', '{"weight', ""):
        index.write_text(damage)
        with raises_one_line(DataError, "is not the index of a sharded file"):
            weights.load(resnet(), str(index), "resnet18")


def saved_by_dcp(theirs: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it saves from one process
        dcp.save({"model": theirs.state_dict(), "epoch": 3, "optimizer": {"lr": torch.ones(3)}}, checkpoint_id=folder)
    return folder


def test_a_distributed_checkpoint_is_read_without_its_code(theirs: nn.Module, tmp_path: Path):
    trunk = resnet()
    line = weights.load(trunk, str(saved_by_dcp(theirs, tmp_path / "dcp")), "resnet18")
    assert "78 of 78 tensors, under model" in line
    assert "left out" not in line
    assert equal(trunk.state_dict(), theirs.state_dict())


def save_sharded(folder: str, state: dict[str, Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    parts = {name: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for name, x in state.items()}
    dcp.save({"model": parts}, checkpoint_id=folder)


@pytest.mark.slow
def test_parts_that_several_ranks_wrote_are_put_together(ranks: RunOnRanks, theirs: nn.Module, tmp_path: Path):
    ranks(2, save_sharded, str(tmp_path / "dcp"), theirs.state_dict())
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    trunk = resnet()
    weights.load(trunk, str(tmp_path / "dcp"), "resnet18")
    assert equal(trunk.state_dict(), theirs.state_dict())
    next((tmp_path / "dcp").glob("__1*.distcp")).unlink()
    with raises_one_line(DataError, "cannot load the distributed checkpoint", "No such file"):
        weights.load(trunk, str(tmp_path / "dcp"), "resnet18")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["code", "cut", "noise", "another offset", "data"])
def test_a_damaged_distributed_checkpoint_is_one_line_and_runs_nothing(
    kind: str, theirs: nn.Module, tmp_path: Path, generator: torch.Generator
):
    folder = saved_by_dcp(theirs, tmp_path / "dcp")
    metadata, (data,) = folder / ".metadata", folder.glob("*.distcp")
    content = metadata.read_bytes()
    changed = {
        "code": pickle.dumps({"state_dict_metadata": Evil(tmp_path / "trace")}),
        "cut": content[: len(content) // 2],
        "noise": torch.randint(256, (500,), generator=generator, dtype=torch.uint8).numpy().tobytes(),
        "another offset": re.sub(rb"__0_0\.distcp", b"../00.distcp", content),
    }
    metadata.write_bytes(changed.get(kind, content))
    if kind == "data":
        data.write_bytes(bytes(data.stat().st_size))
    trunk = resnet()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with raises_one_line(DataError, "cannot load the distributed checkpoint", str(folder)) as error:
        weights.load(trunk, str(folder), "resnet18")
    assert kind != "code" or "none of it was run" in str(error.value)
    assert not (tmp_path / "trace").exists()
    assert equal(before, trunk.state_dict())


def test_what_only_the_config_beside_a_file_tells_is_checked(tmp_path: Path):
    models, configs = (import_module(f"transformers.models.vit.{kind}_vit") for kind in ("modeling", "configuration"))
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 256, "image_size": 32, "patch_size": 8}
    models.ViTModel(configs.ViTConfig(num_attention_heads=4, **shape)).save_pretrained(tmp_path)
    options = {"depth": 1, "embed_dim": 64, "patch_size": 8, "img_size": 32, "num_classes": 0}
    with raises_one_line(DataError, "its config.json has 4 heads, and the encoder 1"):
        weights.load(timm.create_model("vit_base_patch16_224", num_heads=1, **options), str(tmp_path), "vit")
    line = weights.load(timm.create_model("vit_base_patch16_224", num_heads=4, **options), str(tmp_path), "vit")
    assert line.endswith("an epsilon of 1e-12, and the encoder 1e-06")
    assert identify.recipe(str(tmp_path)).arguments["num_heads"] == 4


def test_settings_of_lightning_and_hydra_beside_the_weights_are_passed_over(theirs: nn.Module, tmp_path: Path):
    omegaconf = import_module("omegaconf")
    cfg = omegaconf.OmegaConf.create({"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "name": "byol"})
    content = {
        "state_dict": {f"backbone.{name}": value for name, value in theirs.state_dict().items()},
        "hyper_parameters": import_module("lightning_fabric.utilities.data").AttributeDict(lr=0.1, cfg=cfg),
    }
    torch.save(content, tmp_path / "last.ckpt")
    trunk = resnet()
    assert "under state_dict.backbone" in weights.load(trunk, str(tmp_path / "last.ckpt"), "resnet18")
    assert equal(trunk.state_dict(), theirs.state_dict())
