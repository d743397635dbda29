"""Tar shards and tables at addresses: a real web server, bounded copies, and failures that are waited out."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit import containers
from kit.errors import raises_one_line
from kit.http_server import Server, serving
from kit.image_files import encoded
from kit.loaders import assert_same, take, training_loader
from sslx.data import retries
from sslx.data.config import Config as Reading
from sslx.data.sources import Encoded, Source, build, config, remote
from sslx.data.sources.listing import silent
from sslx.data.sources.shard_cache import ShardCache
from sslx.data.sources.tar import Config, Members
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, MissingInput, StorageError

SPECS = (ViewSpec(size=12, augment=Augment()),)
NUM_SHARDS, PER_SHARD = 4, 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retries, "_named", set[str]())
    monkeypatch.setattr(retries, "_last_said_s", -1e9)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four tar files of six images, with labels."""
    for number in range(NUM_SHARDS):
        members: list[tuple[str, bytes]] = []
        for i in range(PER_SHARD):
            pixels = np.random.default_rng().integers(0, 256, (20, 24, 3), dtype=np.uint8)
            members += [(f"{i}.png", encoded(Image.fromarray(pixels), "PNG")), (f"{i}.cls", str(i % 2).encode())]
        containers.tar(tmp_path / "data" / f"train-{number:03}.tar", members)
    return tmp_path / "data"


@pytest.fixture
def server(shards: Path) -> Generator[Server]:
    with serving(shards) as state:
        yield state


def built(root: str | Path, timeout_s: float = 20.0, say: Callable[[str], None] = silent, **options: Any) -> Source:
    return build(Config(root=Path(root), **options), "pretrain", Reading(timeout_s=timeout_s), say=say)


def read(source: Source) -> list[bytes]:
    assert isinstance(source, Encoded)
    return list(source.files(np.arange(len(source))))


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "sslx" / "shards").glob("*.shard"))


def test_every_form_of_an_address_names_the_same_images(shards: Path, server: Server, tmp_path: Path) -> None:
    local = built(shards)
    address, file = server.address, f"file://{shards}"
    roots = [f"{address}/train-{{000..003}}.tar", f"{address}/train-*.tar", address, file]
    for root in roots:
        source = built(root)
        assert read(source) == read(local)
        assert source.facts.classes == ("0", "1")
        np.testing.assert_array_equal(source.facts.labels, local.facts.labels)
        np.testing.assert_array_equal(source.facts.blocks, local.facts.blocks)
    assert built(roots[0]).where(7) == f"{address}/train-001.tar!1.png"
    assert [server.copies(f"train-{i:03}.tar") for i in range(NUM_SHARDS)] == [1] * NUM_SHARDS, "one copy for all"
    assert len(copies(tmp_path)) == 2 * NUM_SHARDS
    memory: Any = import_module("fsspec").filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    assert read(built("memory://bucket/train-{000..003}.tar")) == read(local)


@pytest.mark.parametrize(("backend", "threads"), [("torchvision", 2), pytest.param("dali", 1, marks=pytest.mark.slow)])
def test_a_server_that_fails_every_third_time_changes_no_batch(
    shards: Path, server: Server, backend: str, threads: int, tmp_path: Path
) -> None:
    """The cache holds two shards of four, so that copies are made all the time, and some are cut."""
    server.fail, server.cut = lambda number: number % 3 == 0, 3
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    lines: list[str] = []
    source = built(f"{server.address}/train-{{000..003}}.tar", say=lines.append, cache_gb=2.5 * largest / 1e9)
    loader = training_loader(source, backend, SPECS, threads=threads, say=lines.append)
    batches = take(loader, 5)
    assert not loader.bad
    loader.close()
    assert_same(batches, take(training_loader(built(shards), backend, SPECS, threads=1), 5))
    assert server.copies("train-000.tar") > 1
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 2.5 * largest
    assert any("slow, since batches take images from up to 32 tar files" in note for note in source.notes)
    waited = [line for line in lines if "cannot be read for now" in line]
    assert 1 <= len(waited) <= 5, "once in half a minute in each process that reads"
    assert all(server.address in line for line in waited), lines


