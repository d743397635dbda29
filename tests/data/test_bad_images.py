"""Unreadable images: replaced by a stand-in that depends on the sample alone, counted, named, and at most a share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.errors import raises_one_line
from kit.loaders import Backend, assert_same, evaluation_loader, every_backend, joined, labels_of, take, training_loader
from sslx.data import Loader
from sslx.data.batch import Batch
from sslx.data.sources import Files, Source
from sslx.data.views import Augment, ViewSpec, eval_view
from sslx.errors import DataError

SPECS = (ViewSpec(size=32, augment=Augment(hue=0, gray=0, blur=0)),)
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>nothing here</body></html>"
DAMAGE = ("half", "twenty bytes", "no end", "empty", "page", "flipped", "gone")
KINDS = [(kind, suffix) for kind in DAMAGE for suffix in (".jpg", ".png")]
KINDS.remove(("flipped", ".jpg"))  # a JPEG with wrong bytes is a picture with wrong pixels
all_but_resident = pytest.mark.parametrize("backend", ["dali", "torchvision"])


def damage(path: str, kind: str) -> None:
    file = Path(path)
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = bytes(255 - byte for byte in content[middle : middle + 40])
    damaged = {"half": content[:middle], "twenty bytes": content[:20], "no end": content[:-60], "empty": b""}
    damaged |= {"page": HTML, "flipped": content[:middle] + flipped + content[middle + 40 :]}
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged[kind])


def train(source: Source, backend: str, **options: Any) -> Loader:
    return training_loader(source, backend, SPECS, **{"batch_size": 13, "max_bad": 0.5, **options})


def read_from(*batches: Batch) -> dict[int, int]:
    """Sample -> the file that its views were made from."""
    return dict(pair for batch in batches for pair in zip(batch.index.tolist(), labels_of(batch), strict=True))


@every_backend
@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_every_damage_is_found(files: Files, backend: Backend, kind: str, suffix: str) -> None:
    number = [path.endswith(suffix) for path in files.paths].index(True, 5)
    path = files.paths[number]
    damage(path, kind)
    some = files.take(np.array([number - 1, number, number + 1]))
    said: list[str] = []
    loader = evaluation_loader(some, backend, eval_view(16), max_bad=0.5, say=said.append)
    (batch,) = list(loader)
    assert batch.index.tolist() == [0, 1, 2]
    assert loader.bad == {1: path}
    assert len(said) == 1
    assert path in said[0]
    assert "\n" not in said[0]
    stand_in = {number - 1: 0, number + 1: 2}[read_from(batch)[1]]
    assert torch.equal(batch.views[0][1], batch.views[0][stand_in])


def test_all_other_samples_stay_as_they_were(files: Files) -> None:
    """Two epochs of both backends, five kinds of damage: only the five samples differ, and alike."""
    bad = [2, 7, 8, 15, 21]
    clean: dict[str, list[Batch]] = {name: take(train(files, name), 4) for name in ("dali", "torchvision")}
    for number, kind in zip(bad, ("half", "page", "twenty bytes", "empty", "gone"), strict=True):
        damage(files.paths[number], kind)
    stand_ins: list[dict[int, int]] = []
    for name, before in clean.items():
        said: list[str] = []
        loader = train(files, name, say=said.append)
        after = take(loader, 4)
        assert loader.bad == {number: files.paths[number] for number in bad}
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


@every_backend
def test_other_world_sizes_and_restarts_take_the_same_stand_ins(files: Files, backend: Backend) -> None:
    for number in (2, 7, 15):
        damage(files.paths[number], "half")
    loader = train(files, backend, batch_size=12)
    one = take(loader, 4)
    ranks = [train(files, backend, batch_size=12, rank=rank, world_size=3) for rank in range(3)]
    assert_same([joined(shares) for shares in zip(*(take(rank, 4) for rank in ranks), strict=True)], one)
    assert {index: path for rank in ranks for index, path in rank.bad.items()} == loader.bad
    resumed = train(files, backend, batch_size=12)
    resumed.load_state_dict({"seed": 3, "epoch": 1, "position": 12, "num_samples": 26})
    assert_same(take(resumed, 1), one[3:])


@all_but_resident
def test_files_that_vanish_while_training(files: Files, backend: Backend) -> None:
    """Also the stand-in of another one: then both get a new one."""
    loader = train(files, backend)
    take(loader, 4)  # two epochs; the loader may have prefetched from the next
    loader.close()
    damage(files.paths[5], "gone")
    stand_in = read_from(*take(loader, 2))[5]
    assert stand_in != 5
    loader.close()
    damage(files.paths[stand_in], "gone")
    fourth = take(loader, 2)
    assert sorted(loader.bad) == sorted([5, stand_in])
    read = read_from(*fourth)
    assert not {read[5], read[stand_in]} & {5, stand_in}
    assert sorted(read) == list(range(26))
    fresh = train(files, backend)  # which meets both at once, and comes to the same
    fresh.load_state_dict({"seed": 3, "epoch": 3, "position": 0, "num_samples": 26})
    assert_same(take(fresh, 2), fourth)


@all_but_resident
def test_a_file_that_vanishes_under_a_running_stream(files: Files, backend: Backend) -> None:
    loader = train(files, backend)
    next(loader)
    damage(files.paths[5], "gone")
    batches = take(loader, 7)
    assert loader.bad == {5: files.paths[5]}
    assert read_from(*batches[-2:])[5] != 5


@every_backend
def test_evaluation_replaces_them_too(files: Files, backend: Backend) -> None:
    before = list(evaluation_loader(files, backend, eval_view(16)))
    damage(files.paths[9], "page")
    damage(files.paths[25], "half")
    seen: list[int] = []
    found: dict[int, str] = {}
    for rank in range(2):
        loader = evaluation_loader(files, backend, eval_view(16), max_bad=0.1, rank=rank, world_size=2)
        for batch in loader:
            seen += batch.index.tolist()
            for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                assert torch.equal(view, before[i // 4].views[0][i % 4]) == (i not in (9, 25))
        found |= loader.bad
    assert sorted(seen) == list(range(26))
    assert found == {9: files.paths[9], 25: files.paths[25]}


@every_backend
def test_too_many_end_the_run(files: Files, backend: Backend) -> None:
    for number in (4, 11, 17):
        damage(files.paths[number], "twenty bytes")
    words = "3 of 26 images are unreadable, more than the share 0.1 ", "--data.max-bad"
    with raises_one_line(DataError, *words) as caught:
        next(train(files, backend, max_bad=0.1, batch_size=26))
    assert any(path in str(caught.value) for path in files.paths)
    loader = train(files, backend, max_bad=3 / 26, batch_size=26)
    next(loader)
    assert sorted(loader.bad) == [4, 11, 17]


def test_one_of_a_few_images_ends_no_run(files: Files) -> None:
    """1 of 26 is more than the share 0.01, and nothing that a user would end a run for."""
    damage(files.paths[3], "empty")
    loader = train(files, "torchvision", max_bad=0.01)
    take(loader, 4)
    assert list(loader.bad) == [3]
    with pytest.raises(DataError, match="1 of 26 images are unreadable"):
        take(train(files, "torchvision", max_bad=0.0), 4)
    damage(files.paths[7], "empty")
    with pytest.raises(DataError, match="2 of 26 images are unreadable"):
        take(loader, 4)


@every_backend
def test_nothing_left_to_read_ends_the_run(files: Files, backend: Backend) -> None:
    for path in files.paths[:3]:
        damage(path, "empty")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        next(train(files.take(np.arange(3)), backend, max_bad=1.0, batch_size=3))
