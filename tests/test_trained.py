"""A checkpoint as an object: its encoder is built from the recipe in it, and the caller's random numbers stay."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

import sslx
from kit.checkpoints import equal
from sslx import cli, data, rng
from sslx.console import progress
from sslx.data import sources
from sslx.data.sources import folder
from sslx.distributed import Ranks
from sslx.encoders import Recipe
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.probe import features, images
from sslx.runs import checkpoint
from sslx.trained import Trained, load

RUN = (
    "simclr_digits --steps 1 --batch-size 32 --data.size 16 --online.every 0 --optim.lr 0.1 "
    "--encoder.channels 8 8 8 16 --name run"
).split()
only_local = pytest.mark.parametrize("run", ["local"], indirect=True)


@pytest.fixture(scope="module", params=["local", "sync", "group"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    average = ["--average.momentum", "0.9"] if request.param == "local" else []
    assert cli.main(["pretrain", *RUN, "--batch-norm", request.param, "--runs", str(folder), *average]) == 0
    return folder / "run"


def changed(run: Path, folder: Path, **changes: Any) -> Path:
    """The run's checkpoint with other things in its state (None: without them)."""
    state = {name: value for name, value in (checkpoint.load(run) | changes).items() if value is not None}
    return checkpoint.save(folder, 1, state, keep=1)


def global_states() -> list[Any]:
    name, keys, *others = np.random.get_state()
    return [torch.get_rng_state().tolist(), name, keys.tolist(), others, random.getstate()]


def test_what_is_built_leaves_the_callers_random_numbers_alone(run: Path) -> None:
    trained = load(run)
    _ = trained.settings  # tyro draws random numbers while pytest runs, and only then
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    torch.rand(3), np.random.rand(3), random.random()
    before = global_states()
    first = trained.untrained_encoder()
    for build in (lambda: trained.encoder, trained.method, trained.untrained_encoder):
        build()
        assert global_states() == before
    torch.manual_seed(8)
    assert equal(first.state_dict(), trained.untrained_encoder().state_dict())


def test_a_checkpoint_without_a_recipe_gives_the_same_encoder(run: Path, tmp_path: Path) -> None:
    """Those of sslx 0.1, whose config says what the encoder is."""
    new, old = load(run), load(changed(run, tmp_path, encoder_recipe=None))
    assert new.recipe is not None
    assert old.recipe is None
    assert list(new.encoder.state_dict()) == list(old.encoder.state_dict())
    for build in (lambda run: run.encoder, Trained.untrained_encoder, Trained.method):
        assert equal(build(new).state_dict(), build(old).state_dict())


def test_the_recipe_counts_and_not_what_the_config_says(run: Path) -> None:
    """The export of a run whose options were renamed, or whose defaults are others now."""
    trained = load(run)
    tree = json.loads(trained.config_text)
    tree["encoder"] = {"renamed": True}
    renamed = dataclasses.replace(trained, config_text=json.dumps(tree))
    assert renamed.encoder.dim == 16
    with pytest.raises(ConfigError, match="not of this version"):
        _ = renamed.settings


def test_norms_over_all_ranks_become_plain_ones(run: Path) -> None:
    trained = load(run)
    batch_norm = trained.settings.batch_norm
    assert trained.recipe is not None
    assert trained.recipe.norm == {"local": "batch"}.get(batch_norm, batch_norm)
    for module in (trained.encoder, trained.method()):
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        assert bool(layers) == (batch_norm != "group")
        assert not any(isinstance(layer, SyncBatchNorm) for layer in layers)


RECIPE = {"name": "resnet18", "size": 16, "arguments": {}, "channels": 3}


@only_local
@pytest.mark.parametrize(
    "recipe",
    [
        *([], {}, {"name": "resnet18"}, RECIPE | {"channels": 0}, RECIPE | {"size": "16"}, RECIPE | {"arguments": []}),
        *(RECIPE | {"depth": 3}, RECIPE | {"stem": "x"}, RECIPE | {"arguments": {"checkpoint_path": "x.pt"}}),
    ],
)
def test_a_recipe_that_sslx_did_not_write_is_one_line(run: Path, tmp_path: Path, recipe: Any) -> None:
    path = changed(run, tmp_path, encoder_recipe=recipe)
    with pytest.raises(DataError, match=r"^checkpoint [^\n]* was not written by sslx: [^\n]*'encoder_recipe'[^\n]*$"):
        load(path)


def test_the_recipe_in_a_checkpoint_is_that_of_the_run(run: Path) -> None:
    saved = checkpoint.load(run)["encoder_recipe"]
    shape = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}
    recipe = Recipe(**saved)
    assert recipe == dataclasses.replace(recipe, name="resnet18", size=16, arguments=shape, stem="small", channels=3)


IN_A_PROCESS_OF_ITS_OWN = """
import random, sys
import numpy as np
import sslx

trained = sslx.load(sys.argv[1])
random_state = random.getstate()
vectors = trained.embed([np.full((9, 7, 3), 7 * i, dtype=np.uint8) for i in range(3)], batch_size=2)
assert vectors.shape == (3, trained.dim) == (3, 16), vectors.shape
assert random.getstate() == random_state
heavy = {"tyro", "rich", "submitit", "matplotlib", "nvidia", "sklearn", "sslx.config", "sslx.methods"}
print(*sorted(heavy & set(sys.modules)))
"""


