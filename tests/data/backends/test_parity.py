"""DALI against torchvision, sample by sample at identical parameters, on the 0..255 scale.

The resizes differ at a view's border only: DALI filters the image's own pixels beyond the crop, torchvision
repeats the crop's border.  Inside, both are within one level of rounding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from kit.loaders import AS_STORED, CPU
from kit.sources import by_path, in_memory, pixels_of
from sslx.data import views
from sslx.data.backends.color import Finish
from sslx.data.backends.dali import Dali
from sslx.data.backends.resident import Resident
from sslx.data.backends.torchvision import TorchVision
from sslx.data.order import Sequential
from sslx.data.planner import Planner
from sslx.data.sources import Source
from sslx.data.views import Augment, ViewSpec

Picture = Callable[[int, int, int], npt.NDArray[np.uint8]]
SIDES = (32, 96)
NOTHING = {"flip": 0.0, "jitter": 1.0, "gray": 0.0, "blur": 0.0}
NOTHING |= {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
OPERATIONS: dict[str, tuple[dict[str, float], float, float]] = {
    # what it does: (settings, mean, largest difference without any resize)
    "flip": ({"flip": 1.0}, 0.0, 0.0),
    "brightness": ({"brightness": 0.8}, 0.55, 1.01),
    "contrast": ({"contrast": 0.8}, 0.65, 1.01),
    "saturation": ({"saturation": 0.8}, 0.65, 2.0),
    "gray": ({"gray": 1.0}, 0.60, 1.1),
    "blur": ({"blur": 1.0}, 0.26, 0.51),  # not rounded here
    "solarize": ({"solarize": 1.0}, 0.0, 0.0),
    "vertical flip": ({"vertical_flip": 1.0}, 0.0, 0.0),
    "right angles": ({"right_angles": 1.0}, 0.0, 0.0),
    "rotation": ({"rotate": 1.0}, 0.26, 0.51),  # not rounded here
    "gain": ({"gain": 1.0}, 0.0, 0.0),
    "noise": ({"noise": 1.0}, 0.0, 0.0),
}
ALL = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5, "solarize": 0.2}
ALL |= {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.0}
FOR_ANY_CHANNELS = {"vertical_flip": 0.5, "right_angles": 0.5, "rotate": 0.5, "gain": 0.5, "noise": 0.5}


def augment(**changes: Any) -> Augment:
    return Augment(**{**NOTHING, **changes})


def spec_of(size: int, recipe: Augment | None, **more: Any) -> ViewSpec:
    return ViewSpec(size=size, augment=recipe, **AS_STORED, **more)


def views_of(kind: type[Dali] | type[TorchVision] | type[Resident], source: Source, spec: ViewSpec) -> Tensor:
    number = len(source)
    options: dict[str, Any] = {"num_threads": int(kind is not TorchVision)}
    options |= {"max_per_rank": number} if kind is Dali else {}
    planner = Planner(order=Sequential(num_samples=number, per_rank=number), specs=[spec], seed=5)
    (view,) = next(kind(source, [spec], device=CPU, **options).stream(planner, 0)).views
    return view


def both(source: Source, spec: ViewSpec) -> tuple[Tensor, Tensor]:
    return views_of(Dali, source, spec), views_of(TorchVision, source, spec)


def resident_difference(source: Source, spec: ViewSpec) -> Tensor:
    return (views_of(Resident, source, spec) - views_of(TorchVision, source, spec)).abs()


@pytest.fixture(scope="module")
def varied(folder: Path) -> Source:
    return by_path(sorted(folder.rglob("*.*")))


@pytest.fixture(scope="module", params=SIDES)
def square(request: pytest.FixtureRequest, picture: Picture) -> Source:
    side = request.param
    return in_memory(np.stack([picture(i, side, side) for i in range(24)]), size=side)


def untouched(source: Source) -> Tensor:
    return torch.from_numpy(pixels_of(source)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_by_itself(square: Source, operation: str) -> None:
    """On the whole image at its own size, so that nothing is resized."""
    changes, mean, largest = OPERATIONS[operation]
    spec = spec_of(square.facts.size, augment(min_scale=1.0, max_ratio=1.0, **changes))
    dali, torchvision = both(square, spec)
    difference = (dali - torchvision).abs()
    assert difference.mean() <= mean
    assert difference.max() <= largest
    effect = (torchvision - untouched(square)).abs().mean((1, 2, 3))
    # It does something to every picture, but for factors near 1 and sigmas near 0, and to the mean 3 times the bound.
    assert effect.mean() > max(2.0, 3 * mean)
    assert (effect > 0.2).float().mean() > 0.8


def test_the_whole_image_at_its_own_size_is_itself(square: Source) -> None:
    for view in both(square, spec_of(square.facts.size, augment(min_scale=1.0, max_ratio=1.0))):
        torch.testing.assert_close(view, untouched(square), rtol=0, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", SIDES)
def test_crops_agree_to_a_level_but_at_the_border(varied: Source, side: int, interpolation: Any) -> None:
    dali, torchvision = both(varied, spec_of(side, augment(interpolation=interpolation)))
    difference = (dali - torchvision).abs()
    border = side // 8
    inside = difference[:, :, border:-border, border:-border]
    assert inside.max() <= (1.01 if interpolation == "bilinear" else 2.01)
    assert inside.mean() < 0.25
    assert difference.mean() < 0.5
    assert difference.mean((1, 2, 3)).max() < 1.5
    other = views_of(TorchVision, varied, spec_of(side, augment(interpolation=interpolation, min_scale=0.5)))
    assert (other - torchvision).abs().mean() > 20  # another box is another picture


def test_bicubic_is_another_filter(varied: Source) -> None:
    bilinear, bicubic = (both(varied, spec_of(96, augment(interpolation=kind))) for kind in ("bilinear", "bicubic"))
    for a, b in zip(bilinear, bicubic, strict=True):
        assert (a - b).abs().mean() > 0.5


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_each_operation_after_a_crop(varied: Source, side: int, operation: str) -> None:
    dali, torchvision = both(varied, spec_of(side, augment(**OPERATIONS[operation][0])))
    difference = (dali - torchvision).abs()
    assert difference.mean() < 0.9
    border = side // 8
    if operation != "rotation":  # which moves the border inside
        assert difference[:, :, border:-border, border:-border].max() <= 4


@pytest.mark.parametrize("more", [{}, FOR_ANY_CHANNELS], ids=["", "and those for any channels"])
@pytest.mark.parametrize("side", SIDES)
def test_everything_but_hue(varied: Source, side: int, more: dict[str, float]) -> None:
    """Roundings to 8 bits in a row; the largest are where a contrast of up to 1.8 follows a brightness."""
    spec = spec_of(side, augment(**ALL, **more))
    dali, torchvision = both(varied, spec)
    difference = (dali - torchvision).abs()
    assert difference.mean() < 2
    assert difference.mean((1, 2, 3)).max() < 5
    plain = views_of(TorchVision, varied, spec_of(side, augment()))
    assert (torchvision - plain).abs().mean() > 25


def test_gray_after_saturation_differs_by_the_clipping_between_them(square: Source) -> None:
    recipe = augment(brightness=0.8, contrast=0.8, saturation=0.8, gray=1.0, min_scale=1.0, max_ratio=1.0)
    dali, torchvision = both(square, spec_of(square.facts.size, recipe))
    difference = (dali - torchvision).abs().mean((1, 2, 3))
    assert difference.mean() < 3.5
    assert difference.max() < 12
    assert difference.median() < 2.5


@pytest.mark.parametrize(("strength", "most"), [(0.1, 0.85), (0.2, 0.65), (0.5, 0.35)])
def test_hue_differs_by_a_known_share_of_its_effect(square: Source, strength: float, most: float) -> None:
    """Turning RGB about the gray axis is not HSV's hue, but always nearer to it than leaving hue as it is."""
    spec = spec_of(square.facts.size, augment(hue=strength, min_scale=1.0, max_ratio=1.0))
    dali, torchvision = both(square, spec)
    effect = (torchvision - untouched(square)).abs().mean((1, 2, 3))
    share = (dali - torchvision).abs().mean((1, 2, 3)) / effect
    assert effect.mean() > 90 * strength
    overall = (dali - torchvision).abs().mean() / effect.mean()
    assert most - 0.2 < overall < most
    assert (share < 1).all()


