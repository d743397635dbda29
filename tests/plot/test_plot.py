"""The pictures: what they show, read back from the PNGs, and which samples they show."""

import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslx import plot
from sslx.bench import charts
from sslx.data.views import ViewSpec
from sslx.errors import DataError, MissingInput
from sslx.plot import canvas, confusion, embedding, thumbnails
from sslx.probe.confusion import Confusion
from sslx.probe.confusion import read as read_confusion


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
    plot.feature_map(*clusters(4), ("cat", "dog", "owl", "bat"), tmp_path / "new" / "map.png", "kNN 98.3 %")
    pixels = read(tmp_path / "new" / "map.png")
    assert min(pixels.shape[:2]) > 500
    for colour in plot.PALETTE[:4]:
        assert num_pixels(pixels, colour, plot.OPACITY) > 1500  # 30 points, some below a name
        assert 100 < num_pixels(pixels, colour) < 2000  # and a mark in the legend
    assert num_pixels(pixels, plot.PALETTE[4], plot.OPACITY) == 0


@pytest.mark.soak
def test_tsne_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        plot.feature_map(*clusters(3), None, tmp_path / name, "title", max_points=60, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_tsne_without_labels_has_one_colour(tmp_path: Path) -> None:
    plot.feature_map(clusters(3)[0], None, None, tmp_path / "map.png", "title")
    pixels = read(tmp_path / "map.png")
    assert num_pixels(pixels, plot.PALETTE[0], plot.OPACITY) > 2000
    assert num_pixels(pixels, plot.PALETTE[1], plot.OPACITY) == 0


@pytest.mark.soak
@pytest.mark.parametrize("classes", [15, pytest.param(30, marks=pytest.mark.slow)])
def test_tsne_of_many_classes_has_many_colours(classes: int, tmp_path: Path) -> None:
    plot.feature_map(*clusters(classes), None, tmp_path / "map.png", "title")
    colours, counts = np.unique(read(tmp_path / "map.png").reshape(-1, 3), axis=0, return_counts=True)
    spread = colours.max(1) - colours.min(1) > 40
    assert (counts[spread] > 100).sum() >= 0.8 * classes


def test_no_two_of_ten_classes_share_color_or_marker() -> None:
    for num in (2, 10):
        colors, markers = zip(*embedding.class_styles(num), strict=True)
        assert len(set(colors)) == len(set(markers)) == num
    for num in (15, 30):
        assert len(set(embedding.class_styles(num))) == num


def test_a_class_is_named_at_the_median_of_its_points_and_in_the_legend() -> None:
    places = np.concatenate([np.array([[x, y]]) + np.eye(2) for x, y in ((0, 0), (40, 0), (0, 40), (40.1, 0))])
    label = np.repeat(np.arange(4), 2)
    _, axes = canvas.canvas(4, 4)
    embedding._draw_classes(axes, places, label, ("cat", "dog", "owl", "bat"), per_inch=10)
    named = {text.get_text(): np.array(text.get_position()) for text in axes.texts}
    for name, row in (("cat", 0), ("owl", 2)):
        np.testing.assert_allclose(named[name], np.median(places[label == row], axis=0))
    assert abs(named["dog"][1] - named["bat"][1]) > 2, "moved apart, as one would lie over the other"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["cat", "dog", "owl", "bat"]


@pytest.mark.parametrize("num", [60, 400])
def test_thumbnails_cover_the_map_and_lie_over_no_other(num: int) -> None:
    places = np.random.default_rng(0).normal(size=(num, 2)) * (1.2, 1)
    side, gap = 0.07 * np.ptp(places[:, 0]), 0.007 * np.ptp(places[:, 0])
    rows, corners = thumbnails.arrange(places, side, gap)
    assert 40 <= len(rows) == len(set(rows.tolist())) <= 80
    for i, corner in enumerate(corners):
        away = np.abs(np.delete(corners, i, axis=0) - corner).max(1)
        assert away.min() >= side + gap - 1e-9
        others = np.delete(places[rows], i, axis=0)
        assert not ((others > corner) & (others < corner + side)).all(1).any(), "hides the point of another one"
        nearest = np.clip(places[rows[i]], corner, corner + side)
        assert np.abs(places[rows[i]] - nearest).max() <= 2.2 * side
    middle = (places.max(0) + places.min(0)) / 2
    for quarter in itertools.product((-1, 1), repeat=2):
        assert (((places[rows] - middle) * quarter) > 0).all(1).sum() >= 4, "some in every quarter"


@pytest.mark.soak
def test_the_map_shows_the_images_of_the_rows_that_it_asks_for(tmp_path: Path) -> None:
    x, asked = clusters(3)[0], list[int]()

    def green(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.tile(np.array([0, 1, 0], np.float32), (len(rows), 8, 8, 1))

    plot.feature_map(x, None, None, tmp_path / "map.png", "title", thumbnails=green)
    expected = len(asked) * (thumbnails.SIDE * 160) ** 2
    assert num_pixels(read(tmp_path / "map.png"), "#00ff00") == pytest.approx(expected, rel=0.1)
    assert 10 < len(asked) <= 72
    assert max(asked) < len(x)


@pytest.mark.slow
def test_umap_is_drawn_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("umap")
    assert plot.projections() == ("t-SNE", "UMAP")
    for name in ("a.svg", "b.svg"):
        plot.feature_map(*clusters(3), None, tmp_path / name, "title", by="UMAP")
    assert any("UMAP of 120 images" in text for text in texts(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_tsne_of_collapsed_features_is_drawn_and_of_too_few_samples_refused(tmp_path: Path) -> None:
    plot.feature_map(torch.ones(50, 8), torch.arange(50) % 2, None, tmp_path / "map.png", "title")
    assert num_pixels(read(tmp_path / "map.png"), plot.PALETTE[1]) > 100
    with pytest.raises(DataError, match="4 or more images"):
        plot.feature_map(torch.ones(3, 8), None, None, tmp_path / "map.png", "title")


def test_a_confusion_matrix_counts_as_scikit_learn_does_and_lists_the_largest() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix

    generator = torch.Generator().manual_seed(random.randrange(2**32))
    label, predicted = torch.randint(7, (2, 400), generator=generator)
    label[label == 5] = 4  # a class without images
    counted = Confusion.of("linear", label, predicted)
    expected = confusion_matrix(label, predicted, labels=range(7))
    assert counted.accuracy == accuracy_score(label, predicted)
    found = confusion.shares(counted, 7)
    assert np.isnan(found[5]).all()
    rows = [0, 1, 2, 3, 4, 6]
    np.testing.assert_allclose(found[rows], expected[rows] / expected[rows].sum(1, keepdims=True))
    wrong = np.where(np.eye(7, dtype=bool), 0, expected)
    listed = confusion.largest(counted, 5)
    assert [n for _, _, n, _ in listed] == sorted(wrong.ravel().tolist(), reverse=True)[:5]
    assert all(n == expected[a, b] and total == expected[a].sum() for a, b, n, total in listed)


@pytest.mark.parametrize("classes", [3, 40, 1200])
def test_a_picture_of_confusions_names_few_classes_and_lists_those_of_many(classes: int, tmp_path: Path) -> None:
    label = torch.arange(2 * classes) % classes
    predicted = torch.where(torch.arange(2 * classes) == 1, 0, label)
    names = [f"${i} class" for i in range(classes)]
    path = tmp_path / "confusion.json"
    path.write_bytes(Confusion.of("kNN", label, predicted).to_json(names, step=7, source="pets", split="test"))
    assert path.stat().st_size < 60 * classes
    plot.confusion_matrix(read_confusion(path), tmp_path / "a.svg", "my run")
    drawn = texts(tmp_path / "a.svg")
    assert "my run: confusions of the kNN classifier" in drawn
    accuracy = 100 * (1 - 1 / len(label))
    assert any(f"{len(label):,} test images of pets, step 7, accuracy {accuracy:.1f} %" in text for text in drawn)
    if classes == 3:
        assert drawn.count("$2 class") == 2, "a row and a column"
        assert [drawn.count(text) for text in ("100", "50")] == [2, 2]
    else:
        assert "$1 class taken for $0 class: 1 of 2" in drawn


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"counts": [[0, 3, 1]], "classes": ["a"]}', '{"counts": [], "classes": []}']
)
def test_damaged_confusions_are_one_line(damage: str, tmp_path: Path) -> None:
    (tmp_path / "confusion.json").write_text(damage)
    with pytest.raises(DataError, match=r"confusion\.json is damaged .*: run sslx probe again"):
        read_confusion(tmp_path / "confusion.json")


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
    records = [{"step": s, "loss": 5 - s / 100, "lr": s / 1000, "epoch": s / 50} for s in range(200)]
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
    once = [{"step": s, "loss": 1.0 / (s + 1)} for s in range(30)]
    again = [*once[:10], *({"step": s, "loss": 9.0} for s in range(10, 30)), *once[10:]]
    broken = [{"step": 40, "loss": float("nan")}, {"loss": 3.0}, {"step": 41}]
    tail = '[]\n7\nnull\n{"step": 1e400, "loss": 1}\n{"step": "a", "loss": 1}\n' + "[" * 100_000 + "\n"
    plot.loss_curve(metrics(tmp_path / "once", once), tmp_path / "once.png")
    plot.loss_curve(metrics(tmp_path / "twice", [*again, *broken], tail), tmp_path / "twice.png")
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "twice.png").read_bytes()


@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_short_run_has_a_curve_too(num: int, tmp_path: Path) -> None:
    records = [{"step": s, "loss": 2.0, "lr": 0.1, "epoch": float(s)} for s in range(num)]
    plot.loss_curve(metrics(tmp_path / "m", records), tmp_path / "loss.png")
    assert num_pixels(read(tmp_path / "loss.png"), plot.PALETTE[0]) > 10


def test_steps_and_epochs_are_whole_and_the_legend_is_below(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 9.0 + s / 1000, "lr": 0.1, "epoch": s / 9} for s in (1, 2)]
    path = metrics(tmp_path / "m", records)
    plot.loss_curve(path, tmp_path / "short.svg", title="my_run: pretraining loss")
    drawn = texts(tmp_path / "short.svg")
    assert {"1", "2", "my_run: pretraining loss"} <= set(drawn)
    assert not {"1.00", "1.25", "epoch"} & set(drawn), "no whole epoch has passed"
    assert not [text for text in drawn if text.startswith("+")], "losses are written out, not as an offset"
    metrics(path, [{"step": s, "loss": 9.0, "lr": 0.1, "epoch": s / 9} for s in (1, 20)])
    plot.loss_curve(path, tmp_path / "longer.svg")
    assert "epoch" in texts(tmp_path / "longer.svg")
    assert plot.epoch_marks(np.array([1, 20]), np.array([1, 20]) / 9) == pytest.approx({1: 9, 2: 18})
    heights = dict(zip(drawn, text_heights(tmp_path / "short.svg"), strict=True))
    assert heights["loss"] > heights["step"], "of the two texts 'loss' the later one is the legend's"


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
    assert [len(red), len(blue)] == pytest.approx([7 * len(green) / 2] * 2, rel=0.05)
    assert red[:, 1].max() < blue[:, 1].min(), "samples stand side by side"
    assert green[:, 0].min() > (red[:, 0].min() + red[:, 0].max()) / 2, "the second row is below the first"
    assert green[:, 1].max() == blue[:, 1].max(), "the dot is the upper right pixel of each"
    assert num_pixels(pixels, "#22262b") > 300, "a title"


