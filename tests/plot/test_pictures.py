"""sslx probe and sslx plot where there are no labels, no test split, or hardly any images: there is no dead end."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from kit.processes import TINY, is_one_line
from kit.sources import paths_of
from sslx import cli, data, plot
from sslx.config import PlotConfig, load_plot
from sslx.console.bars import Bars
from sslx.data.order import Sequential
from sslx.data.sources import Source, digits, stl10
from sslx.distributed import Ranks
from sslx.plot import pictures
from sslx.probe import confusion, features, geometry, held_out, images, scorecard
from sslx.trained import Trained, load

CPU = torch.device("cpu")
READ = ["--source.name", "folder", "--data.backend", "torchvision", "--data.threads", "0"]
MAPS = [pictures.MAPS[projection] for projection in plot.projections()]
PICTURES = ("loss.png", *MAPS, "neighbors.png", "views.png")
Said = Callable[..., list[str]]


def write_images(folder: Path, number: int, seed: int = 0) -> Path:
    """Pictures of their own colors, 24 px."""
    folder.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (number, 3, 3, 3), np.uint8)
    for i, pixels in enumerate(coarse):
        Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    return folder


def pretrain(folder: Path, *flags: str) -> Path:
    """A run r in this folder on the photos in it."""
    argv = [*TINY, *READ, "--source.root", str(folder / "photos"), "--runs", str(folder), "--name", "r", *flags]
    assert cli.main(["pretrain", *argv]) == 0
    return folder / "r"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 120 photos without labels and without a test split."""
    return pretrain(write_images(tmp_path_factory.mktemp("flat") / "photos", 120).parent)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes of 30, 20 and 10 images, without a test split, with small crops."""
    folder = tmp_path_factory.mktemp("classes")
    for seed, (name, number) in enumerate((("cat", 30), ("dog", 20), ("[owl]", 10))):
        write_images(folder / "photos" / name, number, seed)
    return pretrain(
        folder, *"--method.name swav --method.num-local 4 --method.num-prototypes 8 --method.queue-size 0".split()
    )


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The lines that a command prints; an error, where one is expected, is one line with these words."""

    def call(*argv: object, error: str = "") -> list[str]:
        capsys.readouterr()
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        if error:
            assert code in (65, 66)
            is_one_line(err, error, "--source.")
        else:
            assert (code, err) == (0, "")
        return out.splitlines()

    return call


def options_of(trained: Trained, *flags: str) -> PlotConfig:
    return load_plot([str(trained.folder), *flags], trained.settings)


def scene(run: Path) -> pictures.Scene:
    trained = load(run)
    options = options_of(trained)
    splits = images.splits(trained, options, lambda _: None, min_images=held_out.MIN_IMAGES_TO_SHOW)
    return pictures.Scene(trained, options, splits, CPU)


def training(of: pictures.Scene, source: Source, batch_size: int) -> data.Loader:
    """The loader that the run trains with."""
    specs, seed, ranks = of.trained.views, of.trained.settings.seed, Ranks(device=CPU)
    settings = of.options.data
    return data.training(settings, source, specs, batch_size=batch_size, seed=seed, ranks=ranks, dtype=torch.float32)


def test_probe_without_labels_scores_and_says_what_labels_would_add(flat: Path, said: Said) -> None:
    lines = said("probe", flat)
    text = "\n".join(lines)
    (line,) = [line for line in lines if line.startswith("no test split: ")]
    assert "50 of the 120 training images are held out in its place, which the encoder has seen in training" in line
    assert "--source.test-root" in line
    for word in ("RankMe", "alignment: ", "uniformity: ", "retrieval: ", "kNN, linear and few-label accuracy"):
        assert word in text
    assert f"wrote {flat / 'probe.json'}" in lines
    record = json.loads((flat / "probe.json").read_text())
    assert (record["scores"], record["split"], record["num_images"]) == ([], "held-out training", 50)
    pixels, _, ours = record["label_free"]
    assert [pixels["name"], ours["name"]] == ["raw pixels", "pretrained encoder"]
    assert pixels["rank"] is None
    of = scene(flat)
    encoder = of.trained.encoder
    batches = of.loader(of.splits.test, of.trained.view)
    x = features.extract(encoder, batches, num_samples=50).x
    assert ours["rank"] == pytest.approx(float(geometry.rank_me(x)), rel=1e-4)
    assert 0 <= ours["retrieval"] <= 1
    assert 0 < ours["alignment"] < 4


