"""Siamese margin: pairs and equation 4 against loops, on 1, 2 and 3 ranks; pairs that coincide or do not exist."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kit import full_batch, tiny
from sslx import losses
from sslx.errors import ConfigError
from sslx.methods import siamese
from sslx.methods.base import Embedded


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


def loss_of(margin: float, z1: Tensor, z2: Tensor, label: Tensor | None = None) -> Tensor:
    return losses.margin_loss(*losses.pair_distances(z1, z2, label), margin)


def oracle(margin: float, z1: Tensor, z2: Tensor, label: Tensor | None = None) -> Tensor:
    return by_loops(z1, z2, None if label is None else label.tolist(), margin)


@full_batch.over_ranks
@pytest.mark.parametrize(
    "label",
    [None, [2, 0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 1], [7] * 9 + [-3, 10**12, 10**12], [4] * 12],
    ids=["views", "labels", "a label once", "one label"],
)
def test_ranks_give_equation_4_over_the_whole_batchs_pairs(
    world_size: int, label: list[int] | None, ranks: full_batch.RunOnRanks, generator: torch.Generator
):
    inputs = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator).unbind()
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    margin = 5.0  # about the median distance
    loss, truth = partial(loss_of, margin), partial(oracle, margin)
    given, bugs = [], []
    if label is not None:  # of pairs of views, the only ones between ranks may be a margin apart
        given, bugs = [torch.tensor(label)], ["all_gather_grad"]
    full_batch.check(ranks, world_size, loss, truth, inputs, weight, given=given, bugs=bugs)


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
    similar, _, has_dissimilar = losses.pair_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    assert similar.tolist() == [5]
    assert not has_dissimilar
    assert losses.margin_loss(similar, similar, has_dissimilar, 9.0).item() == 12.5


def test_unequal_batches_and_labels_that_do_not_fit_are_refused(ranks: full_batch.RunOnRanks):
    full_batch.refuses_unequal_batches(ranks, losses.pair_distances, "the margin loss")
    with pytest.raises(ValueError, match=r"a label \(4,\) int64, got \(3,\)"):
        losses.pair_distances(torch.ones(4, 2), torch.ones(4, 2), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(4, 2\), \(4, 3\)"):
        losses.pair_distances(torch.ones(4, 2), torch.ones(4, 3))


def make(**options: Any) -> siamese.Method:
    return tiny.build(siamese.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_method_compares_what_it_embeds(normalize: bool, generator: torch.Generator):
    method = make(pairs="labels", normalize=normalize, margin=1.2)
    images = tiny.batch(method, generator)
    assert images.label is not None
    z = method.projector(method.encoder(torch.cat(images.views))).double()
    if normalize:
        z = z / z.square().sum(1, keepdim=True).sqrt()
    expected = by_loops(z[:6], z[6:], images.label.tolist(), 1.2).item()
    assert method(images).loss.item() == pytest.approx(expected, rel=1e-5)


def test_pairs_by_labels_need_a_source_with_labels():
    siamese.Config(pairs="views").check(6, tiny.UNLABELED)
    siamese.Config(pairs="labels").check(6, tiny.LABELED)
    with pytest.raises(ConfigError, match=r"^[^\n]*needs a source with labels[^\n]*$"):
        siamese.Config(pairs="labels").check(6, tiny.UNLABELED)


def test_metrics_tell_similar_from_dissimilar():
    method = make(projection_dim=2, pairs="labels")
    corners = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0], [0.0, 1.0]])

    def metrics(z: Tensor, label: list[int]) -> dict[str, float]:
        step = method.loss(Embedded((z, z), (torch.tensor(label),)))
        return {key: value.item() for key, value in step.metrics.items()}

    root = math.sqrt(2)
    apart = {"pair_accuracy": 1, "similar": 0, "dissimilar": root}
    mixed = {"pair_accuracy": 0.25, "similar": root, "dissimilar": root / 2}  # two dissimilar pairs of four coincide
    assert metrics(corners, [0, 1, 0, 1]) == pytest.approx(apart)
    assert metrics(corners, [0, 0, 1, 1]) == pytest.approx(mixed)
    assert metrics(torch.ones(4, 2), [0, 1, 0, 1]) == {"pair_accuracy": 0.5, "similar": 0, "dissimilar": 0}
    assert metrics(torch.ones(4, 2), [3, 3, 3, 3]) == {"pair_accuracy": 1, "similar": 0, "dissimilar": 0}


def test_numbers_that_make_no_sense_are_refused():
    tiny.refuses(siamese.Config, margin=(0.0, math.inf))
    with pytest.raises(ConfigError, match=r"at most 2 apart[^\n]*not 2.5$"):
        siamese.Config(margin=2.5)