def test_hue_turns_as_in_hsv(square: Source) -> None:
    """The same sense and angle: at thirds of a turn both exchange the channels, exactly."""
    pixels = torch.from_numpy(pixels_of(square))
    spec = spec_of(square.facts.size, augment(hue=0.5))
    drawn = views.draw(spec, 0, 0, np.arange(len(pixels)), 0)
    for third in (-1 / 3, 1 / 3):
        hue = np.full(len(pixels), third, dtype=np.float32)
        turned = Finish(spec, CPU)(views.Draw(**{**vars(drawn), "hue": hue}), pixels)
        expected = functional.adjust_hue(pixels.permute(0, 3, 1, 2), third).float()
        torch.testing.assert_close(turned, expected, rtol=0, atol=1.01)


def test_dalis_crops_with_torchs_brightness_and_contrast_are_dalis_views(varied: Source) -> None:
    """As on a GPU, where DALI leaves both to torch: they differ by what DALI rounds between its operations."""
    jittered = spec_of(64, augment(**ALL | {"blur": 0.0, "solarize": 0.0}))
    crops = views_of(Dali, varied, spec_of(64, augment(flip=0.5))).permute(0, 2, 3, 1).round().to(torch.uint8)
    drawn = views.draw(jittered, 5, 0, np.arange(len(varied)), 0)
    difference = (Finish(jittered, CPU, jitter=True)(drawn, crops) - views_of(Dali, varied, jittered)).abs()
    assert difference.mean() < 0.6
    assert difference.max() < 4
    without = Finish(jittered, CPU)(drawn, crops)
    assert (without - views_of(Dali, varied, jittered)).abs().mean() > 5


