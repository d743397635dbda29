"""The pictures: what they show, read back from the PNGs, and which samples they show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslx import plot
from sslx.data.views import ViewSpec
from sslx.errors import DataError, MissingInput


def clusters(classes: int, size: int = 120) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(size) % classes
    return torch.eye(classes, 40)[label] * 5 + torch.randn(size, 40, generator=generator), label


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.info["dpi"][0] >= 150
        return np.asarray(image.convert("RGB")).astype(int)


def num_pixels(pixels: np.ndarray, colour: str, alpha: float = 1.0) -> int:
    """How many pixels have a colour, laid on white with this opacity."""
    wanted = alpha * np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) + (1 - alpha) * 255
    return int((np.abs(pixels - wanted).sum(-1) < 20).sum())


def metrics(path: Path, records: Sequence[Mapping[str, object]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_tsne_shows_each_class_in_its_colour_with_a_legend(tmp_path: Path) -> None:
    x, label = clusters(4)
    plot.tsne(x, label, ("cat", "dog", "owl", "bat"), tmp_path / "new" / "map.png", "kNN 98.3 %")
    pixels = read(tmp_path / "new" / "map.png")
    assert min(pixels.shape[:2]) > 700
    for colour in plot.PALETTE[:4]:
        assert num_pixels(pixels, colour, plot.OPACITY) > 2000  # 30 points
        assert 100 < num_pixels(pixels, colour) < 2000  # and a mark in the legend
    assert num_pixels(pixels, plot.PALETTE[4], plot.OPACITY) == 0


def test_tsne_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    x, label = clusters(3)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plot.tsne(x, label, None, tmp_path / name, "title", max_points=60, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_tsne_without_labels_has_one_colour(tmp_path: Path) -> None:
    plot.tsne(clusters(3)[0], None, None, tmp_path / "map.png", "title")
    pixels = read(tmp_path / "map.png")
    assert num_pixels(pixels, plot.PALETTE[0], plot.OPACITY) > 2000
    assert num_pixels(pixels, plot.PALETTE[1], plot.OPACITY) == 0


@pytest.mark.parametrize("classes", [15, pytest.param(30, marks=pytest.mark.slow)])
def test_tsne_of_many_classes_has_many_colours(classes: int, tmp_path: Path) -> None:
    x, label = clusters(classes)
    plot.tsne(x, label, None, tmp_path / "map.png", "title")
    colours, counts = np.unique(read(tmp_path / "map.png").reshape(-1, 3), axis=0, return_counts=True)
    spread = colours.max(1) - colours.min(1) > 40
    assert (counts[spread] > 100).sum() >= 0.8 * classes


def test_tsne_of_collapsed_features_is_drawn(tmp_path: Path) -> None:
    plot.tsne(torch.ones(50, 8), torch.arange(50) % 2, None, tmp_path / "map.png", "title")
    assert num_pixels(read(tmp_path / "map.png"), plot.PALETTE[1]) > 100


def test_tsne_of_too_few_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 or more samples"):
        plot.tsne(torch.ones(3, 8), None, None, tmp_path / "map.png", "title")


def test_subsample_keeps_the_shares_of_the_classes() -> None:
    label = torch.tensor([0] * 600 + [1] * 300 + [2] * 99 + [3])
    rows = plot.subsample(1000, label, 100, 0)
    assert len(set(rows.tolist())) == 100
    counts = label[torch.from_numpy(rows)].bincount(minlength=4).tolist()
    assert np.abs(np.array(counts) - [60, 30, 10, 1]).max() <= 1
    assert counts[3] == 1
    assert np.array_equal(rows, plot.subsample(1000, label, 100, 0))
    assert not np.array_equal(rows, plot.subsample(1000, label, 100, 1))
    assert np.array_equal(plot.subsample(80, label[:80], 100, 0), np.arange(80))


def test_loss_curve_shows_loss_and_learning_rate(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"step": s, "loss": 5 - s / 100, "lr": s / 1000, "epoch": s / 50} for s in range(200)
    ]
    records[3:3] = [{"step": 2, "knn": 0.4}]
    path = metrics(tmp_path / "metrics.jsonl", records, tail='{"step": 200, "lo')
    plot.loss_curve(path, tmp_path / "loss.png")
    both = read(tmp_path / "loss.png")
    assert num_pixels(both, plot.PALETTE[0]) > 2000
    assert num_pixels(both, "#c2571a") > 500
    metrics(path, [{"step": s, "loss": 5 - s / 100} for s in range(200)])
    plot.loss_curve(path, tmp_path / "loss.png")
    assert num_pixels(read(tmp_path / "loss.png"), "#c2571a") == 0


def test_a_step_that_came_twice_counts_once_and_the_later_holds(tmp_path: Path) -> None:
    once: list[dict[str, object]] = [{"step": s, "loss": 1.0 / (s + 1)} for s in range(30)]
    twice: list[dict[str, object]] = [{"step": s, "loss": 9.0} for s in range(10, 30)]
    broken: list[dict[str, object]] = [{"step": 40, "loss": float("nan")}, {"loss": 3.0}, {"step": 41}]
    plot.loss_curve(metrics(tmp_path / "once", once), tmp_path / "once.png")
    plot.loss_curve(
        metrics(
            tmp_path / "twice",
            once[:10] + twice + once[10:] + broken,
            tail='[]\n7\nnull\n{"step": 1e400, "loss": 1}\n{"step": "a", "loss": 1}\n' + "[" * 100_000 + "\n",
        ),
        tmp_path / "twice.png",
    )
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "twice.png").read_bytes()


@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_short_run_has_a_curve_too(num: int, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": s, "loss": 2.0, "lr": 0.1, "epoch": float(s)} for s in range(num)]
    plot.loss_curve(metrics(tmp_path / "m", records), tmp_path / "loss.png")
    assert num_pixels(read(tmp_path / "loss.png"), plot.PALETTE[0]) > 10


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "lr": 0.1}\n'])
def test_no_points_are_missing_input(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MissingInput, match=r"metrics\.jsonl"):
        plot.loss_curve(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_images_stand_in_titled_rows_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    """A red and a blue image of 2x2 pixels, and below each the same with one pixel of more than full green."""
    view = ViewSpec(size=2)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    plain = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None].repeat(1, 1, 2, 2)
    dotted = plain.clone()
    dotted[:, :, 0, 1] = torch.tensor([0, 9.0, 0])
    rows = [(name, (images - mean) / std) for name, images in (("plain", plain), ("dotted", dotted))]
    plot.images(rows, view, tmp_path / "new" / "rows.png", "title", "subtitle")
    pixels = read(tmp_path / "new" / "rows.png")
    colours = {"red": [255, 0, 0], "blue": [0, 0, 255], "green": [0, 255, 0]}
    found = {name: np.argwhere(np.abs(pixels - colour).sum(-1) < 20) for name, colour in colours.items()}
    red, blue, green = found.values()
    assert len(green) > 2 * 80**2
    assert len(red) == pytest.approx(7 * len(green) / 2, rel=0.05)
    assert len(blue) == pytest.approx(7 * len(green) / 2, rel=0.05)
    assert red[:, 1].max() < blue[:, 1].min(), "samples stand side by side"
    assert green[:, 0].min() > (red[:, 0].min() + red[:, 0].max()) / 2, "the second row is below the first"
    assert green[:, 1].max() == blue[:, 1].max(), "the dot is the upper right pixel of each"
    assert num_pixels(pixels, "#22262b") > 300, "a title"


def texts(path: Path) -> list[str]:
    """What is written in an SVG."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_bars_are_as_long_as_their_values_and_ours_is_coloured(tmp_path: Path) -> None:
    rows = [("sslx", 3000.0, 2900.0, 3100.0), ("other", 1000.0, 900.0, 1100.0)]
    plot.bars(rows, tmp_path / "bars.png", "Title", "subtitle", ours="sslx")
    pixels = read(tmp_path / "bars.png")
    gray = num_pixels(pixels, "#c3c8d0")
    assert num_pixels(pixels, plot.PALETTE[0]) == pytest.approx(3 * gray, rel=0.1)
    plot.bars(rows, tmp_path / "bars.svg", "Title", "subtitle", line=("limit", 2000.0))
    assert {"sslx", "other", "3,000", "1,000", "Title", "subtitle", "limit"} <= set(texts(tmp_path / "bars.svg"))


