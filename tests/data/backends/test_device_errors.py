"""Errors of a GPU in the loader: what they are, on every backend, and never the images' fault."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.errors import raises_one_line
from kit.loaders import Backend, every_backend, training_loader
from kit.sources import by_path
from sslx.cli import EXIT_CRASH
from sslx.data import Loader, quarantine, transfer
from sslx.data.backends import dali
from sslx.data.backends.dali import Dali
from sslx.data.codecs.headers import Unreadable
from sslx.data.quarantine import Quarantine
from sslx.data.sources import Files, Source
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, DataError, DeviceError, StorageError, UserError
from sslx.machine import device_errors
from sslx.train import launch
from sslx.train.pretrain import Position

SPECS = (ViewSpec(size=16, augment=Augment()),)
MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.35 GiB. GPU 0 has a total capacity of 79.1 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Error in MIXED operator `nvidia.dali.fn.decoders.image`:\nCUDA allocation failed\n"),
    RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),
    MemoryError("CUDA allocation failed"),
)
FAILURES = (
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
    RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered"),
    RuntimeError("CUDA driver API error CUDA_ERROR_ECC_UNCORRECTABLE (214):\nuncorrectable ECC error encountered"),
)
OTHERS = (
    RuntimeError("Failed to decode sample #3 from source 'CUDA/1.jpg': nvjpeg_cuda_decoder, libjpeg-turbo: cut file"),
    RuntimeError("an unreadable image"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    ValueError("CUDA error: not an error of torch or DALI"),
    Unreadable("a JPEG that cannot be decoded: CUDA error: a comment in it"),
)


def loader_of(source: Source, backend: Backend, said: list[str]) -> Loader:
    return training_loader(source, backend, SPECS, max_bad=0.9, say=said.append)


def failing(error: BaseException) -> Callable[..., Any]:
    """In the place of device code: raises at each call, as a sticky error does."""

    def called(*_: Any, **__: Any) -> Any:
        raise error

    return called


@pytest.mark.parametrize("error", [*MEMORY, *FAILURES], ids=lambda error: f"{type(error).__name__} {error}"[:60])
@every_backend
def test_an_error_of_the_device_is_what_it_is(
    files: Files, backend: Backend, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    loader = loader_of(files, backend, said)
    next(loader)
    monkeypatch.setattr(transfer.Staged, "send", failing(error))
    kind = torch.OutOfMemoryError if error in MEMORY else torch.AcceleratorError
    with pytest.raises(kind) as caught:
        next(loader)
    assert not isinstance(caught.value, UserError)
    assert loader.bad == {}
    assert said == []
    words, code = launch.explain(caught.value, Position()) or ("", 0)
    assert "\n" not in words
    if error in MEMORY:
        assert code == ConfigError.exit_code == 64
        assert words.startswith("out of GPU memory: use a smaller --batch-size")
    else:
        assert code == DeviceError.exit_code not in (EXIT_CRASH, ConfigError.exit_code, DataError.exit_code)
        assert "--resume auto" in words
        assert "encountered" in words


@pytest.mark.parametrize("error", [MEMORY[2], FAILURES[1]], ids=["memory", "failure"])
def test_within_dalis_own_graph_too(files: Files, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DALI's threads, which make of it a RuntimeError of their own words."""
    monkeypatch.setattr(dali, "crop_boxes", failing(error))
    said: list[str] = []
    loader = loader_of(files, "dali", said)
    with pytest.raises(torch.OutOfMemoryError if error in MEMORY else torch.AcceleratorError) as caught:
        next(loader)
    assert "CUDA" in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert (loader.bad, said) == ({}, [])


def test_and_where_files_are_looked_at_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is a decoder's, so files are tried; what fails then is the device."""
    sticky = failing(FAILURES[1])
    monkeypatch.setattr(dali, "crop_boxes", failing(RuntimeError("a decoder failed")))
    tried = Dali._refusal

    def refusal(self: Dali, files: Any) -> Any:
        monkeypatch.setattr(dali, "crop_boxes", sticky)
        return tried(self, files)

    monkeypatch.setattr(Dali, "_refusal", refusal)
    loader = loader_of(files, "dali", [])
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        next(loader)
    assert loader.bad == {}


def test_a_dali_that_decodes_nothing_blames_no_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    built = [0]
    pipeline = Dali._pipeline

    def counted(self: Dali, feed: Any) -> Any:
        built[0] += 1
        return pipeline(self, feed)

    monkeypatch.setattr(Dali, "_pipeline", counted)
    monkeypatch.setattr(dali, "crop_boxes", failing(RuntimeError("a decoder failed")))
    loader = loader_of(files, "dali", [])
    with pytest.raises(RuntimeError, match=r"cannot decode even an image made by sslx: .*a decoder failed"):
        next(loader)
    assert loader.bad == {}
    assert built[0] <= 3, "the batch, its files again, sslx's own image"


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: f"{type(error).__name__} {error}"[:60])
def test_what_is_no_error_of_the_device_is_not_taken_for_one(error: BaseException) -> None:
    assert device_errors.find(error) is None
    assert device_errors.explain(error) is None


def test_the_cause_of_an_error_counts() -> None:
    error = RuntimeError("the pipeline is no longer valid")
    error.__cause__ = MEMORY[3]
    assert isinstance(device_errors.find(error), torch.OutOfMemoryError)
    for known in (MEMORY[0], FAILURES[0]):
        assert device_errors.find(known) is known


class Gone:
    """A reader to which most images are gone; counts how often it was asked."""

    def __init__(self, is_gone: Callable[[int], bool]) -> None:
        self.is_gone, self.calls = is_gone, 0

    def unreadable(self, index: Any) -> dict[int, str]:
        self.calls += 1
        return {int(i): "No such file or directory" for i in index if self.is_gone(int(i))}


@pytest.fixture(scope="module")
def big() -> Source:
    return by_path([f"/x/{i}.jpg" for i in range(100_000)], size=224)


def test_the_search_for_a_stand_in_ends(big: Source) -> None:
    reader = Gone(lambda _: True)
    with raises_one_line(DataError, "none of 100 images tried in place of /x/", ".jpg"):
        Quarantine(big, reader, 0.01, lambda _: None).search(np.arange(512))
    assert reader.calls <= quarantine._CANDIDATES + 1


def test_images_that_are_all_gone_at_once_are_the_mounts_fault(big: Source) -> None:
    said: list[str] = []
    reader = Gone(lambda _: True)
    found = Quarantine(big, reader, 0.01, said.append)
    found.known_good = np.array([700])
    with pytest.raises(StorageError, match=r"none of 512 images can be read, nor /x/700\.jpg, which was read before"):
        found.search(np.arange(512))
    assert (found.bad, said, reader.calls) == ({}, [], 2)


def test_a_batch_of_damaged_images_beside_a_good_one_is_just_that(big: Source) -> None:
    found = Quarantine(big, Gone(lambda i: i < 6), 0.01, lambda _: None)
    found.known_good = np.array([700])
    assert found.search(np.arange(6))
    assert sorted(found.bad) == list(range(6))
    assert (found.substitute(np.arange(6)) >= 6).all()


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_mount_that_goes_away(files: Files, backend: Backend) -> None:
    said: list[str] = []
    loader = loader_of(files, backend, said)
    batch = next(loader)
    loader.close()
    shutil.rmtree(Path(files.paths[0]).parents[1])
    with pytest.raises(StorageError, match="which was read before") as caught:  # after what was read ahead
        list(islice(loader, 10))
    assert files.paths[int(batch.index[-1])] in str(caught.value)
    assert (loader.bad, said) == ({}, [])
