"""Colours, blur, solarize and normalisation of a batch, against fp64 sums written out in numpy."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sslx.data import finish, views
from sslx.data.views import Augment, Draw, ViewSpec

SIZES = (8, 33, 56, 57, 113, 224)  # below, at and beside a tile of the blur; odd numbers of pixels
RECIPE = Augment(blur=0.5, solarize=0.3, gray=0.3)


def batch(
    size: int, number: int, generator: torch.Generator, recipe: Augment = RECIPE
) -> tuple[ViewSpec, Draw, Tensor]:
    spec = ViewSpec(size=size, augment=recipe)
    drawn = views.draw(spec, 5, 1, np.arange(number), 0)
    return spec, drawn, torch.randint(0, 256, (number, size, size, 3), dtype=torch.uint8, generator=generator)


def blurred(image: npt.NDArray[np.float64], sigma: float, window: int) -> npt.NDArray[np.float64]:
    """The definition: a weighted mean over the window, first of rows, then of columns, mirrored at the borders."""
    reach = window // 2
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight /= weight.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        side = image.shape[axis]
        image = sum(w * padded.take(range(k, k + side), axis=axis) for k, w in enumerate(weight))
    return image


def expected(spec: ViewSpec, drawn: Draw, image: npt.NDArray[np.uint8], row: int) -> npt.NDArray[np.float64]:
    view = (image.astype(np.float64) @ finish.matrix(drawn)[row].T).clip(0, 255)
    if drawn.blur[row]:
        view = blurred(view, float(drawn.sigma[row]), int(drawn.window[row]))
    if drawn.solarize[row]:
        view = np.where(view >= 128, 255 - view, view)
    return (view / 255 - np.array(spec.mean)) / np.array(spec.std)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_is_the_sum_of_its_definitions(size: int, generator: torch.Generator) -> None:
    spec, drawn, image = batch(size, 12, generator)
    assert 0 < drawn.blur.sum() < 12
    assert drawn.solarize.any()
    got = finish.finish(spec, drawn, image)
    assert got.shape == (12, 3, size, size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for row in range(12):
        want = torch.from_numpy(expected(spec, drawn, image[row].numpy(), row)).permute(2, 0, 1)
        difference = (got[row] - want).abs()
        # A value within a rounding of 128 may be solarized in one and not in the other: a pixel, or one in 1,000.
        assert (difference > 1e-4).sum() <= max(3, difference.numel() // 1000)
        assert drawn.solarize[row] or difference.max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_a_sample_does_not_depend_on_its_neighbours(
    size: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whatever is finished at a time: W ranks train as one does."""
    spec, drawn, image = batch(size, 20, generator)
    whole = finish.finish(spec, drawn, image)
    monkeypatch.setattr(finish, "_CACHED", 1)
    torch.testing.assert_close(finish.finish(spec, drawn, image), whole, rtol=0, atol=0)
    for rows in (slice(3, 4), slice(0, 20, 2)):
        some = Draw(**{name: value[rows] for name, value in vars(drawn).items()})
        torch.testing.assert_close(finish.finish(spec, some, image[rows]), whole[rows], rtol=0, atol=0)


def test_the_evaluation_view_is_only_normalised(generator: torch.Generator) -> None:
    spec = ViewSpec(size=33)
    _, _, image = batch(33, 4, generator)
    want = (image.permute(0, 3, 1, 2) / 255 - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(finish.finish(spec, None, image), want, rtol=0, atol=1e-6)
