"""Jigsaw: the tiles against loops, the permutations against brute force, the answer against what was done."""

import hashlib
import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kit import tiny
from sslx import encoders
from sslx.data.draws import Draws
from sslx.errors import ConfigError
from sslx.methods import jigsaw
from sslx.methods.base import Embedded

BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


def make(size: int = 16, **options: Any) -> tuple[jigsaw.Method, tiny.Pixels]:
    encoder = tiny.Pixels(3 * jigsaw.tile_side(size) ** 2, size)
    numbers: dict[str, Any] = {"num_permutations": 24, "tile_dim": 5, "hidden_dim": 7, **options}
    return jigsaw.Method(jigsaw.Config(**numbers), encoder), encoder


def by_loops(image: Tensor, cell: int, place: Tensor) -> np.ndarray:
    """The tile (3, T, T) of one cell of one image (3, S, S), pixel by pixel."""
    width, side = image.shape[1] // 3, jigsaw.tile_side(image.shape[1])
    top, left = (math.floor(float(u) * (width - side + 1)) for u in place)
    assert 0 <= min(top, left) <= max(top, left) <= width - side
    tile = np.zeros((3, side, side))
    for c in range(3):
        for y in range(side):
            for x in range(side):
                tile[c, y, x] = image[c, cell // 3 * width + top + y, cell % 3 * width + left + x]
    return tile


def normalized(tile: np.ndarray) -> np.ndarray:
    return np.stack([(channel - channel.mean()) / math.sqrt(channel.var() + 1e-5) for channel in tile])


def distances(chosen: np.ndarray) -> np.ndarray:
    """Hamming distances of all pairs."""
    first, second = np.triu_indices(len(chosen), 1)
    return (chosen[first] != chosen[second]).sum(1)


@pytest.mark.parametrize(("num", "num_tiles"), [(2, 2), (6, 3), (9, 4), (24, 4), (30, 5)])
def test_each_permutation_is_the_farthest_from_those_before(num: int, num_tiles: int):
    every = list(permutations(range(num_tiles)))
    chosen = [every.pop(0)]
    while len(chosen) < num:
        far = [[sum(a != b for a, b in zip(one, other, strict=True)) for other in chosen] for one in every]
        chosen.append(every.pop(max(range(len(every)), key=lambda i: (sum(far[i]), min(far[i]), -i))))
    assert jigsaw.distant_permutations(num, num_tiles).tolist() == [list(one) for one in chosen]


def test_a_checkpoints_permutations_stay_as_they_are():
    """It does not hold them, and its classifier knows no others."""
    chosen = jigsaw.distant_permutations(1000, 9)
    assert len(np.unique(chosen, axis=0)) == 1000
    assert distances(chosen).min() == 2
    assert np.array_equal(chosen[:100], jigsaw.distant_permutations(100, 9))
    assert chosen[:2].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 0, 3, 2, 5, 4, 7, 8, 6]]
    assert hashlib.sha256(chosen.astype(np.uint8).tobytes()).hexdigest()[:16] == "d8f23a75845fd88c"
    assert not chosen.flags.writeable
    method = make()[0].double()
    assert "permutations" not in method.state_dict()
    assert method.permutations.dtype == torch.int64


def test_tiles_are_of_the_papers_share_of_a_cell_and_leave_a_gap_at_every_size():
    sides = {225: 64, 255: 73, 224: 63, 96: 27, 32: 9, 24: 7, 16: 4, 11: 2, 9: 2}
    assert {size: jigsaw.tile_side(size) for size in sides} == sides
    assert all(2 <= jigsaw.tile_side(size) < size // 3 for size in range(9, 600))


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [9, 16, 26])
def test_tiles_are_the_right_pixels(size: int, format: torch.memory_format, generator: torch.Generator):
    images = torch.randn(3, 3, size, size, generator=generator).contiguous(memory_format=format)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(3)])
    places = torch.rand(3, 9, 2, generator=generator)
    places[0], places[1, 0] = BELOW_ONE, 0
    tiles = jigsaw.cut(images, order, places)
    for b in range(3):
        for i in range(9):
            assert np.array_equal(tiles[9 * b + i].numpy(), by_loops(images[b], int(order[b, i]), places[b, i]))
    assert tiles.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [16, 24, 75])
