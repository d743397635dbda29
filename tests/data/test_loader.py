"""Loaders: the same batches at every world size and after every restart, on all backends."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import kit.sources
from sslx.data import Config, Loader, evaluation, sources, training
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.order import VERSION
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError

Backend = Literal["dali", "torchvision", "resident"]
BACKENDS = ("dali", "torchvision", "resident")
CPU = torch.device("cpu")
SPECS = (  # as multi-crop has them
    ViewSpec(size=32, augment=Augment()),
    ViewSpec(size=32, augment=Augment(solarize=0.2, min_scale=0.3)),
    ViewSpec(size=16, augment=Augment(min_scale=0.05, max_scale=0.4)),
)
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return sources.build(kit.sources.folder(folder), "train")


def draw(draws: Draws) -> tuple[np.ndarray, ...]:
    """As a method asks for them: floats, and what it makes of them."""
    return draws.per_sample(5), draws.per_sample(7, "order").argsort(axis=1)


def train(source: Source, backend: Any, *, threads: int | None = None, **changes: Any) -> Loader:
    config = Config(backend=backend, threads=threads if threads is not None else int(backend == "dali"))
    where = {name: changes.pop(name) for name in ("rank", "world_size") if name in changes}
    arguments: dict[str, Any] = {"batch_size": 6, "seed": 3, "draw": draw, "ranks": Ranks(device=CPU, **where)}
    arguments["dtype"] = torch.float32
    specs = changes.pop("specs", SPECS)
    return training(config, source, specs, **(arguments | changes))


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.index, b.index)
        assert (a.label is None) == (b.label is None)
        assert a.label is None or torch.equal(a.label, b.label)  # pyright: ignore[reportArgumentType]
        assert len(a.views) == len(b.views)
        assert [array.dtype for array in a.draws] == [torch.float32, torch.int64]
        for x, y in zip((*a.views, *a.draws), (*b.views, *b.draws), strict=True):
            assert torch.equal(x, y)


def joined(shares: list[Batch]) -> Batch:
    """The shares of one batch on all ranks, put together."""
    assert all(share.label is not None for share in shares)
    return Batch(
        tuple(torch.cat(views) for views in zip(*(share.views for share in shares), strict=True)),
        torch.cat([share.label for share in shares]),  # pyright: ignore[reportArgumentType, reportCallIssue]
        torch.cat([share.index for share in shares]),
        tuple(torch.cat(arrays) for arrays in zip(*(share.draws for share in shares), strict=True)),
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_make_the_batches_of_one(source: Source, backend: Backend, world_size: int) -> None:
    expected = take(train(source, backend), 5)  # 4 batches an epoch
    ranks = [train(source, backend, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = zip(*(take(loader, 5) for loader in ranks), strict=True)
    assert_equal([joined(list(share)) for share in shares], expected)
    assert {loader.batches_per_epoch for loader in ranks} == {4}


def test_micro_batches_together_make_the_batches_of_one(source: Source, backend: Backend) -> None:
    expected = take(train(source, backend), 5)
    micro = take(train(source, backend, accumulate=2), 10)
    assert_equal([joined(micro[2 * step : 2 * step + 2]) for step in range(5)], expected)


def place(loader: Loader) -> dict[str, int]:
    """Where the loader is, without which images it reads."""
    return {key: value for key, value in loader.state_dict().items() if key != "images"}


def test_a_restart_goes_on_bit_identically(source: Source, backend: Backend) -> None:
    uninterrupted = take(train(source, backend), 10)
    for position in (1, 3, 4, 6):  # within an epoch, before its last batch, at its end, in the next one
        first = train(source, backend)
        take(first, position)
        second = train(source, backend)
        second.load_state_dict(first.state_dict())
        assert_equal(take(second, 2), uninterrupted[position : position + 2])
        third = train(source, backend)
        third.load_state_dict(second.state_dict())
        assert_equal(take(third, 2), uninterrupted[position + 2 : position + 4])
    assert place(first) == {"order": VERSION, "seed": 3, "epoch": 1, "position": 12, "num_samples": 26}


@pytest.mark.parametrize(("before", "after", "accumulate"), [(2, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_a_restart_on_another_number_of_ranks_goes_on_with_the_samples_left(
    source: Source, backend: Backend, before: int, after: int, accumulate: int
) -> None:
    expected = take(train(source, backend), 6)
    stopped = [train(source, backend, rank=rank, world_size=before) for rank in range(before)]
    for loader in stopped:
        take(loader, 3)
    states = [loader.state_dict() for loader in stopped]
    assert [place(loader) for loader in stopped] == [
        {"order": VERSION, "seed": 3, "epoch": 0, "position": 18, "num_samples": 26}
    ] * before
    resumed = [train(source, backend, rank=rank, world_size=after, accumulate=accumulate) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(states[0])
    for batch in expected[3:]:
        shares = [share for _ in range(accumulate) for share in [next(loader) for loader in resumed]]
        assert_equal([joined(shares)], [batch])


def test_a_state_of_another_run_is_refused(source: Source, backend: Backend) -> None:
    loader = train(source, backend)
    take(loader, 1)
    state = loader.state_dict()
    with pytest.raises(
        DataError, match=r"trained on 26 images, the source now has 20 .*: restore the images"
    ) as caught:
        train(source.take(np.arange(20)), backend).load_state_dict(state)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="another seed or batch size"):
        train(source, backend, seed=4).load_state_dict(state)
    with pytest.raises(ConfigError, match="another seed or batch size"):
        train(source, backend, batch_size=4).load_state_dict(state)


def test_a_closed_loader_goes_on(source: Source, backend: Backend) -> None:
    expected = take(train(source, backend), 6)
    loader = train(source, backend)
    got = take(loader, 2)
    loader.close()
    loader.close()
    got += take(loader, 3)
    loader.close()
    assert_equal(got + take(loader, 1), expected)


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
        assert batch.index.dtype == torch.int64
        assert batch.label is not None
        assert batch.label.dtype == torch.int64
        assert source.facts.labels is not None
        assert batch.label.tolist() == source.facts.labels[batch.index.numpy()].tolist()


def test_the_stored_image_belongs_to_the_index(backend: Backend) -> None:
    """A source whose image number i is the colour i."""
    pixels = np.zeros((26, 8, 8, 3), dtype=np.uint8) + np.arange(26, dtype=np.uint8)[:, None, None, None]
    flat = kit.sources.in_memory(pixels, size=8)
    recipe = Augment(jitter=0, gray=0, blur=0)
    spec = ViewSpec(size=8, augment=recipe, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    for batch in take(train(flat, backend, specs=(spec, spec)), 5):
        assert batch.label is None
        for view in batch.views:
            torch.testing.assert_close(view, batch.index.float()[:, None, None, None].expand_as(view))


def test_views_are_normalised_by_their_own_mean_and_std(source: Source, backend: Backend) -> None:
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
    for recipe in (Augment(), Augment(solarize=0.3)):
        raw = ViewSpec(size=32, augment=recipe, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
        own = ViewSpec(size=32, augment=recipe, mean=mean, std=std)
        plain, normalised = (next(train(source, backend, specs=(spec,), batch_size=12)).views[0] for spec in (raw, own))
        expected = (plain / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(normalised, expected, rtol=0, atol=2e-5)
        assert plain.min() >= -1e-3
        assert 200 < plain.max() <= 255.001


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_covers_each_image_once(source: Source, backend: Backend, world_size: int) -> None:
    config = Config(backend=backend, threads=int(backend == "dali"))
    arguments: dict[str, Any] = {"batch_size": 4, "dtype": torch.float32}
    whole = evaluation(config, source, eval_view(24), ranks=Ranks(device=CPU), **(arguments | {"batch_size": 26}))
    (expected,) = list(whole)
    assert list(whole) == []
    assert source.facts.labels is not None
    sizes: list[int] = []
    seen: list[int] = []
    for rank in range(world_size):
        ranks = Ranks(device=CPU, rank=rank, world_size=world_size)
        loader = evaluation(config, source, eval_view(24), ranks=ranks, **arguments)
        for batch in loader:
            sizes.append(len(batch))
            seen += batch.index.tolist()
            assert batch.label is not None
            assert batch.label.tolist() == source.facts.labels[batch.index.numpy()].tolist()
            assert torch.equal(batch.views[0], expected.views[0][batch.index])
    assert sorted(seen) == list(range(26))
    assert sizes == ([4] * 6 + [2] if world_size == 1 else [4, 4, 1, 4, 4, 1, 4, 4])


def test_more_ranks_than_images(source: Source, backend: Backend) -> None:
    config = Config(backend=backend, threads=1)
    few = source.take(np.arange(2))
    every = [Ranks(device=CPU, rank=rank, world_size=3) for rank in range(3)]
    loaders = [evaluation(config, few, eval_view(16), batch_size=4, ranks=r, dtype=torch.float32) for r in every]
    assert [len(list(loader)) for loader in loaders] == [1, 1, 0]


def test_the_number_of_threads_changes_nothing(source: Source, backend: Backend) -> None:
    one, two = (1, 2) if backend == "dali" else (0, 2)
    assert_equal(take(train(source, backend, threads=one), 5), take(train(source, backend, threads=two), 5))


@pytest.fixture
def spawned() -> Iterator[None]:
    """Worker processes as on macOS, and everywhere from Python 3.14 on: they get the data set by pickling."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.usefixtures("spawned")
