"""Kept listings of large folders: every change of names is noticed, damage and strangers' folders are survived."""

import multiprocessing
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import raises_one_line
from kit.sources import folder, noise, paths_of, relative
from sslx.data.sources import build, listing_cache
from sslx.data.sources import list as lists
from sslx.data.sources.listing import Listing, subfolders_and_image
from sslx.data.sources.packed import Packed
from sslx.data.sources.paths import Paths
from sslx.errors import MissingInput

Make = Callable[..., Path]
NAMES = ("a/1.png", "a/2.png", "b/3.png", "b/deep/4.png", "a/notes.txt", "b c/5.png", "\udcff/6.png")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The folders that were listed, in an environment in which the listings of small and new folders are kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_cache, "MIN_ENTRIES", 1)
    monkeypatch.setattr(listing_cache, "_SETTLED_NS", 0)
    folders, scandir = list[str](), os.scandir

    def seen(path: str | int) -> object:
        folders.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", seen)
    return folders


def expected(root: Path) -> list[str]:
    """What a listing finds, found in another way."""
    paths = [os.path.join(root, name) for name in os.listdir(root)]
    below = [path for folder in paths if os.path.isdir(folder) for path in expected(Path(folder))]
    return sorted(below + [path for path in paths if path.endswith(".png")])


