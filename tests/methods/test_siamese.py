"""Siamese margin: pairs and equation 4 against loops, on 1, 2 and 3 ranks; pairs that coincide or do not exist."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslx import distributed, encoders, losses, parallel
from sslx.data.batch import Batch
from sslx.errors import ConfigError, DataError
from sslx.methods import siamese

RunOnRanks = Callable[..., list[Any]]
SIZE, NOW = 16, torch.zeros(())


def by_loops(z1: Tensor, z2: Tensor, label: list[int] | None, margin: float) -> Tensor:
    """Equation 4 over the whole batch's pairs, found by walking on from each sample."""
    terms: list[Tensor] = []
    num = len(z1)
    for i in range(num):
        around = [(i + step) % num for step in range(1, num)]
        if label is None:
            similar, dissimilar = i, around[0] if around else None
        else:
            similar = next((j for j in around if label[j] == label[i]), i)
            dissimilar = next((j for j in around if label[j] != label[i]), None)
        terms.append(((z1[i] - z2[similar]) ** 2).sum() / 2)
        if dissimilar is not None:
            distance = ((z1[i] - z2[dissimilar]) ** 2).sum().sqrt()
            terms.append((margin - distance) ** 2 / 2 if distance < margin else distance * 0)
    return sum(terms, torch.zeros((), dtype=z1.dtype)) / len(terms)


class Net(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x1: Tensor, x2: Tensor, label: Tensor | None, margin: float) -> Tensor:
        pairs = losses.pair_distances(x1 @ self.weight, x2 @ self.weight, label)
        return losses.margin_loss(*pairs, margin)


def on_a_rank(x1: Tensor, x2: Tensor, label: Tensor | None, weight: Tensor, margin: float) -> tuple[float, Tensor]:
    """This rank's share through DDP: the loss's mean over ranks and DDP's gradient."""
    world_size, rank = distributed.world_size(), distributed.rank()
    net = Net(weight)
    wrapped = parallel.wrap(net, device=torch.device("cpu"))
    share = [None if x is None else x.chunk(world_size)[rank] for x in (x1, x2, label)]
    loss = wrapped(*share, margin)
    loss.backward()
    assert net.weight.grad is not None
    return distributed.mean_over_ranks(loss).item(), net.weight.grad


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "label",
    [None, [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 1], [7] * 9 + [-3, 10**12, 10**12], [4] * 12],
    ids=["views", "labels", "a label once", "one label"],
)
def test_ranks_give_equation_4_over_the_whole_batchs_pairs(
    world_size: int, label: list[int] | None, ranks: RunOnRanks, generator: torch.Generator
):
    x1, x2 = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    margin = 5.0  # about the median distance
    expected = by_loops(x1 @ weight, x2 @ weight, label, margin)
    (gradient,) = torch.autograd.grad(expected, weight)
    labels = None if label is None else torch.tensor(label)
    for loss, found in ranks(world_size, on_a_rank, x1, x2, labels, weight.detach(), margin):
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


def test_embeddings_that_coincide_have_a_finite_gradient():
    z = torch.ones(4, 3, requires_grad=True)
    loss = losses.margin_loss(*losses.pair_distances(z, z), margin=1.0)
    loss.backward()
    assert loss.item() == 0.25  # half of the pairs are a whole margin too near
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros(4, 3))
    nearly = torch.full((4, 3), 1e-25).diag_embed()[0].requires_grad_()
    losses.margin_loss(*losses.pair_distances(nearly, nearly.flip(0)), margin=1.0).backward()
    assert nearly.grad is not None
    assert nearly.grad.isfinite().all()


def test_one_sample_alone_has_no_dissimilar_pair():
    similar, _, some = losses.pair_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    assert similar.tolist() == [5]
    assert not some
    assert losses.margin_loss(similar, similar, some, 9.0).item() == 12.5


def unequal() -> str:
    z = torch.ones(3 + distributed.rank(), 2)
    with pytest.raises(DataError) as raised:
        losses.pair_distances(z, z)
    return str(raised.value)


def test_unequal_batches_and_labels_that_do_not_fit_are_refused(ranks: RunOnRanks):
    assert all("got [3, 4] by rank" in message for message in ranks(2, unequal))
    with pytest.raises(ValueError, match=r"a label \(4,\) int64, got \(3,\)"):
        losses.pair_distances(torch.ones(4, 2), torch.ones(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(4, 2\), \(4, 3\)"):
        losses.pair_distances(torch.ones(4, 2), torch.ones(4, 3))


def make(**options: Any) -> siamese.Method:
    trunk = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
    config = dataclasses.replace(siamese.Config(hidden_dim=24, projection_dim=12), **options)
    return siamese.Method(config, encoders.build(trunk, SIZE))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_method_compares_what_it_embeds(normalize: bool, generator: torch.Generator):
    method = make(pairs="labels", normalize=normalize, margin=1.2)
    images = tuple(torch.randn(6, 3, SIZE, SIZE, generator=generator) for _ in range(2))
    label = [1, 0, 0, 1, 2, 1]
    batch = Batch(images, torch.tensor(label), torch.arange(6))
    z = method.projector(method.encoder(torch.cat(images))).double()
    if normalize:
        z = z / z.square().sum(1, keepdim=True).sqrt()
    expected = by_loops(z[:6], z[6:], label, 1.2).item()
    assert method(batch, NOW).loss.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="needs a source with labels") as raised:
        method.config.check(6, labelled=False)
    assert "\n" not in str(raised.value)


def test_metrics_tell_similar_from_dissimilar():
    method = make(projection_dim=2, pairs="labels")
    corners = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0], [0.0, 1.0]])

    def metrics(z: Tensor, label: list[float]) -> dict[str, float]:
        step = method.loss((z, z, torch.tensor(label, dtype=torch.float64)), NOW)
        return {key: value.item() for key, value in step.metrics.items()}

    root = math.sqrt(2)
    apart = {"pair_accuracy": 1, "similar": 0, "dissimilar": root}
    mixed = {"pair_accuracy": 0.25, "similar": root, "dissimilar": root / 2}  # two dissimilar pairs of four coincide
    assert metrics(corners, [0, 1, 0, 1]) == pytest.approx(apart)
    assert metrics(corners, [0, 0, 1, 1]) == pytest.approx(mixed)
    assert metrics(torch.ones(4, 2), [0, 1, 0, 1]) == {"pair_accuracy": 0.5, "similar": 0, "dissimilar": 0}
    assert metrics(torch.ones(4, 2), [3, 3, 3, 3]) == {"pair_accuracy": 1, "similar": 0, "dissimilar": 0}


@pytest.mark.parametrize("options", [{"margin": 0.0}, {"hidden_dim": 0}, {"projection_dim": 0}])
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match="siamese needs a margin > 0"):
        siamese.Config(**options)
