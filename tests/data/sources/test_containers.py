"""Lists, tar shards, tables and arrays: the same batches as of the same files in a folder, and every sample once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kit import containers
from kit.containers import KINDS, Kind
from kit.loaders import Backend, assert_same, every_backend, joined, take, training_loader
from sslx.data import Loader
from sslx.data.batch import Batch
from sslx.data.sources import Files, Source, arrays, build
from sslx.data.views import Augment, ViewSpec

SPECS = (ViewSpec(size=24, augment=Augment()), ViewSpec(size=16, augment=Augment(max_scale=0.4)))
every_kind = pytest.mark.parametrize("kind", KINDS)


def train(source: Source, backend: str, specs: tuple[ViewSpec, ...] = SPECS, **settings: Any) -> Loader:
    return training_loader(source, backend, specs, **({"threads": int(backend == "dali")} | settings))


def in_form(kind: Kind, files: Files, folder: Path) -> Source:
    assert files.facts.labels is not None
    return build(containers.written(kind, files.paths, files.facts.labels.tolist(), folder), "pretrain")


def in_blocks(files: Files, source: Source) -> Files:
    """The files in the order of the other source, whose labels they have: 26 classes, one of each image."""
    return replace(files, facts=replace(files.facts, blocks=source.facts.blocks))


@every_kind
@every_backend
def test_batches_are_those_of_the_files_in_a_folder(kind: Kind, backend: Backend, files: Files, tmp_path: Path) -> None:
    source = in_form(kind, files, tmp_path)
    expected = np.arange(0, 26, 5) if kind in ("tar", "arrow") else [0, 5, 10, 14, 19, 24]
    assert kind == "list" or source.facts.blocks is not None
    np.testing.assert_array_equal(source.facts.blocks if kind != "list" else expected, expected)
    assert source.facts.classes == files.facts.classes
    assert_same(take(train(source, backend), 3), take(train(in_blocks(files, source), backend), 3))


@pytest.mark.slow
@every_kind
def test_worker_processes_deliver_the_same_over_several_epochs(kind: Kind, files: Files, tmp_path: Path) -> None:
    source = in_form(kind, files, tmp_path)
    assert_same(take(train(source, "torchvision", threads=3), 14), take(train(source, "torchvision", threads=0), 14))


@every_kind
def test_damaged_images_are_replaced_by_the_same_ones(kind: Kind, files: Files, tmp_path: Path) -> None:
    Path(files.paths[3]).write_bytes(b"")
    Path(files.paths[11]).write_bytes(b"no image")
    Path(files.paths[20]).write_bytes(Path(files.paths[20]).read_bytes()[:200])
    source = in_form(kind, files, tmp_path)
    loader = train(source, "torchvision", max_bad=0.5)
    assert_same(take(loader, 4), take(train(in_blocks(files, source), "torchvision", max_bad=0.5), 4))
    assert sorted(loader.bad) == [3, 11, 20]
    places = {"list": files.paths[11], "tar": "2.tar!011.", "parquet": "0.parquet[11]", "arrow": ".arrow[11]"}
    assert places[kind] in loader.bad[11]


@every_kind
def test_a_restart_delivers_the_rest_of_the_epoch_once(kind: Kind, files: Files, tmp_path: Path) -> None:
    """A loader stops in mid-epoch, and loaders on 1 to 3 ranks go on: 24 of 26 samples an epoch, each once."""
    source = in_form(kind, files, tmp_path)
    specs = (ViewSpec(size=8, augment=Augment()),)
    first = train(source, "torchvision", specs)
    before = take(first, 5)  # of four batches an epoch
    state, again = first.state_dict(), take(first, 3)
    for world_size in (1, 2, 3):
        shares: list[list[Batch]] = []
        for rank in range(world_size):
            loader = train(source, "torchvision", specs, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            shares.append(take(loader, 3))
        assert_same([joined(parts) for parts in zip(*shares, strict=True)], again)
    seen = np.concatenate([batch.index.numpy() for batch in (*before[4:], *again)])
    assert len(np.unique(seen)) == len(seen) == 24
    assert len(np.unique(np.concatenate([batch.index.numpy() for batch in before[:4]]))) == 24


@pytest.mark.parametrize("form", ["nhwc.npy", "keys.npz", "nchw.npy", "gray.npy"])
@every_backend
def test_arrays_are_the_pictures_in_a_folder(form: str, backend: Backend, tmp_path: Path) -> None:
    pixels = np.random.default_rng().integers(0, 256, (20, 18, 22, 3), dtype=np.uint8)
    if form == "gray.npy":
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    paths = [str(tmp_path / f"{i:02}.png") for i in range(20)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    labels = np.random.default_rng().integers(0, 3, 20)
    file = tmp_path / form
    stored: dict[str, npt.NDArray[Any]] = {"nchw.npy": pixels.transpose(0, 3, 1, 2), "gray.npy": pixels[..., 0]}
    if form == "keys.npz":
        np.savez(file, x_train=pixels, y_train=labels[:, None], x_test=pixels[:4], y_test=labels[:4])
    else:
        np.save(file, np.ascontiguousarray(stored.get(form, pixels)))
        np.save(tmp_path / "labels.npy", labels)
    config = arrays.Config(root=file, label="" if form == "keys.npz" else str(tmp_path / "labels.npy"))
    source = build(config, "pretrain")
    assert source.facts.size == 16
    assert source.facts.labels is not None
    expected = np.unique(labels, return_inverse=True)[1]
    files = Files(name="files", facts=replace(source.facts, labels=expected.astype(np.int64)), paths=paths)
    assert_same(take(train(source, backend), 4), take(train(files, backend), 4))
    part = np.array([7, 2, 11, 3, 4, 5, 19, 1, 0])
    assert_same(take(train(source.take(part), backend), 2), take(train(files.take(part), backend), 2))
    if form == "keys.npz":
        assert len(build(config, "test", training=source)) == 4