def test_tiles_get_to_every_place_of_their_cell_and_to_no_other(size: int, generator: torch.Generator):
    cell, num = size // 3, 1000
    spare = cell - jigsaw.tile_side(size)
    coordinates = torch.stack(torch.meshgrid(*[torch.arange(size).float()] * 2, indexing="ij"))
    image = torch.cat([coordinates, coordinates[:1]])[None].expand(num, -1, -1, -1)
    places = torch.rand(num, 9, 2, generator=generator)
    corners = jigsaw.cut(image, torch.arange(9).expand(num, 9), places)[:, :2, 0, 0].view(num, 9, 2).long()
    for k in range(9):
        found = {(y - k // 3 * cell, x - k % 3 * cell) for y, x in corners[:, k].tolist()}
        assert found == {(y, x) for y in range(spare + 1) for x in range(spare + 1)}


def test_each_channel_of_a_tile_has_mean_zero_and_deviation_one(generator: torch.Generator):
    scale, shift = torch.rand(2, 6, 3, 1, 1, generator=generator, dtype=torch.float64)
    tiles = (0.5 + scale) * torch.randn(6, 3, 7, 7, generator=generator, dtype=torch.float64) + 9 * shift
    expected = torch.from_numpy(np.stack([normalized(tile) for tile in tiles.numpy()]))
    assert expected.mean((2, 3)).abs().max() < 1e-12
    assert (expected.std((2, 3), correction=0) - 1).abs().max() < 1e-3
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        given = tiles.to(dtype)
        found = jigsaw.normalize(given.contiguous(memory_format=torch.channels_last))
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        again = torch.from_numpy(np.stack([normalized(tile) for tile in given.double().numpy()]))
        torch.testing.assert_close(found.double(), again, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flat_tile_gives_zeros(dtype: torch.dtype, generator: torch.Generator):
    level = 5 * torch.randn(6, 3, 1, 1, generator=generator).to(dtype)
    found = jigsaw.normalize(level.expand(6, 3, 64, 64))
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-3, rtol=0)


def test_the_answer_is_the_permutation_of_the_tiles(generator: torch.Generator):
    method, encoder = make()
    images = tiny.batch(method, generator, 4)
    (logits,), (number,) = method.embed(images)
    (seen,) = encoder.seen
    assert (logits.shape, number.shape, number.dtype) == ((4, 24), (4,), torch.int64)
    assert torch.equal(number, images.draws[0])
    for b, tiles in enumerate(seen.unflatten(0, (4, 9))):
        order = jigsaw.distant_permutations(24, 9)[int(number[b])]
        places = images.draws[1][b]
        for cell, i in enumerate(np.argsort(order)):  # put back in order
            expected = torch.from_numpy(normalized(by_loops(images.views[0][b], cell, places[i])))
            torch.testing.assert_close(tiles[i].double(), expected, atol=1e-4, rtol=0)
        each = torch.cat([method.tile_head(tile.flatten()) for tile in tiles])
        torch.testing.assert_close(logits[b], method.classifier(each))


@pytest.mark.parametrize("num", [2, 24, 100, 1000])
def test_every_permutation_is_drawn_equally_and_none_that_is_not_there(num: int, monkeypatch: pytest.MonkeyPatch):
    method, _ = make(9, num_permutations=num)
    numbers = np.random.default_rng().random((2 * num + 2, 19), np.float32)
    numbers[-2:, 0] = 0, BELOW_ONE
    numbers[:-2, 0] = (np.arange(2 * num) + 0.5) / (2 * num)
    monkeypatch.setattr(Draws, "per_sample", lambda _, num: numbers[:, :num])
    number, places = method.draw(Draws(seed=0, epoch=0, batch=0, index=np.arange(len(numbers))))
    assert number.tolist() == [k // 2 for k in range(2 * num)] + [0, num - 1]
    assert np.array_equal(places, numbers[:, 1:].reshape(-1, 9, 2))
    assert places.dtype == np.float32


def test_the_loss_is_the_mean_negative_log_probability_of_the_permutation(generator: torch.Generator):
    method, _ = make()
    logits = torch.randn(6, 24, dtype=torch.float64, generator=generator)
    number = torch.randint(24, (6,), generator=generator)
    total, right = 0.0, 0
    for row, k in zip(logits.tolist(), number.tolist(), strict=True):
        total += math.log(sum(math.exp(x) for x in row)) - row[k]
        right += max(row) == row[k]
    step = method.loss(Embedded((logits,), (number,)))
    assert step.loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert step.metrics["accuracy"].item() == pytest.approx(right / 6)
    sure = method.loss(Embedded((50 * torch.eye(24)[number].bfloat16(),), (number,)))
    assert sure.loss.dtype == torch.float32
    assert (sure.loss.item(), sure.metrics["accuracy"].item()) == (pytest.approx(0), 1)


def test_what_does_not_take_or_give_tiles_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^jigsaw cuts .* 16 px .* 4 px, which VisionTransformer does not[^\n]*$"):
        tiny.build(jigsaw.Config(num_permutations=2), tiny.VIT)
    with pytest.raises(ConfigError, match=r"^jigsaw needs views of 9 px or more[^\n]*, got 8[^\n]*$"):
        jigsaw.Method(jigsaw.Config(num_permutations=2), encoders.build(tiny.RESNET, 8))