@pytest.mark.parametrize("backend", [pytest.param("torchvision", marks=pytest.mark.slow), "dali"])
def test_a_server_that_is_gone_ends_the_run_in_one_line_and_replaces_no_image(server: Server, backend: str) -> None:
    source = built(f"{server.address}/train-{{000..003}}.tar")
    assert isinstance(source, Encoded)
    assert isinstance(source.reader, Members)
    assert source.reader.cache is not None
    for path in source.reader.cache.folder.glob("*.shard"):
        path.unlink()
    server.fail = lambda _: True
    impatient = replace(source.reader, cache=replace(source.reader.cache, timeout_s=0.5))
    loader = training_loader(replace(source, reader=impatient), backend, SPECS, timeout_s=20.0, threads=1)
    with raises_one_line(StorageError, f"{server.address}/train-", "--data.timeout-s 0.5", "--resume auto") as raised:
        take(loader, 2)
    assert isinstance(raised.value, StorageError)
    assert raised.value.topic == "no data came"
    assert not loader.bad


def test_copies_used_longest_ago_give_way_but_none_in_use(shards: Path, server: Server, tmp_path: Path) -> None:
    addresses = [f"{server.address}/train-{i:03}.tar" for i in range(NUM_SHARDS)]
    stamps = remote.stamps_of(addresses, "--source.root", 5.0)
    largest = max(size for size, _ in stamps)
    cache = ShardCache(tmp_path / "copies", int(2.5 * largest), 5.0)

    def kept() -> list[int]:
        wholes = [path.read_bytes() for path in (tmp_path / "copies").glob("*.shard")]
        return [i for i in range(NUM_SHARDS) if (shards / f"train-{i:03}.tar").read_bytes() in wholes]

    def use(i: int, age_s: float) -> None:
        with cache.opened(addresses[i], stamps[i]) as descriptor:
            os.utime(descriptor, (0, time.time() - age_s))

    use(0, 30)
    use(1, 20)
    use(0, 10)
    assert kept() == [0, 1]
    use(2, 5)
    assert kept() == [0, 2], "1 was used longest ago"
    with cache.opened(addresses[0], stamps[0]):
        use(3, 1)
        assert kept() == [0, 3], "0 is in use"
        with cache.opened(addresses[3], stamps[3]):
            hurried = ShardCache(cache.folder, cache.max_bytes, 0.3)
            with raises_one_line(StorageError, "0.3 s", "all shards there are being read", "--source.cache-gb"):
                hurried.opened(addresses[1], stamps[1]).__enter__()
    use(1, 0)
    with raises_one_line(ConfigError, "train-000.tar has", "--source.cache-gb", "give more"):
        ShardCache(tmp_path / "others", largest // 2, 1.0).opened(addresses[0], stamps[0]).__enter__()
    assert not [*cache.folder.glob("*.part")]


def _read_all(address: str, cache: ShardCache, stamp: tuple[int, int]) -> bytes:
    with cache.opened(address, stamp) as descriptor:
        return os.pread(descriptor, stamp[0], 0)


@pytest.mark.slow
def test_processes_copy_once_and_a_killed_one_leaves_nothing_in_the_way(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    address = f"{server.address}/train-000.tar"
    whole = (shards / "train-000.tar").read_bytes()
    (stamp,) = remote.stamps_of([address], "--source.root", 5.0)
    cache = ShardCache(tmp_path / "copies", 10 * stamp[0], 5.0)
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        assert pool.starmap(_read_all, [(address, cache, stamp)] * 8, chunksize=1) == [whole] * 8
    assert server.copies("train-000.tar") == 1
    other = f"{server.address}/train-001.tar"
    (stamp,) = remote.stamps_of([other], "--source.root", 5.0)
    server.fail = lambda _: server.requests[-1].startswith("GET")  # so that it is killed in the middle of its copy
    victim = context.Process(target=_read_all, args=(other, cache, stamp))
    victim.start()
    while not [*cache.folder.glob("*.part")]:
        time.sleep(0.005)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    server.fail = None
    small = ShardCache(cache.folder, int(1.5 * stamp[0]), 5.0)
    third = f"{server.address}/train-002.tar"
    assert _read_all(third, small, remote.stamps_of([third], "", 5.0)[0]) == (shards / "train-002.tar").read_bytes()
    assert not [*cache.folder.glob("*.part")]


def test_a_shard_that_changes_or_goes_is_named_for_each_image(shards: Path, server: Server) -> None:
    """The cache holds one shard, the one that was read last."""
    server.etag = "one"
    source = built(f"{server.address}/train-{{000..003}}.tar", cache_gb=3e-5)
    assert isinstance(source, Encoded)
    source.files(np.array([0]))
    server.etag = "two"
    (shards / "train-002.tar").unlink()
    lines: list[str] = []
    loader = training_loader(source, "torchvision", SPECS, threads=0, max_bad=0.9, say=lines.append)
    take(loader, 8)
    assert len(loader.bad) == 18
    assert any("has changed since it was indexed" in line for line in lines)
    assert any("its file is not there any more" in line for line in lines)


def test_what_cannot_be_reached_is_one_line(server: Server, tmp_path: Path) -> None:
    for root, kind, words in (
        ("nosuch://bucket/x.tar", ConfigError, ("nosuch://bucket/x.tar", "unknown scheme, nosuch")),
        ("s3://bucket/x.tar", ConfigError, ("s3://bucket/x.tar", "s3fs")),
        (f"{server.address}/train-{{000..005}}.tar", MissingInput, ("2 of the 6 files", "train-004.tar")),
        (f"{server.address}/none-*.tar", MissingInput, ("names no .tar file",)),
        (f"file://{tmp_path}/nothing", MissingInput, ("names no .tar file",)),
        ("http://no.such.host.invalid/x.tar", MissingInput, ("cannot be read", "no.such.host.invalid")),
    ):
        with raises_one_line(kind, *words):
            built(root, timeout_s=2.0)
    server.fail = lambda _: True
    with raises_one_line(StorageError, "train-000.tar", "--data.timeout-s 0.2"):
        built(f"{server.address}/train-000.tar", timeout_s=0.2)
    server.fail = None
    (tmp_path / "file").write_text("x")
    with raises_one_line(StorageError, "cannot be copied to", "--source.cache"):
        built(f"{server.address}/train-000.tar", cache=tmp_path / "file")
    with raises_one_line(ConfigError, "--source.cache-gb must be above 0"):
        Config(root=Path("x"), cache_gb=0)


def test_tables_at_addresses(shards: Path, server: Server) -> None:
    images = read(built(shards))
    containers.parquet(shards / "x.parquet", {"image": images, "label": [i % 3 for i in range(24)]})
    kind: Any = config("parquet")
    local = build(kind(root=shards / "x.parquet"), "pretrain")
    server.fail = lambda number: number % 3 == 0
    for root in (f"{server.address}/x.parquet", f"file://{shards}/x.parquet"):
        source = build(kind(root=Path(root)), "pretrain", Reading(timeout_s=20.0))
        assert read(source) == images
        np.testing.assert_array_equal(source.facts.labels, local.facts.labels)
    with raises_one_line(ConfigError, "write it as Parquet"):
        build(kind(root=Path(f"{server.address}/x.arrow")), "pretrain")
    with raises_one_line(MissingInput, "y.parquet"):
        build(kind(root=Path(f"{server.address}/y.parquet")), "pretrain", Reading(timeout_s=2.0))
