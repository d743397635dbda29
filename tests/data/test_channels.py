"""Images of any number of channels and of 16 bits: views against plain code in fp64, restarts, ranks, refusals."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from kit.errors import raises_one_line
from kit.loaders import assert_same, evaluation_loader, take, training_loader
from kit.sources import by_path, folder
from sslx.data import views
from sslx.data.config import Config as Reading
from sslx.data.facts import RGB, Channels, Facts
from sslx.data.sources import Pixels, Source, arrays, build
from sslx.data.sources import channels as of_sources
from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError, DataError

ANY = Augment(saturation=0.0, hue=0.0, gray=0.0, solarize=0.3, blur=0.7, min_scale=0.2)
FIVE = Channels(num=5, is_rgb=False, dtype="uint16", full_scale=65535)
ONE = Channels(num=1, is_rgb=False)
DEEP_RGB = Channels(dtype="uint16", full_scale=4095)
FLOATS = Channels(num=2, is_rgb=False, dtype="float32", black=-1.5, full_scale=2.5)
MAX_ERROR = 5e-6
"""Of a value from 0 to 1, a third of a step of 16 bits: resizing adds up dozens of products in fp32."""
BACKENDS = pytest.mark.parametrize("backend", ["torchvision", "resident"])


def spec_of(channels: Channels, augment: Augment | None = ANY, **changes: Any) -> ViewSpec:
    """A view whose values are those of the image, from 0 to 1."""
    zeros, ones = (0.0,) * channels.num, (1.0,) * channels.num
    return ViewSpec(size=24, augment=augment, **({"mean": zeros, "std": ones, "channels": channels} | changes))


def in_memory(channels: Channels, number: int = 18) -> Pixels:
    """Smooth images of random colors, whose low bits differ, of different sizes."""
    random, pixels = np.random.default_rng(), np.empty(number, dtype=object)
    low, high = channels.black, channels.full_scale
    for i in range(number):
        height, width = random.integers(30, 60, 2).tolist()
        values = random.uniform(low, high, (height, width, channels.num))
        pixels[i] = (values if channels.dtype == "float32" else np.rint(values)).astype(channels.dtype)
    facts = Facts(num_samples=number, size=24, labels=np.arange(number) % 3, classes=("a", "b", "c"), channels=channels)
    return Pixels(name="bands", facts=facts, pixels=pixels)


def blurred(x: Tensor, sigma: float, window: int) -> Tensor:
    """(C, S, S) in fp64, blurred by a Gaussian that is mirrored at the borders."""
    offset = torch.arange(window, dtype=torch.float64) - window // 2
    taps = torch.exp(-0.5 * (offset / sigma) ** 2)
    taps, half = (taps / taps.sum())[None, None], window // 2
    padded = F.pad(x[:, None], (half, half, half, half), mode="reflect")
    return F.conv2d(F.conv2d(padded, taps[..., None]), taps[..., None, :])[:, 0]


def expected(spec: ViewSpec, image: npt.NDArray[Any], drawn: views.Draw | None, row: int) -> tuple[Tensor, Tensor]:
    """A view (C, S, S) in fp64 by plain code, and where solarizing is not decided by a rounding error."""
    channels = spec.channels
    x = (image.astype(np.float64) - channels.black) / (channels.full_scale - channels.black)
    drawn_values = {} if drawn is None else {name: value for name, value in vars(drawn).items() if value is not None}
    one = drawn and views.Draw(**{name: value[row : row + 1] for name, value in drawn_values.items()})
    top, left, bottom, right = views.boxes(spec, one, [image.shape[0]], [image.shape[1]])[0].tolist()
    crop = torch.from_numpy(x).permute(2, 0, 1)[None, :, top:bottom, left:right]
    x = F.interpolate(crop, (spec.size, spec.size), mode="bilinear", antialias=True)[0]
    decided = torch.ones_like(x, dtype=torch.bool)
    if one is None:
        return x, decided
    x = (x * float(one.brightness[0])).clamp(0, 1)
    luma = torch.tensor([0.299, 0.587, 0.114] if channels.is_rgb else [1 / channels.num] * channels.num).double()
    contrast, gray = float(one.contrast[0]), (x * luma[:, None, None]).sum(0).mean()
    x = (x * contrast + gray * (1 - contrast)).clamp(0, 1)
    if one.blur[0]:
        x = blurred(x, float(one.sigma[0]), int(one.window[0]))
    if one.solarize[0]:
        decided = (x - 128 / 255).abs() > 1e-5
        x = torch.where(x >= 128 / 255, 1 - x, x)
    return x.flip(-1) if one.flip[0] else x, decided.flip(-1) if one.flip[0] else decided


@BACKENDS
@pytest.mark.parametrize("channels", [FIVE, ONE, DEEP_RGB, FLOATS], ids=["five", "one", "rgb", "floats"])
def test_views_are_those_of_plain_code_in_fp64_to_the_last_of_16_bits(channels: Channels, backend: str) -> None:
    source, spec = in_memory(channels), spec_of(channels)
    loader = training_loader(source, backend, [spec, replace(spec, size=32)])
    for batch in take(loader, 2):
        index = batch.index.numpy()
        for number, view in enumerate(batch.views):
            of = replace(spec, size=view.shape[-1])
            drawn = views.draw(of, 3, 0, index, number)
            for row, sample in enumerate(index.tolist()):
                want, decided = expected(of, source.pixels[sample], drawn, row)
                error = (view[row].double() - want).abs()[decided]
                assert float(error.max()) < MAX_ERROR
    plain = spec_of(channels, None)
    for batch in evaluation_loader(source, backend, plain):
        for row, sample in enumerate(batch.index.tolist()):
            want, _ = expected(plain, source.pixels[sample], None, row)
            assert float((batch.views[0][row].double() - want).abs().max()) < MAX_ERROR


@BACKENDS
def test_a_restart_and_two_ranks_give_the_same_bits(backend: str) -> None:
    source, spec = in_memory(FIVE), spec_of(FIVE, mean=(0.4, 0.5, 0.6, 0.5, 0.4), std=(0.2, 0.3, 0.2, 0.3, 0.2))
    whole = training_loader(source, backend, [spec, spec])
    first = take(whole, 2)
    state, rest = whole.state_dict(), take(whole, 4)
    again = training_loader(source, backend, [spec, spec])
    again.load_state_dict(state)
    assert_same(take(again, 4), rest)
    halves = [take(training_loader(source, backend, [spec, spec], rank=r, world_size=2), 2) for r in (0, 1)]
    for number, batch in enumerate(first):
        assert torch.equal(torch.cat([half[number].index for half in halves]), batch.index)
        for view in (0, 1):
            assert torch.equal(torch.cat([half[number].views[view] for half in halves]), batch.views[view])


def test_worker_processes_give_the_same_bits() -> None:
    source, spec = in_memory(FIVE), spec_of(FIVE)
    own, processes = (training_loader(source, "torchvision", [spec], threads=threads) for threads in (0, 2))
    assert_same(take(processes, 3), take(own, 3))
    processes.close()


@BACKENDS
def test_floats_that_are_not_finite_are_unreadable_images(backend: str) -> None:
    source = in_memory(FLOATS)
    source.pixels[4][1, 2, 0] = np.nan
    loader = training_loader(source, backend, [spec_of(FLOATS)], max_bad=0.1)
    assert all(bool(batch.views[0].isfinite().all()) for batch in take(loader, 3))
    assert list(loader.bad) == [4]


def test_a_backend_that_cannot_take_them_names_those_that_can() -> None:
    for channels in (FIVE, ONE, DEEP_RGB):
        with raises_one_line(ConfigError, channels.in_words, "--data.backend torchvision or resident"):
            training_loader(in_memory(channels), "dali", [spec_of(channels)])
        (batch,) = take(training_loader(in_memory(channels), "auto", [spec_of(channels)], threads=0), 1)
        assert batch.views[0].shape == (6, channels.num, 24, 24)


def test_views_of_other_channels_are_refused() -> None:
    with raises_one_line(ConfigError, "expected images with RGB of 8 bits", "bands has 5 channels of 16 bits"):
        training_loader(in_memory(FIVE), "torchvision", [ViewSpec(size=24, augment=Augment())])
    with raises_one_line(ConfigError, "expected images with 5 channels", "bands has 1 channel of 8 bits"):
        evaluation_loader(in_memory(ONE), "resident", spec_of(FIVE, None))


def test_color_operations_are_refused_by_the_flags_to_set() -> None:
    like = spec_of(FIVE, None)
    specs = [ViewSpec(size=24, augment=ANY), ViewSpec(size=24, augment=replace(ANY, hue=0.1, gray=0.2))]
    with raises_one_line(ConfigError, "hue, gray", "5 channels of 16 bits", "add --augment.hue 0 --augment.gray 0"):
        views.for_images(specs, like)
    without = replace(ANY, hue=0.1, saturation=0.4, jitter=0.0)
    assert views.for_images([ViewSpec(size=24, augment=without)], like)[0].channels == FIVE
    assert views.for_images(specs, ViewSpec(size=24)) == tuple(specs), "RGB as ever"


def saved(tmp_path: Path, pixels: npt.NDArray[Any]) -> arrays.Config:
    np.save(tmp_path / "x.npy", pixels)
    return arrays.Config(root=tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("shape", "dtype", "reading", "want", "size"),
    [
        ((7, 20, 30), "uint8", Reading(), RGB, 3),
        ((7, 20, 30), "uint8", Reading(channels=1), ONE, 1),
        ((7, 20, 30), "uint16", Reading(channels=1), Channels(num=1, is_rgb=False, dtype="uint16", full_scale=4095), 1),
        ((7, 20, 30), "uint16", Reading(), DEEP_RGB, 3),
        ((7, 20, 30, 3), "uint16", Reading(range=(7.0, 4000.0)), replace(DEEP_RGB, black=7, full_scale=4000), 3),
        ((7, 20, 30, 5), "uint16", Reading(), replace(FIVE, full_scale=4095), 5),
        ((7, 5, 20, 30), ">u2", Reading(channels=5), replace(FIVE, full_scale=4095), 5),
        ((7, 20, 30, 2), "float32", Reading(), Channels(num=2, is_rgb=False, dtype="float32", full_scale=1), 2),
        ((7, 20, 30, 2), "float32", Reading(range=(-1.5, 2.5)), FLOATS, 2),
    ],
)
def test_arrays_have_the_channels_of_their_shape_or_of_the_flag(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, reading: Reading, want: Channels, size: int
) -> None:
    pixels = np.random.default_rng().integers(0, 256 if dtype == "uint8" else 4096, shape).astype(dtype)
    pixels.flat[0] = 255 if dtype == "uint8" else 4000
    if dtype == "float32":
        pixels /= 4096
    source = build(saved(tmp_path, pixels), "pretrain", reading)
    assert isinstance(source, Pixels)
    assert source.facts.channels == want
    if len(shape) == 3:
        pixels = np.repeat(pixels[..., None], size, axis=-1)
    np.testing.assert_array_equal(source.pixels, np.moveaxis(pixels, 1, 3) if shape[1] == 5 else pixels)


def test_a_number_of_channels_that_arrays_do_not_have_is_refused(tmp_path: Path) -> None:
    config = saved(tmp_path, np.zeros((3, 9, 9, 5), dtype=np.uint16))
    with raises_one_line(ConfigError, "x.npy has images of 5 channels, not 4: leave out --data.channels"):
        build(config, "pretrain", Reading(channels=4))


def png(path: Path, array: npt.NDArray[Any]) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_gray_files_of_16_bits_are_one_channel_of_16_bits(tmp_path: Path) -> None:
    random = np.random.default_rng()
    values = random.integers(0, 4096, (9, 30, 40), dtype=np.uint16)
    values[:, 0, 0] = 4095
    for number, image in enumerate(values):
        png(tmp_path / f"{number}.png", image)
    said = list[str]()
    reading = Reading(channels=1)
    source = build(folder(tmp_path), "pretrain", reading, say=said.append)
    assert source.facts.channels == Channels(num=1, is_rgb=False, dtype="uint16", full_scale=4095)
    assert said[0].startswith("16-bit images use 0 to 4095: 0 is taken as black, 4095 as white (--data.range")
    own = Pixels(name="bands", facts=source.facts, pixels=values[..., None])
    spec = spec_of(source.facts.channels)
    for backend in ("torchvision", "resident"):
        batches = [take(training_loader(images, backend, [spec]), 1) for images in (source, own)]
        assert_same(*batches)
    eight = build(folder(tmp_path), "pretrain", say=said.append)
    assert eight.facts.channels == RGB, "RGB of 8 bits where nothing is said"


def test_files_of_8_bits_stay_plain_or_become_gray_by_pils_luma(tmp_path: Path) -> None:
    colors = np.random.default_rng().integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    paths = [png(tmp_path / f"{number}.png", image) for number, image in enumerate(colors)]
    assert build(folder(tmp_path), "pretrain", Reading(channels=3)).facts.channels == RGB
    gray = build(folder(tmp_path), "pretrain", Reading(channels=1))
    assert gray.facts.channels == ONE
    loader = evaluation_loader(gray, "torchvision", replace(spec_of(ONE, None), size=20))
    (batch,) = take(loader, 1)
    for row, path in enumerate(sorted(paths)):
        want = np.asarray(Image.open(path).convert("L"))
        np.testing.assert_array_equal((batch.views[0][row, 0] * 255).round().numpy(), want)


def bands(path: Path, num: int, dtype: str = "uint16") -> Path:
    """A file of this many channels: the bytes of an NPY, as a reader brings them."""
    pixels = np.random.default_rng().integers(0, 200, (12, 12, num)).astype(dtype)
    np.save(path, pixels / np.float32(256) if dtype == "float32" else pixels)
    return path


class Reader:
    """Files whose bytes a source of one's own brings."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def read(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        return [self.paths[row].read_bytes() for row in rows.tolist()]

    def where(self, row: int) -> str:
        return self.paths[row].name


