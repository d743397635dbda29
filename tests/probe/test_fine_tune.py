"""Fine-tuning: the learning rate of each parameter, equal results on 2 ranks, what it learns, and what it refuses."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from conftest import RunOnRanks
from kit import tiny
from kit.sources import in_memory
from sslx import data, distributed, encoders, optim, rng
from sslx.data.sources import Split, digits
from sslx.data.sources.base import Context, Source
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.distributed import Ranks
from sslx.encoders import Encoder
from sslx.errors import DataError, NonFiniteError
from sslx.probe import Config, fine_tune
from sslx.probe.low_shot import labeled_rows

READING = data.Config(backend="resident", threads=0)


def encoder(kind: str, seed: int = 0) -> Encoder:
    rng.seed_torch(seed)
    return encoders.build(tiny.ENCODERS[kind], tiny.SIZE)


def task(train: Source, test: Source, ranks: Ranks) -> fine_tune.Task:
    view = ViewSpec(size=tiny.SIZE, augment=Augment(min_scale=0.5, flip=0.0, jitter=1.0, blur=1.0))
    return fine_tune.Task(
        train=train, test=test, view=eval_view(tiny.SIZE), augmented=view, reading=READING, ranks=ranks
    )


def layer(name: str, depth: int) -> int:
    """The layer of a ViT's parameter by MAE's rule, read from the name."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed") else depth + 1


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_each_parameter_has_its_papers_learning_rate_and_decay(kind: str):
    classifier = fine_tune.Classifier(encoder(kind), 3)
    recipe = fine_tune.recipe_of(classifier.encoder, Config())
    config = recipe.optim(0.3)
    optimizer = optim.of_groups(config, fine_tune.groups(classifier, recipe))
    optim.Schedule.of(config, 64).apply(optimizer, 0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(classifier.parameters()))
    for name, parameter in classifier.named_parameters():
        lr, decay = found[id(parameter)]
        in_trunk = name.removeprefix("encoder.trunk.")
        if kind == "resnet":
            expected = 0.3 / 4 * (20 if name.startswith("head") else 1)
        else:
            expected = 0.3 / 2 * (0.75 ** (3 - layer(in_trunk, 2)) if in_trunk != name else 1)
        assert lr == pytest.approx(expected, rel=1e-12), name
        assert decay == (0.05 if kind == "vit" and parameter.ndim > 1 else 0), name


@pytest.mark.parametrize(
    ("num_labels", "batch_size", "steps"), [(4, 4, 200), (14, 8, 200), (144, 32, 200), (5000, 256, 30 * 19)]
)
def test_a_step_is_the_same_on_1_2_and_4_ranks(num_labels: int, batch_size: int, steps: int):
    recipe = fine_tune.recipe_of(encoder("resnet"), Config())
    assert [recipe.fitted(num_labels, ranks) for ranks in (1, 2, 4)] == [(batch_size, steps)] * 3
    assert recipe.fitted(num_labels, 3)[0] % 3 == 0
    with pytest.raises(DataError, match=f"each of 512 ranks to fine-tune on, got {num_labels}: use fewer ranks"):
        recipe.fitted(num_labels, 512)


def weights_after_training(kind: str, pixels: npt.NDArray[np.uint8], label: npt.NDArray[np.int64]) -> Any:
    """The state of a classifier in fp64, trained for a few steps of 16 on the images of all but one sample."""
    source, model = in_memory(pixels, label, size=tiny.SIZE), encoder(kind).double()
    recipe = replace(fine_tune.recipe_of(model, Config()), min_steps=5, num_epochs=1, batch_size=16)
    rows = np.arange(1, len(pixels))
    trained = fine_tune.train(model, task(source, source, distributed.init("cpu")), rows, 0.3, recipe, seed=7)
    return dict(trained.state_dict())


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_two_ranks_train_as_one_does_with_synchronized_batch_norm(ranks: RunOnRanks, kind: str):
    generator = np.random.default_rng()
    pixels = generator.integers(0, 256, (66, 16, 16, 3), dtype=np.uint8)
    label = np.arange(66) % 3
    alone: dict[str, Tensor] = weights_after_training(kind, pixels, label)
    start = fine_tune.Classifier(encoder(kind).double(), 3).state_dict()
    assert not any(torch.equal(alone[name], start[name]) for name in ("head.weight", "head.bias"))
    for state in ranks(2, weights_after_training, kind, pixels, label):
        assert state.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def zeros_and_ones(split: Split) -> Source:
    source = digits.Config().build(split, Context())
    assert source.facts.labels is not None
    return source.take(np.flatnonzero(source.facts.labels < 2))


def test_it_learns_digits_and_held_out_images_choose_the_learning_rate():
    """With the digits 0 and 1, which a tiny encoder learns from nothing in a few steps."""
    train, test = (zeros_and_ones(split) for split in ("train", "test"))
    model = encoder("resnet")
    recipe = replace(fine_tune.recipe_of(model, Config()), num_epochs=1, min_steps=30, batch_size=16, lrs=(1e30, 1.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of = task(train, test, Ranks(device=torch.device("cpu")))
    score = fine_tune.accuracy(model, of, 0.5, recipe, num_draws=2, seed=3)
    assert score.mean > 0.8, "chance is 0.5"
    assert train.facts.labels is not None
    num_labels = len(labeled_rows(torch.from_numpy(train.facts.labels), 0.5, 0, 3))
    assert (score.lr, score.num_labels, score.num_draws, score.batch_size) == (1.0, num_labels, 2, 16)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(NonFiniteError, match=r"^fine-tuning diverged at learning rate 1e\+30: [^\n]*fine-tune-lrs"):
        fine_tune.accuracy(model, of, 0.01, replace(recipe, lrs=(1e30,), default_lr=1e30, min_steps=5), num_draws=1)


def test_the_recipe_is_said_with_its_settings():
    settings = Config(fine_tune_lrs=(0.3, 0.1, 0.2), fine_tune_epochs=7, fine_tune_batch_size=64)
    recipe = fine_tune.recipe_of(encoder("vit"), settings)
    assert recipe.default_lr == 0.2
    for words in ("AdamW as in MAE", "7 epochs", "batch 64", "0.3, 0.1 or 0.2", "layer decay 0.75", "decay 0.05"):
        assert words in recipe.words()
    assert re.search("SGD as in SimCLR.*20 times", fine_tune.recipe_of(encoder("resnet"), Config()).words())
