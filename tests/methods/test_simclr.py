"""SimCLR: its views, its projector, its loss against the kernels' definition, its metrics."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sslx import encoders, methods, rng
from sslx.data.batch import Batch
from sslx.data.views import Augment, eval_view
from sslx.errors import ConfigError
from sslx.methods import base, simclr
from sslx_kernels.nt_xent.reference import nt_xent as reference

SIZE = 16
HERE = torch.device("cpu")


def make(seed: int = 0, **options: float) -> simclr.Method:
    rng.seed_torch(seed)
    trunk = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
    config = simclr.Config(**{"hidden_dim": 24, "projection_dim": 12, **options})
    return simclr.Method(config, encoders.build(trunk, SIZE))


def batch(generator: torch.Generator, size: int = 8) -> Batch:
    views = tuple(torch.randn(size, 3, SIZE, SIZE, generator=generator) for _ in range(2))
    return Batch(views, None, torch.arange(size))


def test_it_is_found_by_its_file_name_and_refused_by_another():
    assert "simclr" in methods.available()
    assert not {"base", "heads", "ema", "__init__"} & {*methods.available()}
    assert methods.module("simclr") is simclr
    with pytest.raises(ConfigError, match=r"'simcrl' is unknown: did you mean simclr\? choose from .*simclr"):
        methods.module("simcrl")


def test_two_views_by_one_recipe():
    augment = Augment(min_scale=0.3)
    one, two = simclr.views(simclr.Config(), augment, 48)
    assert one == two
    assert (one.size, one.augment) == (48, augment)
    assert dataclasses.replace(one, augment=None) == eval_view(48)


def test_the_projector_is_the_papers():
    """Linear without bias, BN, ReLU, linear without bias, BN (2002.05709, B.1 and its code)."""
    method = make()
    assert [type(layer) for layer in method.projector] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
    ]
    first, last = method.projector[0], method.projector[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert (first.in_features, first.out_features, last.in_features, last.out_features) == (16, 24, 24, 12)
    assert first.bias is None
    assert last.bias is None
    assert simclr.Config() == simclr.Config(temperature=0.1, hidden_dim=2048, projection_dim=128)


@pytest.mark.parametrize(("layers", "widths"), [(1, [(16, 12)]), (3, [(16, 24), (24, 24), (24, 12)])])
def test_the_projector_of_version_2_has_a_layer_more(layers: int, widths: list[tuple[int, int]]):
    linear = [layer for layer in make(projector_layers=layers).projector if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == widths
    assert all(layer.bias is None for layer in linear)


def test_the_views_go_through_as_one_batch_and_come_out_in_order(generator: torch.Generator):
    method, images = make(), batch(generator)
    one, two = method.embed(images)
    assert one.shape == two.shape == (8, 12)
    together = method.projector(method.encoder(torch.cat(images.views)))
    torch.testing.assert_close(torch.cat([one, two]), together)  # batch norm: over both views


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_definition_on_the_embeddings(temperature: float, generator: torch.Generator):
    method, images = make(temperature=temperature), batch(generator)
    step = method(images, torch.zeros(()))
    z = torch.cat(method.embed(images))
    row = torch.arange(16)
    torch.testing.assert_close(step.loss, reference(z, z, row, (row + 8) % 16, temperature))
    assert step.loss.requires_grad
    step.loss.backward()
    assert all(p.grad is not None for p in method.parameters())
    first = next(method.encoder.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_metrics_say_how_alike_positives_are_and_how_spread_all_are(generator: torch.Generator):
    method = make()
    z = torch.randn(256, 64, generator=generator)
    far = method.loss((z, torch.randn(256, 64, generator=generator)), torch.zeros(())).metrics
    same = method.loss((z, z), torch.zeros(())).metrics
    collapsed = method.loss((z[:1].expand(256, 64),) * 2, torch.zeros(())).metrics
    assert far.keys() == {"alignment", "std"}
    assert all(value.ndim == 0 and not value.requires_grad for value in far.values())
    assert abs(far["alignment"]) < 0.05
    assert same["alignment"] == pytest.approx(1)
    assert far["std"] == pytest.approx(1, abs=0.05)  # 1 / sqrt(D) a dimension: what uniform on the sphere has
    assert collapsed["std"] < 1e-3


@pytest.mark.filterwarnings("error")
def test_one_sample_has_no_negatives_and_no_spread(generator: torch.Generator):
    """The loss may have its negatives on other ranks; here it has none and says so."""
    one = torch.randn(1, 12, generator=generator)
    with pytest.raises(ConfigError, match="no negatives"):
        make().loss((one, one), torch.zeros(()))
    assert base.spread(one).isnan()  # 0 would be taken for a collapse
    assert base.spread(torch.cat([one, -one])) == pytest.approx(12**0.5 * float(F.normalize(one).abs().mean()))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"hidden_dim": 0},
        {"projection_dim": 0},
        {"projector_layers": 0},
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float]):
    with pytest.raises(ConfigError, match="simclr needs"):
        simclr.Config(**options)  # pyright: ignore[reportArgumentType]
