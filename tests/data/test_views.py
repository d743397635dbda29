"""What is drawn for a view: a function of its counters, of the right distribution, boxes by torchvision's rule."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from sslx import rng
from sslx.data import views
from sslx.data.views import Augment, Draw, ViewSpec, eval_view
from sslx.errors import ConfigError

MANY = np.arange(20_000)
SHAPES = ((1, 1), (1, 400), (400, 1), (2, 999), (17, 333), (333, 17), (8, 8), (32, 32), (48, 64))
SHAPES += ((96, 96), (375, 500), (500, 375), (224, 299), (640, 1000), (3000, 4000))  # height, width


def drawn(augment: Augment, index: npt.NDArray[np.int64] = MANY) -> Draw:
    return views.draw(ViewSpec(size=224, augment=augment), 7, 3, index, 1)


def test_a_draw_is_a_function_of_seed_epoch_sample_and_view() -> None:
    spec = ViewSpec(size=96, augment=Augment(solarize=0.2))
    all_rows = views.draw(spec, 7, 3, np.arange(100), 1)
    some = np.array([41, 3, 99, 3])
    for name, rows in views.draw(spec, 7, 3, some, 1).arrays().items():
        np.testing.assert_array_equal(rows, vars(all_rows)[name][some], err_msg=name)
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 0)):
        seed, epoch, view = other
        different = views.draw(spec, seed, epoch, np.arange(100), view)
        assert (different.area != all_rows.area).all()
        assert (different.place != all_rows.place).all()


def plainly_drawn(augment: Augment, size: int, u: list[float]) -> dict[str, float | list[float]]:
    """One sample's parameters of one view, computed one by one from its 32 random numbers."""
    strengths = {"brightness": augment.brightness, "contrast": augment.contrast, "saturation": augment.saturation}
    jitter = u[23] < augment.jitter
    drawn: dict[str, float | list[float]] = {
        "area": [augment.min_scale + (augment.max_scale - augment.min_scale) * x for x in u[:10]],
        "ratio": [math.exp(math.log(augment.max_ratio) * (2 * x - 1)) for x in u[10:20]],
        "place": [min(x, 1 - 2.0**-24) for x in u[20:22]],
        "flip": u[22] < augment.flip,
    }
    for number, (name, strength) in enumerate(strengths.items(), 24):
        low, high = max(0.0, 1 - strength), 1 + strength
        drawn[name] = low + (high - low) * u[number] if jitter else 1.0
    sigma = views.MIN_SIGMA + (views.MAX_SIGMA - views.MIN_SIGMA) * u[30]
    return drawn | {
        "hue": augment.hue * (2 * u[27] - 1) if jitter else 0.0,
        "gray": u[28] < augment.gray,
        "blur": u[29] < augment.blur,
        "sigma": sigma,
        "window": 2 * min(math.ceil(3 * sigma), 6, max(1, size // 20)) + 1,
        "solarize": u[31] < augment.solarize,
    }


SPECS = (
    ViewSpec(size=32, augment=Augment(blur=0.0, min_scale=0.2, hue=0.1)),
    ViewSpec(size=32),
    ViewSpec(size=96, augment=Augment(solarize=0.2, brightness=1.5, max_ratio=2)),
)


MORE_SPECS = (
    ViewSpec(size=224, augment=Augment(flip=0.3, jitter=0.5, gray=0.4, blur=0.9, max_scale=0.6)),
    ViewSpec(size=8, augment=Augment(flip=0, jitter=0, gray=0, blur=0)),
    ViewSpec(size=64, augment=Augment(flip=1, jitter=1, gray=1, blur=1, solarize=1)),
)


@pytest.mark.parametrize("number", [1, 40, 5000])
def test_the_draws_of_a_batch_are_those_of_its_samples_one_by_one(number: int) -> None:
    specs = (*SPECS, *MORE_SPECS)
    random = np.random.default_rng()
    seed, epoch = (int(x) for x in random.integers(2**32, size=2))
    index = random.integers(2**32, size=number)
    batch = views.draws(specs, seed, epoch, index)
    assert batch[1] is None
    for row in random.integers(number, size=min(number, 10)):
        for view, (spec, together) in enumerate(zip(specs, batch, strict=True)):
            if spec.augment is None or together is None:
                continue
            u = rng.uniform(seed, "view", epoch, int(index[row]), view, num=32)[0].tolist()
            alone = vars(views.draw(spec, seed, epoch, index[row : row + 1], view))
            for name, value in plainly_drawn(spec.augment, spec.size, u).items():
                of_batch = vars(together)[name][row]
                np.testing.assert_array_equal(of_batch, alone[name][0])
                # Two libraries' exponentials may differ in their last bit, and so the numbers rounded to float32.
                tolerance = 1e-7 if name == "ratio" else 0.0
                np.testing.assert_allclose(of_batch, np.float32(value), rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("number", "drawn_digest", "boxes_digest"),
    [(3, "733d34112b2644f9", "74d75e0dac39235d"), (300, "e8b2fdebdf1f3564", "30f2ebdd749b0967")],
)
def test_no_version_draws_other_views(number: int, drawn_digest: str, boxes_digest: str) -> None:
    """Digests recorded at commit f84354d: a resumed run must see the crops and colors that it would have seen."""
    batch = views.draws(SPECS, 5, 9, np.arange(number) * 14_000_029)
    assert digest(*(array for one in batch if one is not None for array in one.arrays().values())) == drawn_digest
    height, width = (np.array(sides)[np.arange(number) % 4] for sides in ((32, 375, 1, 17), (32, 500, 400, 333)))
    boxes = [views.boxes(spec, one, height, width) for spec, one in zip(SPECS, batch, strict=True)]
    assert digest(*boxes) == boxes_digest


def digest(*arrays: npt.NDArray[Any]) -> str:
    """Of the arrays' types, shapes and bytes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(str((array.dtype.str, array.shape)).encode() + array.tobytes())
    return total.hexdigest()[:16]


def test_views_that_draw_nothing_need_no_random_numbers() -> None:
    assert views.draws([eval_view(32)] * 2, 5, 9, np.arange(3)) == [None, None]
    (empty,) = views.draws([ViewSpec(size=32, augment=Augment())], 5, 9, np.arange(0))
    assert empty is not None
    for array in empty.arrays().values():
        assert len(array) == 0


def test_numbers_are_uniform_in_their_ranges_and_independent() -> None:
    strengths: dict[str, Any] = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.8, "hue": 0.1}
    d = drawn(Augment(min_scale=0.2, max_scale=0.9, max_ratio=2, jitter=1, flip=0.3, gray=0.2, blur=0.6, **strengths))
    for probability, rows in ((0.3, d.flip), (0.2, d.gray), (0.6, d.blur)):
        assert abs(rows.mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / len(MANY))
    ranges = {"area": (0.2, 0.9), "place": (0, 1), "brightness": (0.6, 1.4), "contrast": (0, 2.5)}
    ranges |= {"saturation": (0.2, 1.8), "hue": (-0.1, 0.1), "sigma": (0.1, 2.0)}
    every = {name: (vars(d)[name].ravel(), *ends) for name, ends in ranges.items()}
    every["log ratio"] = np.log(d.ratio.ravel()), -math.log(2), math.log(2)
    for name, (values, low, high) in every.items():
        assert low - 1e-6 <= values.min() < values.max() <= high + 1e-6, name
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3, name
    columns = [d.area, d.ratio, d.place, d.flip, d.brightness, d.contrast, d.saturation, d.hue, d.gray, d.blur, d.sigma]
    table = np.concatenate([column.reshape(len(MANY), -1) for column in columns], axis=1)
    correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(len(MANY))


def torchvision_box(
    area: npt.NDArray[np.float32],
    ratio: npt.NDArray[np.float32],
    place: npt.NDArray[np.float32],
    height: int,
    width: int,
    limit: float,
) -> tuple[tuple[int, int, int, int], float, bool]:
    """RandomResizedCrop.get_params at given candidates: the box, how near a rounding was, whether none fitted."""
    near = 1.0
    for a, r in zip(area.tolist(), ratio.tolist(), strict=True):
        exact_w, exact_h = math.sqrt(height * width * a * r), math.sqrt(height * width * a / r)
        w, h = round(exact_w), round(exact_h)
        near = min(near, abs(exact_w % 1 - 0.5) / exact_w, abs(exact_h % 1 - 0.5) / exact_h)
        if 0 < w <= width and 0 < h <= height:
            exact_top, exact_left = float(place[0]) * (height - h + 1), float(place[1]) * (width - w + 1)
            top, left = math.floor(exact_top), math.floor(exact_left)
            near = min(near, *(min(x % 1, 1 - x % 1) / max(x, 1e-9) for x in (exact_top, exact_left)))
            return (top, left, top + h, left + w), near, False
    w, h = width, height
    if width / height < 1 / limit:
        h = round(width * limit)
    elif width / height > limit:
        w = round(height * limit)
    top, left = (height - h) // 2, (width - w) // 2
    return (top, left, top + h, left + w), near, True


@pytest.mark.parametrize("augment", [Augment(), Augment(min_scale=0.5, max_ratio=2), Augment(min_scale=1, max_ratio=1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_follow_torchvisions_rule(shape: tuple[int, int], augment: Augment) -> None:
    height, width = shape
    index = np.arange(200)
    d = drawn(augment, index)
    spec = ViewSpec(size=224, augment=augment)
    got = views.boxes(spec, d, np.full(200, height), np.full(200, width))
    near_a_rounding = num_fitting_nowhere = 0
    for i in index:
        box, near, fits_nowhere = torchvision_box(d.area[i], d.ratio[i], d.place[i], height, width, augment.max_ratio)
        num_fitting_nowhere += fits_nowhere
        if near < 1e-6:  # float32 against float64 may round to another side
            near_a_rounding += 1
            assert np.abs(got[i] - box).max() <= max(height, width)
        else:
            assert tuple(got[i]) == box, (i, d.area[i], d.ratio[i])
    if augment.min_scale < 1:
        assert near_a_rounding <= 10
    if augment.min_scale >= 0.5 and max(shape) > 19 * min(shape):  # then it is the largest centered one
        assert num_fitting_nowhere == 200


def test_boxes_lie_inside_the_image() -> None:
    height, width = (np.array(side)[np.arange(20_000) % len(SHAPES)] for side in zip(*SHAPES, strict=True))
    box = views.boxes(ViewSpec(size=32, augment=Augment()), drawn(Augment()), height, width)
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2] <= height).all()
    assert (box[:, 3] <= width).all()
    assert (box[:, 2:] > box[:, :2]).all()
    whole = (box[:, 2] == height).mean(), (box[:, 3] == width).mean()
    assert min(whole) > 0.05  # the far edges can be reached


@pytest.mark.parametrize("extreme", [2.0**-33, 1 - 2.0**-33])
def test_the_extreme_draws_stay_in_range(extreme: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest number that ``rng`` can give: in float32 the largest one is 1."""
    monkeypatch.setattr(rng, "uniform_columns", lambda *_, num: np.full((num, 1), extreme))
    augment = Augment()
    d = drawn(augment, np.arange(1))
    assert 0 <= d.place.min() <= d.place.max() < 1
    tiny = replace(d, area=np.full_like(d.area, 0.1), ratio=np.ones_like(d.ratio))
    for height, width in SHAPES:
        for one in (d, tiny):
            top, left, bottom, right = views.boxes(ViewSpec(size=32, augment=augment), one, [height], [width])[0]
            assert 0 <= top < bottom <= height
            assert 0 <= left < right <= width


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_the_evaluation_view_is_the_central_square(size: int) -> None:
    spec = eval_view(size)
    assert spec.augment is None
    assert spec.center == (1.0 if size <= 64 else 0.875)
    for height, width in SHAPES:
        top, left, bottom, right = views.boxes(spec, None, [height], [width])[0]
        side = min(height, width) * spec.center
        assert bottom - top == right - left
        assert abs(bottom - top - side) <= 0.5
        assert 0 <= top <= bottom <= height
        assert abs(top - (height - bottom)) <= 1
        assert abs(left - (width - right)) <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flip": 1.5}, r"augment\.flip must be a probability in \[0, 1\], not 1\.5"),
        ({"blur": -0.1}, r"augment\.blur"),
        ({"min_scale": 0.0}, r"min_scale <= max_scale <= 1, got 0\.0"),
        ({"min_scale": 0.9, "max_scale": 0.5}, r"got 0\.9 and 0\.5"),
        ({"max_ratio": 0.5}, r"max_ratio >= 1"),
        ({"hue": 0.6}, r"hue in \[0, 0\.5\]"),
        ({"contrast": -1.0}, r"strengths >= 0"),
    ],
)
def test_an_augmentation_that_cannot_be(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**wrong)  # pyright: ignore[reportArgumentType]