def settle() -> None:
    """Wait until a change gets another time than the last one: file systems count in steps of a few milliseconds."""
    time.sleep(0.02)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is added": lambda root: (root / "b" / "deep" / "9.png").write_bytes(b""),
    "a file is removed": lambda root: (root / "b" / "deep" / "4.png").unlink(),
    "a file is renamed": lambda root: (root / "a" / "1.png").rename(root / "a" / "11.png"),
    "a file is moved": lambda root: (root / "a" / "1.png").rename(root / "b" / "1.png"),
    "a folder is added": lambda root: shutil.copytree(root / "a", root / "b" / "deep" / "new"),
    "a folder is removed": lambda root: shutil.rmtree(root / "b" / "deep"),
    "a folder is renamed": lambda root: (root / "b c").rename(root / "d"),
    "two folders change places": lambda root: [
        (root / one).rename(root / other) for one, other in (("a", "x"), ("b", "a"), ("x", "b"))
    ],
    "a folder is replaced and its time set back": lambda root: [
        time_before := (root / "a").stat(),
        (root / "a" / "3.png").write_bytes(b""),
        os.utime(root / "a", ns=(time_before.st_atime_ns, time_before.st_mtime_ns)),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_names_is_noticed(make: Make, listed: list[str], change: str) -> None:
    root = make(*NAMES)
    settle()
    assert list(Listing(root).paths()) == expected(root)
    assert len(listed) == 6
    kept = Listing(root)
    assert list(kept.paths()) == expected(root)
    assert len(listed) == 6
    assert kept.skipped == {".txt": [1, "a/notes.txt"]}
    assert sorted(kept.folders) == ["", "a/", "b c/", "b/", "b/deep/", "\udcff/"]
    settle()
    CHANGES[change](root)
    settle()
    assert list(Listing(root).paths()) == expected(root)
    assert list(Listing(root).paths()) == expected(root)


def test_a_second_start_lists_no_folder_and_is_the_first_one(make: Make, listed: list[str]) -> None:
    root = make(*NAMES[:5], "val/a/7.png", "val/b/8.png")
    settle()
    first = build(folder(root, splits="folders"), "pretrain")
    assert listed
    listed.clear()
    again = build(folder(root, splits="folders"), "pretrain")
    assert [place for place in listed if place.startswith((f"{root}/a/", f"{root}/b/"))] == []
    assert relative(again, root) == relative(first, root) == ["a/1.png", "a/2.png", "b/3.png", "b/deep/4.png"]
    assert (again.notes, again.facts.classes, again.identity()["digest"]) == (
        first.notes,
        first.facts.classes,
        first.identity()["digest"],
    )
    np.testing.assert_array_equal(again.facts.labels, first.facts.labels)
    other = build(folder(root, splits="none"), "pretrain")
    assert len(other) == 6, "other folders held out are another listing"


def test_a_large_flat_folder_is_listed_once(tmp_path: Path, listed: list[str]) -> None:
    root = noise(tmp_path / "images", 5)
    settle()
    assert subfolders_and_image(root) == ([], "000.png")
    listed.clear()
    assert subfolders_and_image(root) == ([], "000.png")
    assert listed == []
    settle()
    (root / "-new").mkdir()
    (root / "000.png").unlink()
    assert subfolders_and_image(root) == ([root / "-new"], "001.png")


def test_a_folder_that_changed_just_now_is_not_kept(
    make: Make, listed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(listing_cache, "_SETTLED_NS", 2_000_000_000)
    root = make(*NAMES)
    Listing(root).paths()
    listed.clear()
    Listing(root).paths()
    assert len(listed) == 6
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_listing_is_made_again(make: Make, listed: list[str], tmp_path: Path, damage: str) -> None:
    root = make(*NAMES)
    settle()
    Listing(root).paths()
    (file,) = (tmp_path / "cache" / "sslx" / "listings").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    file.write_bytes({"cut": whole[:middle], "flipped": flipped}[damage])
    assert list(Listing(root).paths()) == expected(root)
    listed.clear()
    assert list(Listing(root).paths()) == expected(root)
    assert listed == [], "it is whole again"


def test_few_listings_are_kept_and_nowhere_to_keep_them_is_no_error(
    tmp_path: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing_cache, "_MAX_KEPT", 2)
    roots = [noise(tmp_path / name, 2) for name in ("x", "y", "z")]
    settle()
    for root in roots:
        Listing(root).paths()
        settle()
    left = tmp_path / "cache" / "sslx" / "listings"
    assert len([*left.iterdir()]) == 2
    listed.clear()
    for root in reversed(roots):
        Listing(root).paths()
    assert listed == [f"{roots[0]}/"]
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert list(Listing(roots[0]).paths()) == expected(roots[0])


@pytest.mark.slow
@pytest.mark.usefixtures("listed")
def test_several_processes_list_the_same_folder_at_once(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(40):
        (root / f"{i:02}").mkdir(parents=True)
        for j in range(20):
            (root / f"{i:02}" / f"{j:02}.png").touch()
    settle()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    with context.Pool(4, initializer=_start.append, initargs=(start,)) as pool:
        for _ in range(3):
            answers = pool.map(_listed_together, [str(root)] * 4, chunksize=1)
            assert set(answers) == {(800, f"{root}/39/19.png")}
    assert len([*(tmp_path / "cache" / "sslx" / "listings").iterdir()]) == 1, "and no temporary file"


_start: list[Any] = []


def _listed_together(root: str) -> tuple[int, str]:
    _start[0].wait()
    paths = Listing(Path(root)).paths()
    return len(paths), paths[len(paths) - 1]


@pytest.mark.usefixtures("listed")
def test_that_the_files_of_a_list_exist_is_noted_until_a_folder_changes(make: Make) -> None:
    root = make("a/1.png", "b/2.png", "b/3.png")
    file = root / "list.txt"
    file.write_text("a/1.png\nb/2.png\nb/3.png\n")
    settle()
    listdir, asked = os.listdir, list[str]()

    def seen(path: str) -> list[str]:
        asked.extend([path] if str(path).startswith(str(root)) else [])
        return listdir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", seen)
        for count in (2, 2, 2):
            source = build(lists.Config(root=file), "pretrain")
            assert relative(source, root) == ["a/1.png", "b/2.png", "b/3.png"]
            assert len(asked) == count
        settle()
        (root / "b" / "2.png").unlink()
        with raises_one_line(MissingInput, "1 of the 3 images", "b/2.png (line 2)"):
            build(lists.Config(root=file), "pretrain")
        file.write_text("a/1.png\nb/3.png\n")
        assert len(build(lists.Config(root=file), "pretrain")) == 2


def test_paths_take_little_more_than_their_bytes() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    paths = Paths.of((f"/data/images/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(5_000)), "/data/images/")
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert used / 5_000 < 45, "29 to 33 bytes of a name, and 12"
    i = int(np.random.default_rng().integers(5_000))
    assert paths[i] == f"/data/images/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG"
    assert paths[i - 5_000] == paths[i]
    assert list(paths.take(np.array([i, 3, i]))) == [paths[i], paths[3], paths[i]]
    assert paths[5:7] == [paths[5], paths[6]]
    joined = Paths.joined([paths.take(np.arange(3)), Paths.of(["/b/\udcff.png"], "/b/")])
    assert list(joined) == [*paths[:3], "/b/\udcff.png"] == [joined[i] for i in range(4)]
    assert [name for part in joined.below_roots() for name in part][-2:] == [
        b"0/" + os.fsencode(paths[2])[13:],
        b"1/\xff.png",
    ]
    assert list(Packed.of([b"a", None, b""])) == [b"a", None, b""]
    with pytest.raises(IndexError):
        joined[4]


def test_a_source_made_of_a_list_of_paths_keeps_them_packed(make: Make) -> None:
    root = make("a/1.png")
    assert paths_of(build(folder(root), "pretrain")) == [f"{root}/a/1.png"]
