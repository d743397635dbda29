"""The loaders' device code on fake CUDA tensors: one copy from the host a batch, and nothing waits for the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import fake_cuda
import numpy as np
import pytest
import torch
from PIL import Image

from kit.loaders import CPU, evaluation_loader, labels_of, take, training_loader
from kit.sources import by_path, in_memory, pixels_of
from sslx.data import Loader, transfer
from sslx.data.backends import color as finishing
from sslx.data.backends import dali, row_sums
from sslx.data.backends.dali import Dali
from sslx.data.backends.resident import Resident
from sslx.data.backends.torchvision import TorchVision
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.order import Shuffled
from sslx.data.planner import Planner
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec
from sslx.errors import DataError

CUDA = torch.device("cuda", 0)
Backend = Literal["resident", "torchvision", "synthetic"]
SPECS = (  # as multi-crop has them
    ViewSpec(size=24, augment=Augment(blur=0.5)),
    ViewSpec(size=24, augment=Augment(solarize=0.3, interpolation="bicubic")),
    ViewSpec(size=16, augment=Augment(min_scale=0.05, max_scale=0.4)),
)
FOR_ANY_CHANNELS = ViewSpec(
    size=16, augment=Augment(vertical_flip=0.5, right_angles=0.5, rotate=0.5, gain=0.5, noise=0.5)
)
BATCH = 6


@pytest.fixture
def source() -> Source:
    generator = np.random.default_rng()
    pixels = generator.integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    return in_memory(pixels, generator.integers(0, 5, 18))


def draw(draws: Draws) -> tuple[np.ndarray, ...]:
    return draws.per_sample(5), draws.per_sample(7).argsort(axis=1)


def loader_of(source: Source, backend: Backend, specs: tuple[ViewSpec, ...] = SPECS) -> Loader:
    """On a fake GPU, to be called within ``fake_cuda.on``; a few batches in, so that what is made once is there."""
    loader = training_loader(source, backend, specs, draw=draw, device=CUDA, dtype=torch.bfloat16)
    if isinstance(loader.backend, Resident):
        loader.backend._pixels = torch.from_numpy(pixels_of(source)).permute(0, 3, 1, 2).to(CUDA)
        loader.backend._sides = np.full((len(source), 2), 32)
    next(loader)
    return loader


def made_by_dali(source: Source) -> Callable[[int], transfer.Delivery]:
    """What torch does after DALI's graph, whose crops on a GPU are uint8 there."""
    backend = Dali(source, SPECS, max_per_rank=BATCH, device=CUDA, num_threads=1)
    order = Shuffled(num_samples=18, batch_size=BATCH, seed=3)

    def along(t: int) -> transfer.Arrays:
        return {"label": order.batch(t), "draws": np.ones((BATCH, 5), dtype=np.float32)}

    planner = Planner(order=order, specs=SPECS, seed=3, along=along)

    def make(t: int) -> transfer.Delivery:
        crops = [torch.empty(BATCH, spec.size, spec.size, 3, dtype=torch.uint8, device=CUDA) for spec in SPECS]
        work = planner(t)
        assert work is not None
        return backend._make(crops, backend.prepare(work))

    return make


def one_copy_a_batch(counts: fake_cuda.Counts, num_batches: int) -> None:
    assert len(counts.copies) == num_batches
    assert counts.blocking == 0
    assert counts.launches > 0


@pytest.mark.parametrize("backend", ["resident", "torchvision", "synthetic"])
def test_a_batch_is_one_copy_and_nothing_waits(source: Source, backend: Backend) -> None:
    with fake_cuda.on() as counts:
        loader = loader_of(source, backend)
        counts.forget()
        batches = [next(loader) for _ in range(2)]
        one_copy_a_batch(counts, 2)
    for batch in batches:
        assert batch.label is not None
        assert {tensor.device for tensor in (*batch.views, batch.label, *batch.draws)} == {CUDA}
        assert (batch.label.dtype, tuple(batch.label.shape)) == (torch.int64, (BATCH,))
        shapes = [(array.dtype, tuple(array.shape)) for array in batch.draws]
        assert shapes == [(torch.float32, (BATCH, 5)), (torch.int64, (BATCH, 7))]
        for spec, view in zip(SPECS, batch.views, strict=True):
            assert (view.dtype, tuple(view.shape)) == (torch.bfloat16, (BATCH, 3, spec.size, spec.size))
            assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["resident", "torchvision"])
