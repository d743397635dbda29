"""One table of pixel formats: every kind of file is the picture that it was made from, or refused, on every backend."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.image_files import SIDE, Array, all_kinds, encoded, png, smooth, tiff
from kit.processes import Record
from kit.sources import by_path, folder, paths_of
from sslx.data import Config, evaluation, sources
from sslx.data.codecs import formats, headers, levels
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import Files
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import ConfigError

CPU = torch.device("cpu")
BACKENDS = ("dali", "torchvision", "resident")


def test_every_kind_is_the_picture_it_was_made_from_or_refused_on_every_backend(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], record_property: Record
) -> None:
    kinds = all_kinds()
    for name, (content, _) in kinds.items():
        (tmp_path / name).write_bytes(content)
    names = sorted(kinds)
    source = by_path([tmp_path / name for name in names], size=SIDE)
    spec = ViewSpec(size=SIDE, augment=None, center=1.0, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    refused = {name for name, (_, expected) in kinds.items() if isinstance(expected, str)}
    lines: list[list[str]] = []
    for backend in BACKENDS:
        said: list[str] = []
        config = Config(backend=backend, threads=int(backend == "dali"), max_bad=1.0)
        arguments: dict[str, Any] = {
            "batch_size": 32,
            "ranks": Ranks(device=CPU),
            "dtype": torch.float32,
            "say": said.append,
        }
        loader = evaluation(config, source, spec, **arguments)
        views: dict[str, Array] = {}
        for batch in loader:
            for i, view in zip(batch.index.tolist(), batch.views[0], strict=True):
                views[names[i]] = view.permute(1, 2, 0).numpy()
        assert {names[i] for i in loader.bad} == refused, backend
        lines.append(sorted(line.split(": replaced")[0] for line in said))
        for name, (_, expected) in kinds.items():
            if isinstance(expected, str):
                continue
            error = np.abs(views[name] - expected.astype(np.float32))
            allowed = (3.0, 12.0) if name.startswith("jpegs") else (0.51, 1.01)
            assert (error.mean(), error.max()) < allowed, f"{backend} {name}: {error.mean():.1f}, {error.max():.1f}"
    assert lines[0] == lines[1] == lines[2]
    record_property("figure", f"{len(kinds)} kinds, of which {len(refused)} refused in the same words by 3 backends")
    assert "[ERROR]" not in capfd.readouterr().err  # DALI's own lines, with escape sequences
    for line in lines[0]:
        name = next(name for name in refused if f"{tmp_path / name} (" in line)
        assert "\n" not in line
        reason = kinds[name][1]
        assert isinstance(reason, str)
        assert any(word in line.split(" (", 1)[1] for word in reason.split("|")), line


# ---- the range that a file does not state


def folder_of(root: Path, images: dict[str, bytes]) -> Path:
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def twelve_bits(rng: np.random.Generator, top: int = 4095) -> Array:
    values = rng.integers(0, top + 1, (SIDE, SIDE, 1)).astype(np.uint16)
    values[0, :2, 0] = 0, top
    return values


@pytest.mark.parametrize("backend", BACKENDS)
def test_twelve_bits_in_sixteen_keep_their_contrast_and_that_is_said(tmp_path: Path, backend: Any) -> None:
    rng = np.random.default_rng()
    values = [twelve_bits(rng) for _ in range(4)]
    images = {f"{i}.tif": tiff(v) for i, v in enumerate(values[:2])}
    images |= {f"{i}.png": png(v, 16, 0) for i, v in enumerate(values[2:], 2)}
    said: list[str] = []
    config = Config(backend=backend, threads=int(backend == "dali"))
    source = sources.build(folder(folder_of(tmp_path, images)), "pretrain", config, say=said.append)
    assert [line for line in said if "--data.range" in line] == [
        "16-bit images use 0 to 4095: 0 is taken as black, 4095 as white (--data.range LOW HIGH for others)"
    ]
    spec = ViewSpec(size=SIDE, augment=None, center=1.0, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    (batch,) = evaluation(config, source, spec, batch_size=4, ranks=Ranks(device=CPU), dtype=torch.float32)
    for value, view in zip(values, batch.views[0], strict=True):
        expected = np.rint(value[..., 0] / 4095 * 255).astype(np.float32)
        assert np.abs(view.numpy() - expected).max() <= 0.51


def test_a_chosen_range_is_taken_as_it_is_and_nothing_is_said(tmp_path: Path) -> None:
    values = np.array([[[0], [1000], [2000], [3000], [9000]]], dtype=np.uint16)
    said: list[str] = []
    config = Config(range=(1000, 3000))
    source = sources.build(folder(folder_of(tmp_path, {"a.tif": tiff(values)})), "pretrain", config, say=said.append)
    assert formats.read(paths_of(source)[0], source.levels)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert not any("range" in line for line in said)
    for wrong in ((3, 3), (5, 1), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ConfigError, match=r"--data\.range must be two finite numbers"):
            Config(range=wrong)


def test_test_images_are_scaled_as_the_training_images_are(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    images = {f"train/{label}/{i}.tif": tiff(twelve_bits(rng)) for label in "ab" for i in range(3)}
    images |= {f"test/{label}/0.tif": tiff(twelve_bits(rng, top=300)) for label in "ab"}  # dark ones
    config = folder(folder_of(tmp_path, images))
    train = sources.build(config, "train")
    test = sources.build(config, "test", training=train)
    assert isinstance(train, Files)
    assert isinstance(test, Files)
    assert test.levels == train.levels == formats.Levels(measured={"16-bit": (0, 4095)})


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([0, 1023], np.uint16), "16-bit", (0, 1023)),
        (np.array([7, 40000], np.uint16), "16-bit", (0, 65535)),
        (np.array([0, 9], np.uint16), "16-bit", (0, 255)),
        (np.array([-1024, 3071], np.int16), "signed 16-bit", (-1024, 3071)),
        (np.array([0, 255], np.int32), "signed 32-bit", (0, 255)),
        (np.array([0, 2**31 + 5], np.uint32), "32-bit", (0, 2**32 - 1)),
        (np.array([0, 0.9], np.float32), "float", (0, 1)),
        (np.array([0, 200], np.float32), "float", (0, 255)),
        (np.array([-2.5, 7.5], np.float32), "float", (-2.5, 7.5)),
        (np.array([0.25, 0.25], np.float32), "float", (0.25, 1.25)),
    ],
)
def test_what_is_measured(tmp_path: Path, values: Array, kind: str, expected: tuple[float, float]) -> None:
    """A usual range of which more than half is used, or that of the values."""
    (tmp_path / "a.tif").write_bytes(tiff(values.reshape(1, -1, 1)))
    assert levels.measure(by_path([tmp_path / "a.tif"])).measured == {kind: expected}


def test_an_image_that_was_not_measured_is_refused_unless_its_values_say_their_range(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.tif") for i in range(3)]
    for path, top in zip(paths, (4095, 8191, 60000), strict=True):
        Path(path).write_bytes(tiff(np.array([0, top], np.uint16).reshape(1, 2, 1)))
    with pytest.raises(Unreadable, match=r"16-bit values from 0 to 4095.*--data\.range LOW HIGH"):
        formats.read(paths[0], formats.Levels())
    assert formats.read(paths[2], formats.Levels()).max() == 233
    twelve = formats.Levels(measured={"16-bit": (0, 4095)})
    assert formats.read(paths[0], twelve).max() == 255
    for path in paths[1:]:
        with pytest.raises(Unreadable, match="but the other images use 0 to 4095"):
            formats.read(path, twelve)


# ---- what is no regular file, and files that change


def test_what_cannot_be_opened_is_told_and_waits_for_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    reasons = {"pipe": "not a regular file", "folder": "not a regular file", "link": "a link to a file that does not"}
    for name, reason in reasons.items():
        for look in (headers.is_plain, formats.values, formats.kind_of):
            with pytest.raises(Unreadable, match=reason):
                look(str(tmp_path / f"{name}.jpg"))


JUNK = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from sslx.data import Config, training
from sslx.data.facts import Facts
from sslx.data.sources import Files
from sslx.data.views import Augment, ViewSpec
from sslx.distributed import Ranks
root, rng = Path(sys.argv[1]), np.random.default_rng()
paths = [str(root / f"{i:02}.jpg") for i in range(96)]
for i, path in enumerate(paths):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, ("JPEG", "PNG")[i % 2])
def spoil(i, change):
    content = Path(paths[i]).read_bytes()
    Path(paths[i]).write_bytes(change(content))
spoil(10, lambda content: b"<html>not found</html>")
spoil(20, lambda content: content[:20])
spoil(21, lambda content: content[: len(content) // 2])
spoil(30, lambda content: content[:3] + rng.bytes(900))
spoil(31, lambda content: content[:40] + rng.bytes(900))
spoil(40, lambda content: b"GIF89a" + rng.bytes(900))
said = []
config = Config(backend="dali", threads=2, max_bad=0.5)
spec = ViewSpec(size=16, augment=Augment(hue=0, gray=0, blur=0))
source = Files(name="junk", facts=Facts(num_samples=96, size=32), paths=paths)
loader = training(config, source, [spec], batch_size=48, seed=0, ranks=Ranks(device=torch.device("cpu")),
                  dtype=torch.float32, say=said.append)
[next(loader) for _ in range(4)]
assert sorted(loader.bad) == [10, 20, 21, 30, 31, 40], loader.bad
for i in (3, 50, 51, 52):  # known as good images, and no longer
    spoil(i, lambda content: b"<html>not found</html>" if i == 3 else content[: 20 * (i - 48)])
[next(loader) for _ in range(6)]
assert sorted(loader.bad) == [3, 10, 20, 21, 30, 31, 40, 50, 51, 52], loader.bad
assert len(said) == 10, said
print("alive")
"""


