"""The kNN probe against a loop over pairs in float64, and its rules for k and for ties."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sslx.probe import knn
from sslx.probe.features import Features
from sslx.probe.linear import held_out_mask


def features(x: Tensor, label: Tensor) -> Features:
    return Features(x, label, torch.arange(len(x)))


def clusters(size: int, generator: torch.Generator, spread: float = 2.0) -> Features:
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    label = torch.arange(size) % 4
    return features(centres[label] + spread * torch.randn(size, 12, generator=generator), label)


def brute_force(train: Features, test: Features, num_classes: int, k: int, temperature: float) -> float:
    keys, queries = train.x.double().numpy(), test.x.double().numpy()
    assert train.label is not None
    assert test.label is not None
    labels, correct = train.label.tolist(), 0
    for query, label in zip(queries, test.label.tolist(), strict=True):
        cosine = [query @ key / np.sqrt((query @ query) * (key @ key)) for key in keys]
        votes = [0.0] * num_classes
        for i in sorted(range(len(keys)), key=lambda i: -cosine[i])[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        correct += votes.index(max(votes)) == label
    return correct / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (50, 0.07), (50, 5.0)])
def test_accuracy_is_that_of_the_definition(k: int, temperature: float, generator: torch.Generator) -> None:
    train, test = clusters(200, generator), clusters(120, generator)
    expected = brute_force(train, test, 4, k, temperature)
    assert 0.3 < expected < 1
    assert knn.accuracy(train, test, 4, k, temperature) == pytest.approx(expected, abs=1.5 / 120)  # a tie in fp32


def test_scale_of_a_feature_vector_does_not_matter(generator: torch.Generator) -> None:
    train, test = clusters(200, generator), clusters(120, generator)
    scaled = Features(train.x * 2.0 ** torch.arange(-10, 10).repeat(10)[:, None], train.label, train.index)
    assert knn.accuracy(scaled, test, 4, 20) == knn.accuracy(train, test, 4, 20)


def test_k_is_at_most_what_a_class_has_on_average(generator: torch.Generator) -> None:
    train = clusters(40, generator)
    assert knn.num_neighbors(train.label, 200) == 10
    assert knn.num_neighbors(train.label, 7) == 7
    assert knn.num_neighbors(torch.tensor([0] * 1900 + [1] * 100), 200) == 200, "as in DINO's code"
    test = clusters(60, generator)
    assert knn.accuracy(train, test, 4, k=200) == knn.accuracy(train, test, 4, k=10)


def test_a_rare_class_does_not_decide_how_many_vote(generator: torch.Generator) -> None:
    common, rare = clusters(396, generator), torch.randn(1, 12, generator=generator)
    train = features(torch.cat([common.x, rare]), torch.cat([common.label, torch.tensor([4])]))
    test = clusters(120, generator)
    expected = brute_force(train, test, 5, 50, 0.07)
    assert knn.num_neighbors(train.label, 50) == 50
    assert knn.accuracy(train, test, 5, k=50) == pytest.approx(expected, abs=1.5 / 120)


def test_accuracy_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    train, test = clusters(200, generator), clusters(101, generator)
    whole = knn.accuracy(train, test, 4, 20)
    monkeypatch.setattr(knn, "_BLOCK_BYTES", 4 * 200 * 7)
    calls: list[tuple[str, int, int]] = []
    by_sevens = knn.accuracy(train, test, 4, 20, progress=lambda *call: calls.append(call))
    assert by_sevens == pytest.approx(whole, abs=1.5 / 101)
    assert calls[0] == ("kNN", 7, 101)
    assert calls[-1] == ("kNN", 101, 101)


def test_several_k_are_measured_by_one_search(generator: torch.Generator) -> None:
    """With many equal features, of which each k must take the same as it does alone."""
    train, test = clusters(200, generator), clusters(90, generator)
    train.x[::3] = train.x[:1]
    ks = (1, 4, 9, 50, 200)
    assert knn.accuracies(train, test, 4, ks) == {k: knn.accuracy(train, test, 4, k) for k in ks}


def test_k_is_the_best_on_held_out_training_images(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    train, ks = clusters(2_000, generator, spread=3.0), (1, 5, 50, 900)
    k, scores = knn.choose_k(train, 4, ks, seed=2)
    held = held_out_mask(train.label, 2)
    others, queries = (features(train.x[mask], train.label[mask]) for mask in (~held, held))
    assert scores == {k: knn.accuracy(others, queries, 4, k) for k in (1, 5, 50, 500)}
    assert k == min(k for k in scores if scores[k] == max(scores.values()))
    assert len(set(scores.values())) > 1
    assert knn.choose_k(train, 4, (900,)) == (500, {}), "one k is no choice"
    monkeypatch.setattr(knn, "MAX_HELD_OUT", 8)
    _, coarse = knn.choose_k(train, 4, ks, seed=2)
    assert all((8 * score).is_integer() for score in coarse.values())


@pytest.mark.parametrize("k", [1, 3, 9, 30])
def test_nearest_is_a_stable_sort(k: int, generator: torch.Generator) -> None:
    similarity = torch.randint(0, 4, (50, 30), generator=generator).float()
    similarity[:10] = torch.rand(10, 30, generator=generator)
    order = np.argsort(-similarity.numpy(), axis=1, kind="stable")[:, :k]
    values, columns = knn.nearest(similarity, k)
    assert np.array_equal(np.sort(columns.numpy(), axis=1), np.sort(order, axis=1))
    assert torch.equal(values, similarity.gather(1, columns))


def test_collapsed_features_are_chance_and_always_the_same() -> None:
    train = features(torch.ones(400, 8), torch.arange(400) % 4)
    test = features(torch.ones(40, 8), torch.arange(40) % 4)
    assert knn.accuracy(train, test, 4) == 0.25