@pytest.mark.parametrize("center", [1.0, 0.875])
@pytest.mark.parametrize("side", SIDES)
def test_the_evaluation_view(varied: Source, side: int, center: float) -> None:
    dali, torchvision = both(varied, spec_of(side, None, center=center))
    difference = (dali - torchvision).abs()
    assert difference.mean() < 0.4
    assert difference[:, :, 4:-4, 4:-4].max() <= 1.01
    assert difference.mean((1, 2, 3)).max() < 1.5
    other = views_of(TorchVision, varied, spec_of(side, None, center=center - 0.05))
    assert (other - torchvision).abs().mean() > 2


# ---- resident: torchvision's own filters, so that the borders agree too


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", SIDES)
def test_resident_crops_are_torchvisions_to_its_rounding(varied: Source, side: int, interpolation: Any) -> None:
    difference = resident_difference(varied, spec_of(side, augment(flip=0.5, interpolation=interpolation)))
    assert difference.max() <= 1.2  # it rounds after each direction
    assert difference.mean() < 0.35


@pytest.mark.parametrize("center", [1.0, 0.875])
def test_resident_evaluation_views_are_torchvisions_to_its_rounding(varied: Source, center: float) -> None:
    assert resident_difference(varied, spec_of(32, None, center=center)).max() <= 1.01


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_resident_operation(square: Source, operation: str) -> None:
    changes, mean, largest = OPERATIONS[operation]
    recipe = augment(min_scale=1.0, max_ratio=1.0, **changes)
    difference = resident_difference(square, spec_of(square.facts.size, recipe))
    assert difference.mean() <= mean + 1e-4
    assert difference.max() <= largest + 0.8  # torchvision cuts off to whole levels, here nothing is rounded


@pytest.mark.parametrize("more", [{}, FOR_ANY_CHANNELS], ids=["", "and those for any channels"])
def test_everything_resident_but_hue(varied: Source, more: dict[str, float]) -> None:
    difference = resident_difference(varied, spec_of(32, augment(**ALL, **more)))
    assert difference.mean() < 1.5
    assert difference.mean((1, 2, 3)).max() < 5
