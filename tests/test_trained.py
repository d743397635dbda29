"""A checkpoint as an object: its encoder is built from the recipe in it, and the caller's random numbers stay."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from sslx import cli
from sslx.encoders import Recipe
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.errors import DataError
from sslx.runs import checkpoint
from sslx.trained import Trained, load

CPU = torch.device("cpu")
RUN = [
    "simclr_digits", "--steps", "1", "--batch-size", "32", "--data.size", "16", "--online.every", "0",
    "--optim.lr", "0.1", "--encoder.channels", "8", "8", "8", "16", "--name", "run",
]  # fmt: skip


@pytest.fixture(scope="module", params=["local", "sync", "group"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["pretrain", *RUN, "--batch-norm", request.param, "--runs", str(folder)]) == 0
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
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    torch.rand(3), np.random.rand(3), random.random()
    before = global_states()
    first = trained.encoder(trained=False, device=CPU)
    for build in (
        lambda: trained.encoder(trained=True, device=CPU),
        lambda: trained.method(CPU),
        lambda: trained.encoder(trained=False, device=CPU),
    ):
        build()
        assert global_states() == before
    torch.manual_seed(8)
    again = trained.encoder(trained=False, device=CPU)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_without_a_recipe_gives_the_same_encoder(run: Path, tmp_path: Path) -> None:
    """Those of sslx 0.1, whose config says what the encoder is."""
    new, old = load(run), load(changed(run, tmp_path, encoder_recipe=None))
    assert new.recipe is not None
    assert old.recipe is None
    for trained in (True, False):
        a, b = (each.encoder(trained=trained, device=CPU).state_dict() for each in (new, old))
        assert list(a) == list(b)
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    a, b = (each.method(CPU).state_dict() for each in (new, old))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_recipe_counts_and_not_what_the_config_says(run: Path) -> None:
    """The export of a run whose options were renamed, or whose defaults are others now."""
    trained = load(run)
    other = dataclasses.replace(trained.settings.encoder, channels=(8, 8, 8, 24))
    renamed = Trained(**{**vars(trained), "settings": dataclasses.replace(trained.settings, encoder=other)})
    assert renamed.encoder(trained=True, device=CPU).dim == 16


def test_norms_over_all_ranks_become_plain_ones(run: Path) -> None:
    trained = load(run)
    batch_norm = trained.settings.batch_norm
    assert trained.recipe is not None
    assert trained.recipe.norm == {"local": "batch"}.get(batch_norm, batch_norm)
    for module in (trained.encoder(trained=True, device=CPU), trained.method(CPU)):
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        assert bool(layers) == (batch_norm != "group")
        assert not any(isinstance(layer, SyncBatchNorm) for layer in layers)


@pytest.mark.parametrize("run", ["local"], indirect=True)
@pytest.mark.parametrize(
    "recipe",
    [
        [],
        {},
        {"name": "resnet18"},
        {"name": "resnet18", "size": 16, "arguments": {}, "channels": 0},
        {"name": "resnet18", "size": "16", "arguments": {}, "channels": 3},
        {"name": "resnet18", "size": 16, "arguments": [], "channels": 3},
        {"name": "resnet18", "size": 16, "arguments": {}, "channels": 3, "depth": 3},
        {"name": "resnet18", "size": 16, "arguments": {}, "channels": 3, "stem": "x"},
        {"name": "resnet18", "size": 16, "arguments": {"checkpoint_path": "x.pt"}, "channels": 3},
    ],
)
def test_a_recipe_that_sslx_did_not_write_is_one_line(run: Path, tmp_path: Path, recipe: Any) -> None:
    path = changed(run, tmp_path, encoder_recipe=recipe)
    with pytest.raises(
        DataError, match=r"^checkpoint [^\n]* is not one that sslx wrote: [^\n]*'encoder_recipe'[^\n]*$"
    ):
        load(path)


def test_the_recipe_in_a_checkpoint_is_that_of_the_run(run: Path) -> None:
    saved = checkpoint.load(run)["encoder_recipe"]
    shape = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16]}
    recipe = Recipe(**saved)
    assert recipe == dataclasses.replace(recipe, name="resnet18", size=16, arguments=shape, stem="small", channels=3)