def test_curves_have_a_colour_each_and_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    series = [("strong", [(1.0, 10.0, 9.0, 11.0), (2.0, 18.0, 17.0, 19.0)]), ("weak", [(1.0, 10.0, 9.0, 11.0)])]
    for name in ("one.svg", "two.svg", "one.png"):
        plot.curves(series, tmp_path / name, "Title", "subtitle", x="ranks", y="samples/s", powers_of_2=True)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"strong", "weak", "ranks", "samples/s", "1", "2"} <= set(texts(tmp_path / "one.svg"))
    pixels = read(tmp_path / "one.png")
    assert num_pixels(pixels, plot.PALETTE[0]) > 2 * num_pixels(pixels, plot.PALETTE[1]) > 0


def test_a_roofline_has_its_operators_below_the_roof(tmp_path: Path) -> None:
    points = [("mm", 0.7, 50.0, 8e11), ("add_", 0.3, 0.1, 1e9)]
    plot.roofline(points, 1e12, 2e10, tmp_path / "roof.svg", "a recipe")
    assert {"mm, 70 %", "add_, 30 %", "a recipe"} <= set(texts(tmp_path / "roof.svg"))


HOSTILE = ("$x^2$", "$\\frac{", "_hidden", "a\nb", "[bold]", "x" * 500, "\x1b[31m")


def test_names_from_outside_are_drawn_as_they_are(tmp_path: Path):
    """Half a formula would raise, and a label that begins with an underscore would be left out."""
    from matplotlib.text import Text as Drawn

    figure, axes = plot._canvas(4, 4)  # pyright: ignore[reportPrivateUsage]
    plot._legend(axes, dict.fromkeys(HOSTILE, "red"))  # pyright: ignore[reportPrivateUsage]
    plot._titles(axes, HOSTILE[1], HOSTILE[0])  # pyright: ignore[reportPrivateUsage]
    plot._save(figure, tmp_path / "a.svg")  # pyright: ignore[reportPrivateUsage]
    drawn = {text.get_text() for text in figure.findobj(Drawn)}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert {"$x^2$", "$\\frac{", "_hidden", "a\\nb", "[bold]", "\\x1b[31m"} <= drawn
    svg = (tmp_path / "a.svg").read_text()
    for name in ("$x^2$", "$\\frac{", "_hidden", "a\\nb", "[bold]"):
        assert f">{name}<" in svg
