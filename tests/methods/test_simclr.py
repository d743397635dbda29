"""SimCLR: its views, its projector, its loss against the kernels' definition, its metrics."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kit import tiny
from sslx import losses, methods
from sslx.errors import ConfigError
from sslx.methods import simclr
from sslx.methods.base import Embedded
from sslx_kernels.nt_xent.reference import nt_xent as reference


def make(**options: Any) -> simclr.Method:
    return tiny.build(simclr.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}))


def test_it_is_found_by_its_file_name_and_refused_by_another():
    assert "simclr" in methods.available()
    assert not {"base", "heads", "ema", "__init__"} & {*methods.available()}
    assert methods.module("simclr") is simclr
    with pytest.raises(ConfigError, match=r"'simcrl' is unknown: did you mean simclr\? choose from .*simclr"):
        methods.module("simcrl")


def test_the_projector_is_the_papers():
    """Linear without bias, BN, ReLU, linear without bias, BN (2002.05709, B.1 and its code)."""
    projector = make().projector
    assert [type(layer) for layer in projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert tiny.linear_widths(projector) == [(16, 24), (24, 12)]
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert simclr.Config() == simclr.Config(temperature=0.1, hidden_dim=2048, projection_dim=128)


@pytest.mark.parametrize(("layers", "widths"), [(1, [(16, 12)]), (3, [(16, 24), (24, 24), (24, 12)])])
def test_the_projector_of_version_2_has_a_layer_more(layers: int, widths: list[tuple[int, int]]):
    projector = make(projector_layers=layers).projector
    assert tiny.linear_widths(projector) == widths
    assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))


def test_the_views_go_through_as_one_batch_and_come_out_in_order(generator: torch.Generator):
    method = make()
    images = tiny.batch(method, generator)
    one, two = method.embed(images).compared
    assert one.shape == two.shape == (6, 12)
    together = method.projector(method.encoder(torch.cat(images.views)))
    torch.testing.assert_close(torch.cat([one, two]), together)  # batch norm: over both views


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_definition_on_the_embeddings(temperature: float, generator: torch.Generator):
    method = make(temperature=temperature)
    embedded = method.embed(tiny.batch(method, generator))
    z, row = torch.cat(embedded.compared), torch.arange(12)
    expected = reference(z, z, row, (row + 6) % 12, temperature)
    torch.testing.assert_close(method.loss(embedded).loss, expected)


def test_metrics_say_how_alike_positives_are_and_how_spread_all_are(generator: torch.Generator):
    method = make()
    z = torch.randn(256, 64, generator=generator)
    far = method.loss(Embedded((z, torch.randn(256, 64, generator=generator)))).metrics
    same = method.loss(Embedded((z, z))).metrics
    collapsed = method.loss(Embedded((z[:1].expand(256, 64),) * 2)).metrics
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
        make().loss(Embedded((one, one)))
    assert losses.spread(one).isnan()  # 0 would be taken for a collapse
    assert losses.spread(torch.cat([one, -one])) == pytest.approx(12**0.5 * float(F.normalize(one).abs().mean()))
