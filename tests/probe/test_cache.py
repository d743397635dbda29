"""Features on disk: read as they were written, ignored if damaged, removed when they take too much space."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sslx.data import sources
from sslx.data.sources import digits
from sslx.probe import cache
from sslx.probe.cache import Cache
from sslx.probe.features import Features


def random_features(generator: torch.Generator, num: int = 50, labeled: bool = True) -> Features:
    label = torch.randint(0, 5, (num,), generator=generator) if labeled else None
    return Features(torch.randn(num, 7, generator=generator), label, torch.arange(num))


def same(a: Features, b: Features) -> bool:
    labels = (a.label is None) == (b.label is None) and (a.label is None or torch.equal(a.label, b.label))
    return labels and torch.equal(a.x, b.x) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("labeled", [True, False])
def test_features_are_read_as_they_were_written(tmp_path: Path, generator: torch.Generator, labeled: bool) -> None:
    features = random_features(generator, labeled=labeled)
    kept = Cache(tmp_path / "features", 1.0)
    assert kept.read("a") is None
    assert kept.write("a", features, "of some images") == ""
    read = Cache(tmp_path / "features", 1.0).read("a")
    assert read
    assert same(read, features)
    assert kept.read("b") is None
    assert [path.name for path in kept.folder.iterdir()] == ["a.safetensors"], "nothing half written is left"


def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, generator: torch.Generator) -> None:
    features, kept = random_features(generator), Cache(tmp_path, 1.0)
    kept.write("a", features, "")
    path = tmp_path / "a.safetensors"
    good = path.read_bytes()
    kept.write("b", random_features(generator), "")
    flipped = bytearray(good)
    flipped[-9] ^= 4
    for bad in (b"", good[:-1], good[:40], b"{}" * 100, bytes(flipped), (tmp_path / "b.safetensors").read_bytes()):
        path.write_bytes(bad)
        assert kept.read("a") is None
    kept.write("a", features, "")
    assert path.read_bytes() == good


def test_what_was_unused_for_longest_is_removed_first(tmp_path: Path, generator: torch.Generator) -> None:
    one = random_features(generator)
    num_bytes = 50 * (4 * 7 + 8 + 8)
    kept = Cache(tmp_path, 3.5 * num_bytes / 1e9)
    for i, key in enumerate("abc"):
        kept.write(key, one, "")
        os.utime(tmp_path / f"{key}.safetensors", (i, i))
    assert kept.read("a")
    kept.write("d", one, "")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]
    assert "--probe.cache-gb" in kept.write("e", random_features(generator, 400), "")
    assert kept.read("e") is None
    off = Cache(tmp_path / "none", 0)
    assert off.write("a", one, "") == ""
    assert off.read("a") is None
    assert not off.folder.exists()
    (tmp_path / "file").write_bytes(b"")
    assert "not kept for the next probe" in Cache(tmp_path / "file", 1.0).write("a", one, "")


def test_a_digest_depends_on_weights_their_names_and_buffers(generator: torch.Generator) -> None:
    def encoder() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    first, other = encoder(), encoder()
    other.load_state_dict(first.state_dict())
    assert cache.weights_digest(first) == cache.weights_digest(other)
    digests = {cache.weights_digest(first)}
    for name, tensor in other.state_dict().items():
        old = tensor.clone()
        tensor.add_(1)
        digests.add(cache.weights_digest(other))
        tensor.copy_(old)
        assert cache.weights_digest(other) == cache.weights_digest(first), name
    digests |= {
        cache.weights_digest(first.double()),
        cache.weights_digest(nn.Sequential(first[0], nn.ReLU(), first[1])),
    }
    assert len(digests) == len(other.state_dict()) + 3
    x = torch.randn(4, 6, generator=generator)
    assert cache.digest({"x": x}) != cache.digest({"x": x.reshape(6, 4)})


def test_images_are_told_apart_by_their_identity() -> None:
    train, test = (sources.build(digits.Config(name="digits"), split) for split in ("train", "test"))
    parts = [train.take(np.arange(start, start + 100)) for start in (0, 1, 500)]
    digests = [cache.images_digest(source) for source in (train, test, *parts)]
    assert len(set(digests)) == 5
    again = sources.build(digits.Config(name="digits"), "train")
    assert cache.images_digest(again.take(np.arange(100))) == digests[2]
