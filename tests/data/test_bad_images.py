"""Unreadable images: replaced by a stand-in that depends on the sample alone, counted, named, and at most a share."""

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kit.sources import by_path, paths_of
from sslx.data import Config, Loader, evaluation, training
from sslx.data.batch import Batch
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.distributed import Ranks
from sslx.errors import DataError

Backend = Literal["dali", "torchvision"]
CPU = torch.device("cpu")
SPECS = (ViewSpec(size=32, augment=Augment(hue=0, gray=0, blur=0)),)
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>nothing here</body></html>"
DAMAGE = ("half", "twenty bytes", "no end", "empty", "page", "flipped", "gone")
KINDS = [(kind, suffix) for kind in DAMAGE for suffix in (".jpg", ".png")]
KINDS.remove(("flipped", ".jpg"))  # a JPEG with wrong bytes is a picture with wrong pixels
all_backends = pytest.mark.parametrize("backend", ["dali", "torchvision", "resident"])
both_backends = pytest.mark.parametrize("backend", ["dali", "torchvision"])


def damage(path: str, kind: str) -> None:
    file = Path(path)
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = {
        "half": content[:middle],
        "twenty bytes": content[:20],
        "no end": content[:-60],
        "empty": b"",
        "page": HTML,
        "flipped": content[:middle]
        + bytes(255 - byte for byte in content[middle : middle + 40])
        + content[middle + 40 :],
    }
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged[kind])


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Source:
    """26 files of their own, each with its own label, so that a label tells which one was read."""
    shutil.copytree(folder, tmp_path / "images")
    paths = sorted(str(path) for path in (tmp_path / "images").rglob("*.*"))
    return by_path(paths, np.arange(26))


def train(source: Source, backend: Any, *, max_bad: float = 0.5, **changes: Any) -> Loader:
    config = Config(backend=backend, threads=int(backend == "dali"), max_bad=max_bad)
    where = {name: changes.pop(name) for name in ("rank", "world_size") if name in changes}
    ranks = Ranks(device=CPU, **where)
    arguments: dict[str, Any] = {"batch_size": 13, "seed": 3, "ranks": ranks, "dtype": torch.float32}
    return training(config, source, SPECS, **(arguments | changes))


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]


def read_from(batch: Batch) -> dict[int, int]:
    """Sample -> the file that its views were made from."""
    assert batch.label is not None
    return dict(zip(batch.index.tolist(), batch.label.tolist(), strict=True))


@all_backends
@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_every_damage_is_found(source: Source, backend: Backend, kind: str, suffix: str) -> None:
    number = [path.endswith(suffix) for path in paths_of(source)].index(True, 5)
    some = source.take(np.array([number - 1, number, number + 1]))
    damage(paths_of(some)[1], kind)
    config = Config(backend=backend, threads=int(backend == "dali"), max_bad=0.5)
    said: list[str] = []
    loader = evaluation(
        config, some, eval_view(16), batch_size=3, ranks=Ranks(device=CPU), dtype=torch.float32, say=said.append
    )
    (batch,) = list(loader)
    assert batch.index.tolist() == [0, 1, 2]
    assert loader.bad == {1: paths_of(some)[1]}
    assert len(said) == 1
    assert paths_of(some)[1] in said[0]
    assert "\n" not in said[0]
    stand_in = {number - 1: 0, number + 1: 2}[read_from(batch)[1]]
    assert torch.equal(batch.views[0][1], batch.views[0][stand_in])


def test_all_other_samples_stay_as_they_were(source: Source) -> None:
    """Two epochs of both backends, five kinds of damage: only the five samples differ, and alike."""
    bad = [2, 7, 8, 15, 21]
    clean: dict[str, list[Batch]] = {name: take(train(source, name), 4) for name in ("dali", "torchvision")}
    for number, kind in zip(bad, ("half", "page", "twenty bytes", "empty", "gone"), strict=True):
        damage(paths_of(source)[number], kind)
    stand_ins: list[dict[int, int]] = []
    for name, before in clean.items():
        said: list[str] = []
        loader = train(source, name, say=said.append)
        after = take(loader, 4)
        assert loader.bad == {number: paths_of(source)[number] for number in bad}
        assert sum(any(path in line for line in said) for path in loader.bad.values()) == len(said) == 5
        found: dict[int, int] = {}
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old.index, new.index)
            good = ~torch.isin(new.index, torch.tensor(bad))
            for x, y in zip(old.views, new.views, strict=True):
                assert torch.equal(x[good], y[good])
                assert (x[~good] != y[~good]).flatten(1).any(1).all()
                assert torch.isfinite(y).all()
            changed = {i: file for i, file in read_from(new).items() if i != file}
            assert all(found.setdefault(i, file) == file for i, file in changed.items())
        assert sorted(found) == bad
        assert not set(found.values()) & set(bad)
        stand_ins.append(found)
        clean[name] = after
    assert stand_ins[0] == stand_ins[1]
    for a, b in zip(clean["dali"], clean["torchvision"], strict=True):
        for x, y in zip(a.views, b.views, strict=True):
            assert ((x - y).abs() * 255 * 0.225).mean((1, 2, 3)).max() < 5  # parity has the sharp bounds


