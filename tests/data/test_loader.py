"""Loaders: the same batches at every world size and after every restart, on all backends."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kit.sources
from kit.errors import raises_one_line
from kit.loaders import AS_STORED, CPU, Backend, assert_same, evaluation_loader, every_backend, joined, labels_of, take
from kit.loaders import training_loader as loader_of
from sslx.data import Loader, sources
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.order import VERSION
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.errors import ConfigError, DataError

SPECS = (  # as multi-crop has them
    ViewSpec(size=32, augment=Augment()),
    ViewSpec(size=32, augment=Augment(solarize=0.2, min_scale=0.3)),
    ViewSpec(size=16, augment=Augment(min_scale=0.05, max_scale=0.4)),
)
pytestmark = every_backend


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return sources.build(kit.sources.folder(folder), "train")


def draw(draws: Draws) -> tuple[np.ndarray, ...]:
    """As a method asks for them: floats, and what it makes of them."""
    return draws.per_sample(5), draws.per_sample(7, "order").argsort(axis=1)


def train(source: Source, backend: str, specs: tuple[ViewSpec, ...] = SPECS, **options: Any) -> Loader:
    return loader_of(source, backend, specs, **{"draw": draw, **options})


def assert_own_labels(batch: Batch, source: Source) -> None:
    assert source.facts.labels is not None
    assert labels_of(batch) == source.facts.labels[batch.index.numpy()].tolist()


@pytest.fixture(scope="module")
def uninterrupted(source: Source, backend: Backend) -> list[Batch]:
    """The first batches of one rank, 4 of which make an epoch."""
    return take(train(source, backend), 10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_batches_of_one(
    source: Source, backend: Backend, uninterrupted: list[Batch], world_size: int
) -> None:
    ranks = [train(source, backend, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = zip(*(take(loader, 5) for loader in ranks), strict=True)
    assert_same([joined(share) for share in shares], uninterrupted[:5])
    assert {loader.batches_per_epoch for loader in ranks} == {4}


def test_micro_batches_together_make_the_batches_of_one(
    source: Source, backend: Backend, uninterrupted: list[Batch]
) -> None:
    micro = take(train(source, backend, accumulate=2), 10)
    assert_same([joined(micro[2 * step : 2 * step + 2]) for step in range(5)], uninterrupted[:5])


def place(loader: Loader) -> dict[str, int]:
    """Where the loader is, without which images it reads."""
    return {key: value for key, value in loader.state_dict().items() if key != "images"}


def test_a_restart_goes_on_bit_identically(source: Source, backend: Backend, uninterrupted: list[Batch]) -> None:
    for position in (1, 3, 4, 6):  # within an epoch, before its last batch, at its end, in the next one
        first = train(source, backend)
        take(first, position)
        second = train(source, backend)
        second.load_state_dict(first.state_dict())
        assert_same(take(second, 2), uninterrupted[position : position + 2])
        third = train(source, backend)
        third.load_state_dict(second.state_dict())
        assert_same(take(third, 2), uninterrupted[position + 2 : position + 4])
    assert place(first) == {"order": VERSION, "seed": 3, "epoch": 1, "position": 12, "num_samples": 26}


@pytest.mark.parametrize(("before", "after", "accumulate"), [(2, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_a_restart_on_another_number_of_ranks_goes_on_with_the_samples_left(
    source: Source, backend: Backend, uninterrupted: list[Batch], before: int, after: int, accumulate: int
) -> None:
    stopped = [train(source, backend, rank=rank, world_size=before) for rank in range(before)]
    for loader in stopped:
        take(loader, 3)
    stopped_at = {"order": VERSION, "seed": 3, "epoch": 0, "position": 18, "num_samples": 26}
    assert [place(loader) for loader in stopped] == [stopped_at] * before
    resumed = [train(source, backend, rank=rank, world_size=after, accumulate=accumulate) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(stopped[0].state_dict())
    for batch in uninterrupted[3:6]:
        shares = [next(loader) for _ in range(accumulate) for loader in resumed]
        assert_same([joined(shares)], [batch])


def test_a_state_of_another_run_is_refused(source: Source, backend: Backend) -> None:
    loader = train(source, backend)
    take(loader, 1)
    state = loader.state_dict()
    with raises_one_line(DataError, "trained on 26 images, the source now has 20 ", ": restore the images"):
        train(source.take(np.arange(20)), backend).load_state_dict(state)
    with pytest.raises(ConfigError, match="another seed or batch size"):
        train(source, backend, seed=4).load_state_dict(state)
    with pytest.raises(ConfigError, match="another seed or batch size"):
        train(source, backend, batch_size=4).load_state_dict(state)


def test_a_closed_loader_goes_on(source: Source, backend: Backend, uninterrupted: list[Batch]) -> None:
    loader = train(source, backend)
    got = take(loader, 2)
    loader.close()
    loader.close()
    got += take(loader, 3)
    loader.close()
    assert_same(got + take(loader, 1), uninterrupted[:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_batch_is(source: Source, backend: Backend, dtype: torch.dtype) -> None:
    specs = (ViewSpec(size=40, augment=Augment()), *[ViewSpec(size=16, augment=Augment(max_scale=0.3))] * 2)
    for batch in take(train(source, backend, specs=specs, dtype=dtype), 2):
        assert [tuple(view.shape) for view in batch.views] == [(6, 3, 40, 40), (6, 3, 16, 16), (6, 3, 16, 16)]
        for view in batch.views:
            assert view.dtype == dtype
            assert view.device == CPU
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.isfinite(view).all()
            assert (view.float().std((1, 2, 3)) > 0.02).all()
        assert not torch.equal(batch.views[1], batch.views[2])  # the same recipe, another draw
        assert len(batch) == 6
        assert_own_labels(batch, source)
        assert batch.label is not None
        assert {batch.index.dtype, batch.label.dtype} == {torch.int64}
        assert [array.dtype for array in batch.draws] == [torch.float32, torch.int64]


def test_the_stored_image_belongs_to_the_index(backend: Backend) -> None:
    """A source whose image number i is the colour i."""
    pixels = np.zeros((26, 8, 8, 3), dtype=np.uint8) + np.arange(26, dtype=np.uint8)[:, None, None, None]
    flat = kit.sources.in_memory(pixels, size=8)
    recipe = Augment(jitter=0, gray=0, blur=0)
    spec = ViewSpec(size=8, augment=recipe, **AS_STORED)
    for batch in take(train(flat, backend, specs=(spec, spec)), 5):
        assert batch.label is None
        for view in batch.views:
            torch.testing.assert_close(view, batch.index.float()[:, None, None, None].expand_as(view))


def test_views_are_normalised_by_their_own_mean_and_std(source: Source, backend: Backend) -> None:
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
    for recipe in (Augment(), Augment(solarize=0.3)):
        raw = ViewSpec(size=32, augment=recipe, **AS_STORED)
        own = ViewSpec(size=32, augment=recipe, mean=mean, std=std)
        plain, normalised = (next(train(source, backend, specs=(spec,), batch_size=12)).views[0] for spec in (raw, own))
        expected = (plain / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(normalised, expected, rtol=0, atol=2e-5)
        assert plain.min() >= -1e-3
        assert 200 < plain.max() <= 255.001


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_each_image_once(source: Source, backend: Backend, world_size: int) -> None:
    whole = evaluation_loader(source, backend, eval_view(24), batch_size=26)
    (expected,) = list(whole)
    assert list(whole) == []
    sizes: list[int] = []
    seen: list[int] = []
    for rank in range(world_size):
        for batch in evaluation_loader(source, backend, eval_view(24), rank=rank, world_size=world_size):
            sizes.append(len(batch))
            seen += batch.index.tolist()
            assert_own_labels(batch, source)
            assert torch.equal(batch.views[0], expected.views[0][batch.index])
    assert sorted(seen) == list(range(26))
    assert sizes == ([4] * 6 + [2] if world_size == 1 else [4, 4, 1, 4, 4, 1, 4, 4])


def test_more_ranks_than_images(source: Source, backend: Backend) -> None:
    few = source.take(np.arange(2))
    loaders = [evaluation_loader(few, backend, eval_view(16), threads=1, rank=rank, world_size=3) for rank in range(3)]
    assert [len(list(loader)) for loader in loaders] == [1, 1, 0]


def test_the_number_of_threads_changes_nothing(source: Source, backend: Backend, uninterrupted: list[Batch]) -> None:
    assert_same(take(train(source, backend, threads=2), 5), uninterrupted[:5])


@pytest.fixture
def spawned() -> Iterator[None]:
    """Worker processes as on macOS, and everywhere from Python 3.14 on: they get the data set by pickling."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.usefixtures("spawned")
def test_spawned_workers(source: Source, backend: Backend, uninterrupted: list[Batch]) -> None:
    if backend == "dali":
        pytest.skip("DALI has no worker processes here")
    loader = train(source, backend, threads=1)
    assert_same(take(loader, 2), uninterrupted[:2])
    loader.close()


def test_the_synthetic_backend_keeps_order_and_labels(source: Source, uninterrupted: list[Batch]) -> None:
    first, second = take(train(source, "synthetic", dtype=torch.bfloat16), 2)
    for made, batch in zip((first, second), uninterrupted[:2], strict=True):
        assert torch.equal(made.index, batch.index)
        assert torch.equal(made.label, batch.label)  # pyright: ignore[reportArgumentType]
        assert [view.shape for view in made.views] == [view.shape for view in batch.views]
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in made.views)
        assert all(torch.equal(a, b) for a, b in zip(made.views, first.views, strict=True))
    assert first.views[0].dtype == torch.bfloat16
    assert 0.9 < first.views[0].max() - first.views[0].mean()
    assert first.views[0].float().std() > 0.5
    last = list(evaluation_loader(source, "synthetic", eval_view(16)))[-1]
    assert last.views[0].shape == (2, 3, 16, 16)