def test_the_pairs_of_alignment_are_the_training_loaders_views(flat: Path) -> None:
    of = scene(flat)
    test, order = of.splits.test, Sequential(num_samples=50, per_rank=16)
    options: dict[str, Any] = {"seed": of.trained.settings.seed, "ranks": Ranks(device=CPU), "dtype": torch.float32}
    batches = list(data.in_order(of.options.data, test, of.trained.views, order, **options))
    epoch = next(training(of, test, 50))
    for view in (0, 1):
        ours = torch.cat([batch.views[view] for batch in batches])
        torch.testing.assert_close(ours[epoch.index], epoch.views[view], rtol=0, atol=0)


def test_plot_draws_an_unlabeled_run(flat: Path, said: Said) -> None:
    lines = said("plot", flat)
    assert lines[-1] == "wrote " + ", ".join(str(flat / name) for name in PICTURES)
    assert len([line for line in lines if "no test split" in line]) == 1
    for name in PICTURES:
        with Image.open(flat / name) as image:
            assert min(image.size) > 400
    said("probe", flat, "--source.test-root", write_images(flat.parent / "others", 6, 9))
    assert json.loads((flat / "probe.json").read_text())["split"] == "test"


@pytest.mark.soak
def test_the_views_are_those_of_the_first_batch_and_of_the_next_epoch(flat: Path, classes: Path) -> None:
    for run, num_views, num_epochs in ((flat, 2, 2), (classes, 6, 1)):
        of = scene(run)
        index, epochs, source = pictures.training_views(of)
        first = next(training(of, source, 16))
        assert first.index[:6].tolist() == index.tolist()
        assert [len(views) for views in epochs] == [num_views] * num_epochs
        for ours, theirs in zip(epochs[0], first.views, strict=True):
            torch.testing.assert_close(ours, theirs[:6], rtol=0, atol=0)
    of = scene(flat)
    index, epochs, source = pictures.training_views(of)
    loader = training(of, source, 20)
    later = dict[int, torch.Tensor]()
    for batch, _ in zip(loader, range(12), strict=False):
        later |= zip(batch.index.tolist(), batch.views[1], strict=True)
    for place, i in enumerate(index.tolist()):  # of 120 images, batches 7 to 12 are the second epoch's
        torch.testing.assert_close(epochs[1][1][place], later[i], rtol=0, atol=0)


def test_small_crops_stand_side_by_side(classes: Path) -> None:
    of = scene(classes)
    _, (views,), _ = pictures.training_views(of)
    names = [name for name, _ in pictures.rows_of_views(views, of.trained.view)]
    assert names == ["view 1, 16 px", "view 2, 16 px", "view 3, 8 px", "view 4, 8 px", "view 5, 8 px", "view 6, 8 px"]
    small = [torch.zeros(2, 3, 24, 24)] * 3 + [torch.zeros(2, 3, 7, 7)] * 5
    rows = pictures.rows_of_views(small, of.trained.view)
    assert [name for name, _ in rows[3:]] == ["views 4 to 6, 7 px", "views 7 and 8, 7 px"]
    assert all(row.shape[3] == 24 for _, row in rows)


def test_the_held_out_part_is_stratified_and_no_probe_trains_on_it(classes: Path, said: Said) -> None:
    trained = load(classes)
    options = options_of(trained)
    splits = images.splits(trained, options, lambda _: None)
    train, test = paths_of(splits.train), paths_of(splits.test)
    assert splits.test.facts.labels is not None
    assert not set(train) & set(test)
    assert sorted([*train, *test]) == paths_of(splits.all_train)
    assert np.bincount(splits.test.facts.labels).tolist() in ([2, 6, 4], [2, 4, 6])
    of_another_seed = replace(trained, config_text=trained.config_text.replace('"seed": 0', '"seed": 5'))
    assert of_another_seed.settings.seed == 5
    other = images.splits(of_another_seed, options, lambda _: None)
    assert paths_of(other.test) == test, "not a function of the run's seed"
    lines = said("probe", classes, "--probe.num-draws", "2")
    (line,) = [line for line in lines if line.startswith("no test split: ")]
    assert "12 of the 60 training images" in line
    assert "seen in training, without their labels" in line
    record = json.loads((classes / "probe.json").read_text())
    assert (record["split"], record["num_images"], len(record["scores"])) == ("held-out training", 12, 3)


@pytest.mark.soak
def test_a_labeled_run_is_drawn_too(classes: Path, said: Said) -> None:
    said("probe", classes, "--no-baselines", "--probe.no-label-free", "--probe.shots", "--probe.fractions")
    (score,) = json.loads((classes / "probe.json").read_text())["scores"]
    counted = confusion.read(classes / "confusion.json")
    assert counted.confusion.classifier == "linear"
    assert counted.confusion.accuracy == score["linear"]
    assert (counted.classes, counted.confusion.num_images) == (("[owl]", "cat", "dog"), 12)
    lines = said("plot", classes)
    assert lines[-1] == "wrote " + ", ".join(str(classes / n) for n in (PICTURES[0], "confusion.png", *PICTURES[1:]))
    assert ("no map by UMAP, which needs a package: pip install umap-learn" in lines) == (len(MAPS) == 1)