def test_spawned_workers(source: Source, backend: Backend) -> None:
    if backend == "dali":
        pytest.skip("DALI has no worker processes here")
    loader = train(source, backend, threads=1)
    got = take(loader, 2)
    loader.close()
    assert_equal(got, take(train(source, backend, threads=0), 2))


def test_the_synthetic_backend_keeps_order_and_labels(source: Source, backend: Backend) -> None:
    fixed, real = train(source, "synthetic", dtype=torch.bfloat16), train(source, backend)
    first, second = take(fixed, 2)
    for made, batch in zip((first, second), take(real, 2), strict=True):
        assert torch.equal(made.index, batch.index)
        assert torch.equal(made.label, batch.label)  # pyright: ignore[reportArgumentType]
        assert [view.shape for view in made.views] == [view.shape for view in batch.views]
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in made.views)
        assert all(torch.equal(a, b) for a, b in zip(made.views, first.views, strict=True))
    assert first.views[0].dtype == torch.bfloat16
    assert 0.9 < first.views[0].max() - first.views[0].mean()
    assert first.views[0].float().std() > 0.5
    config = Config(backend="synthetic")
    last = list(evaluation(config, source, eval_view(16), batch_size=4, ranks=Ranks(device=CPU), dtype=torch.float32))[
        -1
    ]
    assert last.views[0].shape == (2, 3, 16, 16)