def encoded(paths: list[Path], channels: Channels) -> Source:
    from sslx.data.sources import Encoded

    return Encoded(name="own", facts=Facts(num_samples=len(paths), size=8, channels=channels), reader=Reader(paths))


def test_mixed_numbers_of_channels_are_one_line_with_counts_and_the_first_of_each(tmp_path: Path) -> None:
    paths = [bands(tmp_path / f"{i}.npy", 4 if i % 4 == 3 else 5) for i in range(12)]
    source = encoded(paths, Channels(num=5, is_rgb=False))
    words = "of 12 images of own 9 have 5 channels, the first of them 0.npy; 3 have 4 channels, the first of them 3.npy"
    with raises_one_line(DataError, "expected images of 5 channels", words, "--data.channels", "--data.exclude"):
        of_sources.settled(source, Reading(), None, print)
    covered = of_sources.settled(source, Reading(max_bad=0.5), None, print)
    assert covered.facts.channels == Channels(num=5, is_rgb=False, dtype="uint16", full_scale=255)
    loader = training_loader(covered, "torchvision", [spec_of(covered.facts.channels)], max_bad=0.5)
    assert len(take(loader, 2)) == 2
    assert set(loader.bad) == {3, 7, 11}


def test_files_of_several_kinds_need_one_range(tmp_path: Path) -> None:
    paths = [bands(tmp_path / f"{i}.npy", 2, "uint16" if i % 2 else "float32") for i in range(6)]
    two = Channels(num=2, is_rgb=False)
    with raises_one_line(DataError, "values of several kinds (16-bit, float)", "--data.range LOW HIGH"):
        of_sources.settled(encoded(paths, two), Reading(), None, print)
    source = of_sources.settled(encoded(paths, two), Reading(range=(0.0, 250.0)), None, print)
    assert source.facts.channels == Channels(num=2, is_rgb=False, dtype="float32", full_scale=250)


def test_files_with_more_channels_say_how_to_train_on_them(tmp_path: Path) -> None:
    source = encoded([bands(tmp_path / f"{i}.npy", 5) for i in range(6)], RGB)
    loader = training_loader(source, "torchvision", [ViewSpec(size=8, augment=Augment())])
    with raises_one_line(DataError, "--data.channels 5"):
        take(loader, 1)


def test_no_channels_and_wrong_ranges_are_no_channels() -> None:
    for wrong in ({"num": 0, "is_rgb": False}, {"num": 5}, {"full_scale": 0.0}, {"black": math.nan}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match="expected"):
            Channels(**wrong)
    assert by_path([], None).facts.channels.is_plain
