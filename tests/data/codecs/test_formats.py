"""One table of pixel formats: every kind of file is the picture that it was made from, or refused, on every backend."""

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kit.image_files import SIDE, Array, all_kinds, encoded, png, smooth, tiff
from kit.loaders import AS_STORED, BACKENDS, Backend, evaluation_loader, every_backend, take, training_loader
from kit.processes import Record
from kit.rare_files import rare_kinds
from kit.sources import by_path, folder, paths_of
from sslx.data import Config, sources
from sslx.data.codecs import formats, headers, levels
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import Files
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError

WHOLE = ViewSpec(size=SIDE, augment=None, center=1.0, **AS_STORED)
"""The central square of an image of ``kit.image_files``, pixel by pixel."""


def test_every_kind_is_the_picture_it_was_made_from_or_refused_on_every_backend(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], record_property: Record
) -> None:
    kinds = all_kinds() | rare_kinds()
    for name, (content, _) in kinds.items():
        (tmp_path / name).write_bytes(content)
    names = sorted(kinds)
    source = by_path([tmp_path / name for name in names], size=SIDE)
    refused = {name for name, (_, expected) in kinds.items() if isinstance(expected, str)}
    lines: list[list[str]] = []
    views: dict[str, dict[str, Array]] = {}
    for backend in BACKENDS:
        said: list[str] = []
        loader = evaluation_loader(source, backend, WHOLE, batch_size=32, max_bad=1.0, say=said.append)
        pictures = torch.cat([batch.views[0] for batch in loader]).permute(0, 2, 3, 1).numpy()
        views[backend] = dict(zip(names, pictures, strict=True))
        assert {names[i] for i in loader.bad} == refused, backend
        lines.append(sorted(line.split(": replaced")[0] for line in said))
        for name, (_, expected) in kinds.items():
            if isinstance(expected, str):
                continue
            error = np.abs(views[backend][name] - central_square(expected))
            mean, most = (3.0, 12.0) if "jpegs" in name or "lossy" in name else (0.51, 1.01)
            assert error.mean() < mean, f"{backend} {name}: {error.mean():.1f}"
            assert error.max() < most, f"{backend} {name}: {error.max():.1f}"
            assert np.abs(views[backend][name] - views["dali"][name]).max() <= 1.01, f"{backend} {name}"
    assert lines[0] == lines[1] == lines[2]
    record_property("figure", f"{len(kinds)} kinds, of which {len(refused)} refused in the same words by 3 backends")
    assert "[ERROR]" not in capfd.readouterr().err  # DALI's own lines, with escape sequences
    for line in lines[0]:
        name = next(name for name in refused if f"{tmp_path / name} (" in line)
        assert "\n" not in line
        reason = kinds[name][1]
        assert isinstance(reason, str)
        assert any(word in line.split(" (", 1)[1] for word in reason.split("|")), line


def central_square(picture: Array) -> npt.NDArray[np.float32]:
    top, left = ((side - SIDE) // 2 for side in picture.shape[:2])
    return picture[top : top + SIDE, left : left + SIDE].astype(np.float32)


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


@every_backend
def test_twelve_bits_in_sixteen_keep_their_contrast_and_that_is_said(tmp_path: Path, backend: Backend) -> None:
    rng = np.random.default_rng()
    values = [twelve_bits(rng) for _ in range(4)]
    images = {f"{i}.tif": tiff(v) for i, v in enumerate(values[:2])}
    images |= {f"{i}.png": png(v, 16, 0) for i, v in enumerate(values[2:], 2)}
    said: list[str] = []
    source = sources.build(folder(folder_of(tmp_path, images)), "pretrain", Config(), say=said.append)
    assert [line for line in said if "--data.range" in line] == [
        "16-bit images use 0 to 4095: 0 is taken as black, 4095 as white (--data.range LOW HIGH for others)"
    ]
    (batch,) = evaluation_loader(source, backend, WHOLE)
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


def read_junk(root: Path) -> None:
    """Train where some files are no images, and others cease to be after they have been read."""
    faulthandler.disable()  # which would print a death that is meant
    rng = np.random.default_rng()
    paths = [root / f"{i:02}.jpg" for i in range(96)]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), ("JPEG", "PNG")[i % 2]))

    def spoil(contents: dict[int, bytes]) -> None:
        for i, content in contents.items():
            paths[i].write_bytes(content)

    good = [path.read_bytes() for path in paths]
    page = b"<html>not found</html>"
    spoil({10: page, 20: good[20][:20], 21: good[21][: len(good[21]) // 2], 30: good[30][:3] + rng.bytes(900)})
    spoil({31: good[31][:40] + rng.bytes(900), 40: b"%PDF-1.7" + rng.bytes(900)})
    said: list[str] = []
    specs = [ViewSpec(size=16, augment=Augment(hue=0, gray=0, blur=0))]
    loader = training_loader(by_path(paths), "dali", specs, batch_size=48, threads=2, max_bad=0.5, say=said.append)
    take(loader, 4)
    assert sorted(loader.bad) == [10, 20, 21, 30, 31, 40], loader.bad
    spoil({3: page} | {i: good[i][: 20 * (i - 48)] for i in (50, 51, 52)})  # known as good images, and no longer
    take(loader, 6)
    assert sorted(loader.bad) == [3, 10, 20, 21, 30, 31, 40, 50, 51, 52], loader.bad
    assert len(said) == 10, said


@pytest.mark.slow
def test_no_file_ends_the_process(tmp_path: Path, ranks: Callable[..., Any]) -> None:
    """Where a parser of DALI 2.4 refuses one image of a batch of 25 or more, it dies by SIGSEGV."""
    ranks(1, read_junk, tmp_path)


@every_backend
def test_names_of_any_bytes_are_read_and_told_in_one_line(tmp_path: Path, backend: Backend) -> None:
    rng = np.random.default_rng()
    names = [b"caf\xe9.jpg", b"new\nline.jpg", "日本 \U0001f408.jpg".encode(), b"[bold]'\"%s.jpg", b"x" * 250 + b".jpg"]
    paths = [tmp_path / os.fsdecode(name) for name in names]
    for path in paths:
        path.write_bytes(encoded(smooth(rng), "JPEG"))
    source = sources.build(folder(tmp_path), "pretrain")
    said: list[str] = []
    for num_bad in (0, 2):
        for path in paths[:num_bad]:
            path.write_bytes(b"no image")
        loader = evaluation_loader(source, backend, ViewSpec(size=16), batch_size=5, max_bad=0.5, say=said.append)
        assert len(next(loader)) == 5
        assert len(loader.bad) == len(said) == num_bad
    assert any("caf\\xe9.jpg (not an image" in line for line in said)
    assert any("new\\nline.jpg (not an image" in line for line in said)
    assert all(line.isprintable() for line in said)