def test_no_file_ends_the_process(tmp_path: Path) -> None:
    """Where a parser of DALI 2.4 refuses one image of a batch of 25 or more, it dies by SIGSEGV."""
    command = [sys.executable, "-c", JUNK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_any_bytes_are_read_and_told_in_one_line(tmp_path: Path, backend: Any) -> None:
    rng = np.random.default_rng()
    names = [b"caf\xe9.jpg", b"new\nline.jpg", "日本 \U0001f408.jpg".encode(), b"[bold]'\"%s.jpg", b"x" * 250 + b".jpg"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(encoded(smooth(rng), "JPEG"))
    config = Config(backend=backend, threads=int(backend == "dali"), max_bad=0.5)
    source = sources.build(folder(tmp_path), "pretrain")
    arguments: dict[str, Any] = {"batch_size": 5, "ranks": Ranks(device=CPU), "dtype": torch.float32}
    said: list[str] = []
    loader = evaluation(config, source, ViewSpec(size=16), **arguments, say=said.append)
    assert len(next(loader).index) == 5
    assert not loader.bad
    for name in names[:2]:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"no image")
    loader = evaluation(config, source, ViewSpec(size=16), **arguments, say=said.append)
    next(loader)
    assert len(said) == 2
    assert any("caf\\xe9.jpg (not an image" in line for line in said)
    assert any("new\\nline.jpg (not an image" in line for line in said)
    assert all(line.isprintable() for line in said)