def nodes(path: Path) -> list[ElementTree.Element]:
    """The texts of an SVG."""
    return list(ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text"))


def texts(path: Path) -> list[str]:
    return ["".join(node.itertext()) for node in nodes(path)]


def text_heights(path: Path) -> list[float]:
    """How far down each text of an SVG stands."""
    return [float(n.get("y") or re.findall(r"[-0-9.]+", n.get("transform") or "")[1]) for n in nodes(path)]


def test_neighbors_are_the_nearest_of_all_by_cosine() -> None:
    x, label = clusters(4)
    queries, rows, similar = plot.neighbors(x, 8, 6, 0)
    assert len(set(queries.tolist())) == 8
    assert set(label[queries].tolist()) == {0, 1, 2, 3}, "spread over the feature space"
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    for query, near, values in zip(queries, rows, similar, strict=True):
        cosines = unit @ unit[query]
        cosines[query] = -2
        best = np.argsort(-cosines, kind="stable")[:6]
        assert near.tolist() == best.tolist()
        np.testing.assert_allclose(values, cosines[best], atol=1e-12)
    again, other = (plot.neighbors(x, 8, 6, seed)[0].tolist() for seed in (0, 1))
    assert again == queries.tolist() != other


@pytest.mark.parametrize("num", [2, 5])
def test_few_and_collapsed_images_have_neighbors(num: int) -> None:
    queries, rows, similar = plot.neighbors(torch.ones(num, 3), 8, 6, 0)
    assert sorted(queries.tolist()) == list(range(num))
    assert rows.shape == similar.shape == (num, num - 1)
    assert all(query not in near for query, near in zip(queries, rows, strict=True))
    with pytest.raises(DataError, match="2 or more images"):
        plot.neighbors(torch.ones(1, 3), 8, 6, 0)


def test_a_sheet_has_the_query_first_and_lines_below(tmp_path: Path) -> None:
    colors = np.eye(3, dtype=np.float32)
    pixels = np.tile(colors[:, None, None], (1, 4, 4, 1))
    rows = [(pixels, ["query", "0.91 cat", "0.90 $dog"]), (pixels, ["query", "0.81", "0.80"])]
    for name in ("sheet.png", "sheet.svg"):
        plot.neighbor_sheet(rows, tmp_path / name, "title", "subtitle")
    drawn = read(tmp_path / "sheet.png")
    red, green, blue = (np.argwhere(np.abs(drawn - 255 * color).sum(-1) < 20) for color in colors)
    assert red[:, 1].max() < green[:, 1].min() < green[:, 1].max() < blue[:, 1].min()
    assert len(green) == pytest.approx(2 * (1.25 * 160) ** 2, rel=0.05)
    assert {"query", "0.91 cat", "0.90 $dog", "0.80", "title"} <= set(texts(tmp_path / "sheet.svg"))


def test_small_views_stand_side_by_side_in_white() -> None:
    view = ViewSpec(size=9)
    black = -torch.tensor(view.mean)[:, None, None] / torch.tensor(view.std)[:, None, None]
    sheet = plot.rgb(plot.side_by_side([black.expand(2, 3, 4, 4)] * 2, view, 9), view)
    assert sheet.shape == (2, 4, 9, 3)
    np.testing.assert_allclose(sheet[0, 0, :, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1], atol=1e-6)


def test_bars_are_as_long_as_their_values_and_ours_is_coloured(tmp_path: Path) -> None:
    rows = [("sslx", 3000.0, 2900.0, 3100.0), ("other", 1000.0, 900.0, 1100.0)]
    charts.bars(rows, tmp_path / "bars.png", "Title", "subtitle", highlight="sslx")
    pixels = read(tmp_path / "bars.png")
    gray = num_pixels(pixels, "#c3c8d0")
    assert num_pixels(pixels, plot.PALETTE[0]) == pytest.approx(3 * gray, rel=0.1)
    charts.bars(rows, tmp_path / "bars.svg", "Title", "subtitle", line=("limit", 2000.0))
    assert {"sslx", "other", "3,000", "1,000", "Title", "subtitle", "limit"} <= set(texts(tmp_path / "bars.svg"))


def test_curves_have_a_colour_each_and_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    series = [("strong", [(1.0, 10.0, 9.0, 11.0), (2.0, 18.0, 17.0, 19.0)]), ("weak", [(1.0, 10.0, 9.0, 11.0)])]
    for name in ("one.svg", "two.svg", "one.png"):
        charts.curves(series, tmp_path / name, "Title", "subtitle", x="ranks", y="samples/s", powers_of_2=True)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert {"strong", "weak", "ranks", "samples/s", "1", "2"} <= set(texts(tmp_path / "one.svg"))
    pixels = read(tmp_path / "one.png")
    assert num_pixels(pixels, plot.PALETTE[0]) > 2 * num_pixels(pixels, plot.PALETTE[1]) > 0


def test_a_roofline_has_its_operators_below_the_roof(tmp_path: Path) -> None:
    points = [("mm", 0.7, 50.0, 8e11), ("add_", 0.3, 0.1, 1e9)]
    charts.roofline(points, 1e12, 2e10, tmp_path / "roof.svg", "a recipe")
    assert {"mm, 70 %", "add_, 30 %", "a recipe"} <= set(texts(tmp_path / "roof.svg"))


HOSTILE = ("$x^2$", "$\\frac{", "_hidden", "a\nb", "[bold]", "x" * 500, "\x1b[31m")


def test_names_from_outside_are_drawn_as_they_are(tmp_path: Path):
    """Half a formula would raise, and a label that begins with an underscore would be left out."""
    from matplotlib.text import Text as Drawn

    figure, axes = canvas.canvas(4, 4)
    canvas.legend(axes, dict.fromkeys(HOSTILE, ("red", "o")))
    canvas.titles(axes, HOSTILE[1], HOSTILE[0])
    canvas.save(figure, tmp_path / "a.svg")
    drawn = {text.get_text() for text in figure.findobj(Drawn)}  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert {"$x^2$", "$\\frac{", "_hidden", "a\\nb", "[bold]", "\\x1b[31m"} <= drawn
    svg = (tmp_path / "a.svg").read_text()
    for name in ("$x^2$", "$\\frac{", "_hidden", "a\\nb", "[bold]"):
        assert f">{name}<" in svg