@all_backends
def test_other_world_sizes_and_restarts_take_the_same_stand_ins(source: Source, backend: Backend) -> None:
    for number in (2, 7, 15):
        damage(paths_of(source)[number], "half")
    loader = train(source, backend, batch_size=12)
    one = take(loader, 4)
    ranks = [train(source, backend, batch_size=12, rank=rank, world_size=3) for rank in range(3)]
    for whole, shares in zip(one, zip(*(take(rank, 4) for rank in ranks), strict=True), strict=True):
        for number, view in enumerate(whole.views):
            assert torch.equal(torch.cat([share.views[number] for share in shares]), view)
        assert torch.equal(torch.cat([share.label for share in shares]), whole.label)
    every = {index: path for rank in ranks for index, path in rank.bad.items()}
    assert every == loader.bad
    resumed = train(source, backend, batch_size=12)
    resumed.load_state_dict({"seed": 3, "epoch": 1, "position": 12, "num_samples": 26})
    for x, y in zip(next(resumed).views, one[3].views, strict=True):
        assert torch.equal(x, y)


@both_backends
def test_files_that_vanish_while_training(source: Source, backend: Backend) -> None:
    """Also the stand-in of another one: then both get a new one."""
    loader = train(source, backend)
    take(loader, 4)  # two epochs; the loader may have prefetched from the next
    loader.close()
    damage(paths_of(source)[5], "gone")
    third = take(loader, 2)
    stand_in = {**read_from(third[0]), **read_from(third[1])}[5]
    assert stand_in != 5
    loader.close()
    damage(paths_of(source)[stand_in], "gone")
    fourth = take(loader, 2)
    assert sorted(loader.bad) == sorted([5, stand_in])
    files = {**read_from(fourth[0]), **read_from(fourth[1])}
    assert files[5] not in (5, stand_in)
    assert files[stand_in] not in (5, stand_in)
    assert sorted(files) == list(range(26))
    fresh = train(source, backend)  # which meets both at once, and comes to the same
    fresh.load_state_dict({"seed": 3, "epoch": 3, "position": 0, "num_samples": 26})
    for a, b in zip(take(fresh, 2), fourth, strict=True):
        assert torch.equal(a.label, b.label)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@both_backends
def test_a_file_that_vanishes_under_a_running_stream(source: Source, backend: Backend) -> None:
    loader = train(source, backend)
    next(loader)
    damage(paths_of(source)[5], "gone")
    batches = take(loader, 7)
    assert loader.bad == {5: paths_of(source)[5]}
    assert read_from(batches[-1]).get(5, read_from(batches[-2]).get(5)) != 5


@all_backends
def test_evaluation_replaces_them_too(source: Source, backend: Backend) -> None:
    config = Config(backend=backend, threads=int(backend == "dali"), max_bad=0.1)
    arguments: dict[str, Any] = {"batch_size": 4, "dtype": torch.float32}
    before = list(evaluation(config, source, eval_view(16), ranks=Ranks(device=CPU), **arguments))
    damage(paths_of(source)[9], "page")
    damage(paths_of(source)[25], "half")
    seen: list[int] = []
    found: dict[int, str] = {}
    for rank in range(2):
        ranks = Ranks(device=CPU, rank=rank, world_size=2)
        loader = evaluation(config, source, eval_view(16), ranks=ranks, **arguments)
        for batch in loader:
            seen += batch.index.tolist()
            for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                assert torch.equal(view, before[i // 4].views[0][i % 4]) == (i not in (9, 25))
        found |= loader.bad
    assert sorted(seen) == list(range(26))
    assert found == {9: paths_of(source)[9], 25: paths_of(source)[25]}


@all_backends
def test_too_many_end_the_run(source: Source, backend: Backend) -> None:
    for number in (4, 11, 17):
        damage(paths_of(source)[number], "twenty bytes")
    with pytest.raises(
        DataError, match=r"3 of 26 images are unreadable, more than the share 0\.1 .*--data\.max-bad"
    ) as caught:
        take(train(source, backend, max_bad=0.1, batch_size=26), 1)
    assert "\n" not in str(caught.value)
    assert any(path in str(caught.value) for path in paths_of(source))
    loader = train(source, backend, max_bad=3 / 26, batch_size=26)
    take(loader, 1)
    assert sorted(loader.bad) == [4, 11, 17]


def test_one_of_a_few_images_ends_no_run(source: Source) -> None:
    """1 of 26 is more than the share 0.01, and nothing that a user would end a run for."""
    damage(paths_of(source)[3], "empty")
    loader = train(source, "torchvision", max_bad=0.01)
    for _ in range(2 * 2):
        next(loader)
    assert list(loader.bad) == [3]
    strict = train(source, "torchvision", max_bad=0.0)
    with pytest.raises(DataError, match="1 of 26 images are unreadable"):
        [next(strict) for _ in range(4)]
    damage(paths_of(source)[7], "empty")
    with pytest.raises(DataError, match="2 of 26 images are unreadable"):
        [next(loader) for _ in range(4)]


@all_backends
def test_nothing_left_to_read_ends_the_run(source: Source, backend: Backend) -> None:
    few = source.take(np.arange(3))
    for path in paths_of(few):
        damage(path, "empty")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        take(train(few, backend, max_bad=1.0, batch_size=3), 1)