def test_an_unlabeled_test_folder_gives_way_to_held_out_labels(classes: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 10)
    write_images(tmp_path / "test", 5)
    trained = load(classes)
    lines = list[str]()
    splits = images.splits(trained, options_of(trained, "--source.root", str(tmp_path)), lines.append)
    assert splits.name == "held-out training"
    assert "have no labels" in lines[-1]
    assert "has seen" not in lines[-1], "these are not the run's images"
    flags = ["--source.root", str(tmp_path / "train"), "--source.test-root", str(tmp_path / "test")]
    named = images.splits(trained, options_of(trained, *flags), lines.append)
    assert named.name == "test", "what the user names is taken"


def test_a_short_run_is_told_that_it_was_short(classes: Path) -> None:
    trained = load(classes)
    source = trained.settings.source
    splits, lines = images.splits(trained, options_of(trained), lambda _: None), list[str]()
    worse = {"raw pixels": 0.5, "pretrained encoder": 0.25}
    assert scorecard.warn_few_steps(trained, splits, source, worse, "kNN", lines.append)
    assert "kNN: 25.0 % against 50.0 %): it was trained for only 2 steps (0.7 epochs)" in lines[0]
    assert not scorecard.warn_few_steps(trained, splits, source, {**worse, "raw pixels": 0.2}, "kNN", lines.append)
    long = replace(trained, step=600)
    assert not scorecard.warn_few_steps(long, splits, source, worse, "kNN", lines.append)


@pytest.mark.parametrize(
    ("layout", "probed", "drawn"),
    [
        ({"": 1}, "expected 2 or more images to tell apart, got 1", ("loss.png", "views.png")),
        ({"": 2}, "", ("loss.png", "neighbors.png", "views.png")),
        ({"cat": 1, "dog": 1, "owl": 1}, "", ("loss.png", "neighbors.png", "views.png")),
        ({"cat": 8}, "", PICTURES),
        ({}, "no images below", ("loss.png",)),
    ],
    ids=["one image", "two images", "classes of one image", "one class", "none"],
)
def test_hardly_any_images_are_a_line_and_no_traceback(
    layout: dict[str, int], probed: str, drawn: tuple[str, ...], flat: Path, tmp_path: Path, said: Said
) -> None:
    root = write_images(tmp_path / "few", 0)
    for name, number in layout.items():
        write_images(root / name, number)
    lines = said("probe", flat, "--source.root", root, error=probed)
    assert probed or any(line.startswith("scores without labels: ") for line in lines)
    lines = said("plot", flat, "--source.root", root)
    assert "wrote " + ", ".join(str(flat / name) for name in drawn) in lines
    if len(drawn) < len(PICTURES):
        assert [line for line in lines if line.startswith("left out: ")]


@pytest.mark.soak
def test_a_map_of_classes_of_one_image_is_the_unlabeled_ones(flat: Path, tmp_path: Path, said: Said) -> None:
    """Their colors would tell nothing: it shows the images in their place."""
    plain, classes = write_images(tmp_path / "plain", 6), tmp_path / "classes"
    for path in sorted(plain.iterdir()):
        (classes / path.stem).mkdir(parents=True)
        (classes / path.stem / path.name).write_bytes(path.read_bytes())
    maps: list[np.ndarray] = []
    for root in (plain, classes):
        said("plot", flat, "--source.root", root)
        maps.append(np.asarray(Image.open(flat / "tsne.png").convert("RGB")))
    assert np.array_equal(maps[0], maps[1])


def test_a_wrong_test_root_is_an_error(flat: Path, tmp_path: Path, said: Said) -> None:
    said("probe", flat, "--source.test-root", tmp_path / "typo", error="--source.test-root")


def test_all_stages_share_one_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    bars = Bars(console, True)
    with bars.display:
        for stage in ("raw pixels", "pretrained encoder"):
            bars.stage = stage
            for what in ("features", "kNN"):
                bars(what, 3, 7)
    (task,) = bars.display.tasks
    assert task.description == "pretrained encoder: kNN"
    assert (task.completed, task.total) == (3, 7)
    silent = Console(file=io.StringIO())
    with Bars(silent, True).display:
        pass
    assert silent.file.getvalue() == "", "nothing where no terminal is"  # pyright: ignore[reportAttributeAccessIssue]


def test_more_images_than_are_trained_on_with_labels() -> None:
    assert stl10.Config.has_unlabeled
    assert not digits.Config.has_unlabeled