def test_nor_with_rotations_gain_and_noise(source: Source, backend: Backend) -> None:
    with fake_cuda.on() as counts:
        loader = loader_of(source, backend, (FOR_ANY_CHANNELS,))
        counts.forget()
        (view,) = next(loader).views
        one_copy_a_batch(counts, 1)
    assert (view.device, tuple(view.shape)) == (CUDA, (BATCH, 3, 16, 16))


def test_what_torch_does_for_dali_is_one_copy_and_nothing_waits(source: Source) -> None:
    with fake_cuda.on() as counts:
        make = made_by_dali(source)
        counts.forget()
        made, _ = make(0), make(5)
        one_copy_a_batch(counts, 2)
    assert {tensor.device for tensor in (*made.views, *made.along.values())} == {CUDA}
    assert [tuple(view.shape) for view in made.views] == [(BATCH, 3, spec.size, spec.size) for spec in SPECS]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in made.views)


def test_evaluation_views_too(source: Source) -> None:
    plain = (ViewSpec(size=16),)
    with fake_cuda.on() as counts:
        for backend in ("resident", "torchvision"):
            loader = loader_of(source, backend, plain)
            counts.forget()
            next(loader)
            one_copy_a_batch(counts, 1)


def item(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x * float(matrix.sum())


def mask(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return x[matrix[:, 0, 0] > -1e9]


def host_tensor(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x * torch.ones(len(x), 1, 1, 1)


def host_index(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x))]


def second_copy(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x * torch.from_numpy(np.ones((len(x), 1, 1, 1), dtype=np.float32)).to(x.device, non_blocking=True)


@pytest.mark.parametrize("fault", [item, mask, host_tensor, host_index, second_copy])
@pytest.mark.parametrize("backend", ["resident", "dali"])
def test_planted_faults_are_found(
    source: Source, backend: Any, fault: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = row_sums.mixed
    with fake_cuda.on() as counts:
        make = made_by_dali(source) if backend == "dali" else None
        loader = None if make else loader_of(source, backend, SPECS[:1])
        monkeypatch.setattr(finishing.row_sums, "mixed", lambda planes, matrix: right(fault(planes, matrix), matrix))
        counts.forget()
        with pytest.raises((AssertionError, RuntimeError, DataError)):  # noqa: PT012
            batch = make(0) if make else next(loader) if loader else None
            assert batch
            one_copy_a_batch(counts, 1)


def test_a_copy_from_memory_that_is_not_pinned_is_found(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    right = transfer.pack
    monkeypatch.setattr(transfer, "pack", lambda tensors, *, pinned: right(tensors, pinned=not pinned))
    with fake_cuda.on() as counts:
        loader = loader_of(source, "resident", SPECS[:1])
        counts.forget()
        next(loader)
        assert (len(counts.copies), counts.blocking) == (1, 1)


def test_labels_do_not_keep_the_pixels_that_came_with_them(source: Source) -> None:
    with fake_cuda.on():
        batch = next(loader_of(source, "torchvision", SPECS[:1]))
    assert batch.label is not None
    assert batch.label.untyped_storage().nbytes() == 8 * BATCH


def test_what_is_packed_comes_out_as_it_was() -> None:
    generator = np.random.default_rng()
    for _ in range(50):
        groups = list[dict[str, torch.Tensor]]()
        for _ in range(generator.integers(1, 5)):
            dtypes = generator.choice(["float32", "int64", "uint8", "float64"], generator.integers(0, 5))
            shapes = [tuple(generator.integers(0, 6, generator.integers(1, 4))) for _ in dtypes]
            arrays = [generator.integers(0, 256, shape).astype(d) for shape, d in zip(shapes, dtypes, strict=True)]
            groups.append({str(number): torch.from_numpy(array) for number, array in enumerate(arrays)})
        if not any(groups):
            continue
        back = transfer.unpack(transfer.pack(groups, pinned=False), groups)
        for group, again in zip(groups, back, strict=True):
            assert group.keys() == again.keys()
            assert all(group[name].dtype == again[name].dtype for name in group)
            assert all(torch.equal(group[name], again[name]) for name in group)


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    ((sent,),) = [group.values() for group in transfer.send([{"array": array}], CPU)]
    array[2] = 17
    assert sent.tolist() == [0, 1, 17, 3, 4]


def test_dalis_crops_come_without_brightness_and_contrast_on_a_gpu_alone() -> None:
    both = SPECS[0]
    assert dali.fed_parameters(both, gpu=True) == []
    assert dali.fed_parameters(both, gpu=False) == ["brightness", "contrast"]
    assert dali.fed_parameters(FOR_ANY_CHANNELS, gpu=False) == [], "both follow the rotation"


def test_dali_keeps_no_memory_after_a_probe_or_a_look_at_files(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Given back when the pipeline that took it has ended, and never before."""
    given_back = list[bool]()
    dali.backend.ReleaseUnusedMemory()  # DALI has it, and without a GPU it does nothing
    pipelines = WeakSet[Any]()
    pipeline, right = Dali._pipeline, Dali._release

    def noted(self: Dali, feed: Any) -> Any:
        made = pipeline(self, feed)
        pipelines.add(made)
        return made

    def release(self: Dali) -> None:
        given_back.append(not pipelines)
        right(self)

    monkeypatch.setattr(Dali, "_pipeline", noted)
    monkeypatch.setattr(Dali, "_release", release)
    assert len(list(evaluation_loader(source, "dali", ViewSpec(size=8), batch_size=5))) == 4
    assert given_back == [True], "once, after the pipeline's end"
    loader = training_loader(source, "dali", SPECS[:1])
    next(loader)
    loader.close()
    assert given_back == [True, True], "a run that goes on takes it again"
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    files = by_path([tmp_path / "a.png"])
    backend = Dali(files, [ViewSpec(size=8)], max_per_rank=1, device=CPU, num_threads=1)
    assert backend.unreadable(np.zeros(1, dtype=np.int64)) == {}
    assert given_back[-1], "after its look at the file"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["resident", "torchvision", "dali"])
def test_views_of_a_gpu_are_those_of_the_cpu(source: Source, backend: str) -> None:
    def taken(device: torch.device) -> list[Batch]:
        specs = (*SPECS, FOR_ANY_CHANNELS)
        return take(training_loader(source, backend, specs, threads=1, draw=draw, device=device), 3)

    for here, there in zip(taken(CPU), taken(CUDA), strict=True):
        assert labels_of(here) == labels_of(there)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.draws, there.draws, strict=True))
        for a, b in zip(here.views, there.views, strict=True):
            off = ((a - b.cpu()).abs() * 255 * 0.225).flatten(1)
            assert off.mean() < (1.0 if backend == "dali" else 0.05)  # levels; a solarized pixel may flip


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [TorchVision, Resident])
def test_no_synchronizing_call_in_a_batch(source: Source, kind: Any) -> None:
    specs = (*SPECS, FOR_ANY_CHANNELS)
    backend = kind(source, specs, device=CUDA, num_threads=0)
    order = Shuffled(num_samples=18, batch_size=BATCH, seed=3)
    stream = backend.stream(Planner(order=order, specs=specs, seed=3), 0)
    next(stream)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(stream)
    finally:
        torch.cuda.set_sync_debug_mode(before)
