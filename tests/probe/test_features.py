"""Feature extraction: complete, in source order, the same on any number of ranks, and without a trace."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslx import distributed
from sslx.data.batch import Batch
from sslx.errors import NonFiniteError
from sslx.probe.features import Features, extract, pixels, rows_by_class


def images(size: int, side: int = 4) -> Tensor:
    return torch.linspace(-1, 1, size * 3 * side * side).view(size, 3, side, side)


def batches(view: Tensor, order: list[int], per_rank: int, *, labelled: bool = True) -> list[Batch]:
    return [
        Batch((view[rows],), torch.tensor(rows) % 3 if labelled else None, torch.tensor(rows))
        for rows in (order[i : i + per_rank] for i in range(0, len(order), per_rank))
    ]


def encoder() -> nn.Sequential:
    first = nn.Linear(48, 6)
    nn.init.constant_(first.weight, 0.25)
    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(6), nn.Dropout(0.5))


def extract_share(size: int, per_rank: int) -> Features:
    """What each rank does: its samples of every W-th, in a descending order."""
    order = list(range(size))[distributed.rank() :: distributed.world_size()][::-1]
    torch.manual_seed(0)
    return extract(encoder(), batches(images(size), order, per_rank), num_samples=size)


def test_extract_sorts_what_comes_in_any_order() -> None:
    view, model, calls = images(11), encoder(), list[tuple[str, int, int]]()
    order = [7, 0, 3, 10, 1, 9, 2, 8, 4, 6, 5]
    features = extract(model, batches(view, order, 4), num_samples=11, progress=lambda *call: calls.append(call))
    assert calls == [("features", 4, 11), ("features", 8, 11), ("features", 11, 11)]
    model.eval()
    torch.testing.assert_close(features.x, model(view))
    assert features.index.tolist() == list(range(11))
    assert features.label is not None
    assert features.label.tolist() == [i % 3 for i in range(11)]
    assert features.x.dtype == torch.float32
    assert not features.x.is_inference()


@pytest.mark.parametrize(("world_size", "size"), [(2, 7), (3, 7), (3, 2)])
def test_every_rank_gets_all_samples_of_unequal_shares(ranks: Any, world_size: int, size: int) -> None:
    alone = extract_share(size, 3)
    assert alone.label is not None
    for features in ranks(world_size, extract_share, size, 3):
        torch.testing.assert_close(features.x, alone.x)
        assert torch.equal(features.label, alone.label)
        assert features.index.tolist() == list(range(size))


def test_extract_leaves_modes_and_statistics_as_they_were_after_an_error_too() -> None:
    model = encoder().train()
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract(model, batches(images(5), list(range(5)), 2), num_samples=5)
    assert [module.training for module in model] == [True, True, True, False]
    with pytest.raises(RuntimeError):
        extract(model, batches(images(2, side=5), [0, 1], 2), num_samples=2)
    assert [module.training for module in model] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_computes_in_its_dtype_and_returns_float32() -> None:
    seen: list[torch.dtype] = []
    model = encoder()
    model[1].register_forward_hook(lambda *called: seen.append(called[-1].dtype))
    features = extract(model, batches(images(3), [0, 1, 2], 3), autocast=torch.bfloat16, num_samples=3)
    assert seen == [torch.bfloat16]
    assert features.x.dtype == torch.float32


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 1, 3], [0, 1]])
def test_a_sample_twice_or_never_is_a_bug(order: list[int]) -> None:
    with pytest.raises(AssertionError, match="twice, or never"):
        extract(encoder(), batches(images(4), order, 2), num_samples=3)


def test_without_labels_there_are_features_and_those_that_are_not_finite_are_refused() -> None:
    view = images(4)
    features = extract(encoder(), batches(view, [3, 2, 1, 0], 3, labelled=False), num_samples=4)
    assert features.label is None
    assert features.x.shape == (4, 6)
    view[2] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 4 samples"):
        extract(encoder(), batches(view, [0, 1, 2, 3], 2), num_samples=4)


def test_pixels_are_the_flattened_views_and_averaged_down_of_large_ones() -> None:
    view = images(5, side=6)
    features = pixels(batches(view.to(memory_format=torch.channels_last), [4, 0, 2, 1, 3], 2), num_samples=5)
    assert np.array_equal(features.x.numpy(), view.numpy().reshape(5, -1))
    view = images(2, side=64)
    means = view.numpy().reshape(2, 3, 16, 4, 16, 4).mean((3, 5)).reshape(2, -1)
    np.testing.assert_allclose(pixels(batches(view, [0, 1], 2), num_samples=2).x.numpy(), means, atol=1e-6)


def test_rows_by_class_are_a_function_of_seed_and_counters() -> None:
    label = torch.tensor([2, 0, 2, 2, 0, 5] * 20)
    rows, again, other = (rows_by_class(label, 1, "name", counter) for counter in (4, 4, 5))
    expected = {c: np.flatnonzero(label.numpy() == c).tolist() for c in (0, 2, 5)}
    assert {c: sorted(r) for c, r in rows.items()} == expected
    assert all(np.array_equal(rows[c], again[c]) for c in rows)
    assert not any(np.array_equal(rows[c], other[c]) for c in rows)