@only_local
@pytest.mark.slow
def test_features_need_neither_the_command_line_nor_the_other_files(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("method.pt", "optimizer.pt", "loader.pt"):
        os.unlink(tmp_path / "run" / "checkpoints" / "step_1" / name)
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, tmp_path / "run" / "checkpoints" / "step_1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    pixels = rng.words(3, "pixels", np.arange(5), num=40 * 30 * 3).astype(np.uint8).reshape(5, 40, 30, 3)
    paths = [str(folder / name) for name in ("a.png", "b.jpg", "c.webp", "d.png", "e.jpg")]
    for i, path in enumerate(paths):
        image = Image.fromarray(pixels[i][: 40 - 3 * i, : 30 - 2 * i])
        (image.convert("L") if i == 3 else image).save(path)
    return paths


class Numbered(Dataset[Any]):
    """Items (picture, number), which end by no IndexError."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.paths[index % len(self.paths)]), index


@only_local
def test_features_are_those_that_probes_see(run: Path, paths: list[str]) -> None:
    """From paths, from PIL images, from arrays and by a loader of one's own."""
    trained = load(run)
    source = sources.build(folder.Config(root=Path(paths[0]).parent), "pretrain")
    settings = data.Config(backend="torchvision", threads=0)
    ranks = Ranks(device=torch.device("cpu"))
    expected = features.extract(
        trained.encoder, images.loader(settings, source, trained.view, 2, ranks, torch.float32), num_samples=5
    ).x
    pictures = [Image.open(path) for path in paths]
    batch = torch.stack([trained.transform(path) for path in paths])
    for vectors in (
        trained.embed(paths, batch_size=2),
        trained.embed(pictures, batch_size=2),
        trained.embed(np.array(picture.convert("RGB")) for picture in pictures),
        trained.embed(Path(paths[0]).parent, batch_size=4),
        trained.embed(source, batch_size=4, threads=1),
        trained.embed(Numbered(paths)),
        torch.from_numpy(trained.embed(paths, as_numpy=True, device="cpu", precision="fp32")),
        torch.cat([trained.embed(path) for path in paths]),
        trained.encoder(batch).detach(),
    ):
        torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-6)
    assert pickle.loads(pickle.dumps(trained.transform)) == trained.transform
    assert trained.embed([]).shape == (0, trained.dim)
    assert sslx.image_paths(Path(paths[0]).parent) == paths
    with pytest.raises(MissingInput, match="is not a folder"):
        sslx.image_paths(paths[0])


@only_local
def test_many_threads_embed_at_once_and_draw_what_they_would_alone(run: Path, paths: list[str]) -> None:
    """Each of them with an encoder that it builds, while the main thread draws random numbers."""
    expected = load(run).embed(paths)
    torch.manual_seed(9)
    alone = [torch.rand(3) for _ in range(2_000)]
    torch.manual_seed(9)
    with ThreadPoolExecutor(3) as threads:
        vectors = [threads.submit(lambda: load(run).embed(paths, batch_size=2, threads=2)) for _ in range(6)]
        drawn = [torch.rand(3) for _ in range(1_000)]
        while not all(future.done() for future in vectors):
            time.sleep(0.001)
        drawn += [torch.rand(3) for _ in range(1_000)]
    assert all(map(torch.equal, drawn, alone))
    for future in vectors:
        torch.testing.assert_close(future.result(), expected, rtol=1e-5, atol=1e-6)


@only_local
def test_progress_is_told_to_a_function_and_shown_after_two_seconds(
    run: Path, paths: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, told = load(run), list[tuple[int, int | None]]()
    trained.embed(paths, batch_size=2, progress=lambda *counts: told.append(counts))
    trained.embed((path for path in paths), batch_size=4, progress=lambda *counts: told.append(counts))
    assert told == [(2, 5), (4, 5), (5, 5), (4, None), (5, None)]
    trained.embed(paths, progress=True)
    assert capfd.readouterr() == ("", ""), "it took no two seconds"
    monkeypatch.setattr(progress, "AFTER_S", 0.0)
    for choice in (None, False):  # not a terminal, as in a notebook
        trained.embed(paths, progress=choice)
    assert capfd.readouterr() == ("", "")
    trained.embed(paths, progress=True)
    assert re.fullmatch(r"images: 5 of 5, [\d,]+ per second\n", capfd.readouterr().err)


@only_local
def test_the_encoder_keeps_its_mode_and_computes_in_the_chosen_precision(run: Path, paths: list[str]) -> None:
    trained = load(run)
    expected = trained.embed(paths)
    trained.encoder.train()
    assert torch.equal(trained.embed(paths), expected)
    assert all(module.training for module in trained.encoder.modules())
    half = trained.embed(paths, precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 0.1 * expected.abs().max()


@only_local
def test_what_is_not_an_image_is_told_in_one_line(run: Path, tmp_path: Path) -> None:
    trained = load(run)
    (tmp_path / "x.jpg").write_text("text")
    with pytest.raises(DataError, match=r"^[^\n]*x\.jpg cannot be read: [^\n]*$"):
        trained.embed([tmp_path / "x.jpg"])
    with pytest.raises(ValueError, match=r"expected an \(H, W, 3\) array of uint8, got \(4, 4\) of float64"):
        trained.embed([np.zeros((4, 4))])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="needs a ViT"):
        trained.embed([np.zeros((4, 4, 3), dtype=np.uint8)], tokens=True)


def test_the_average_of_the_encoder_takes_its_place(run: Path) -> None:
    trained = load(run)
    if trained.settings.average.momentum is None:
        with pytest.raises(ConfigError, match=r"no average of its encoder: [^\n]*--average.momentum"):
            trained.averaged()
        return
    average, own = trained.averaged(), trained.encoder.state_dict()
    first = trained.untrained_encoder().state_dict()
    for name, tensor in average.encoder.state_dict().items():  # after one step, of which a tenth is kept
        expected = 0.1 * first[name] + 0.9 * own[name] if tensor.is_floating_point() else own[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert not equal(average.encoder.state_dict(), own)
    assert average.exported == "encoder_average.encoder"
