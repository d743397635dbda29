"""All probes together: the scores, their table and JSON, and errors that tell what to do."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from sslx.errors import ConfigError, DataError
from sslx.probe import Config, Score, as_json, evaluate, fine_tune, knn, linear, low_shot, probes, sgd, tables
from sslx.probe.features import Features


def clusters(size: int, spread: float = 0.4, classes: int = 3) -> Features:
    generator = torch.Generator().manual_seed(size)
    label = torch.arange(size) % classes
    x = torch.eye(classes, 8)[label] + spread * torch.randn(size, 8, generator=generator)
    return Features(x, label, torch.arange(size))


TRAIN, TEST = clusters(150), clusters(90)


def rendered(scores: list[Score], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system="standard", force_terminal=True)
    for table in tables.fitting([score.name for score in scores], probes.columns(scores), console):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_evaluate_runs_each_probe_with_its_settings() -> None:
    config = Config(k=(3, 9), temperature=0.2, shots=(2,), fractions=(0.1,), num_draws=3, num_fraction_draws=2, seed=5)
    score = evaluate(config, TRAIN, TEST, "ours", 3)
    assert (score.name, score.dim) == ("ours", 8)
    assert (score.k, score.knn_held_out) == knn.choose_k(TRAIN, 3, (3, 9), 0.2, seed=5)
    assert score.knn == knn.accuracy(TRAIN, TEST, 3, score.k, 0.2)
    assert (score.linear, score.C) == linear.accuracy(TRAIN, TEST, 3, seed=5)
    assert score.low_shot == {2: low_shot.accuracy(TRAIN, TEST, 2, 3, draws=3, seed=5)}
    assert score.fractions == {0.1: low_shot.accuracy(TRAIN, TEST, 0.1, 3, draws=2, seed=5)}
    assert score.sgd is None


def test_probes_can_be_left_out() -> None:
    score = evaluate(Config(k=(), linear=False, shots=(), fractions=(), sgd=True), TRAIN, TEST, "ours", 3)
    by_sgd = sgd.score(TRAIN, TEST, 3)
    expected = Score("ours", 8, None, None, None, {}, sgd=by_sgd.accuracy, sgd_lr=by_sgd.lr)
    assert score == replace(expected, sgd_batch_size=by_sgd.batch_size)
    text = rendered([score])
    assert "SGD" in text
    assert "kNN" not in text


def test_table_has_percentages_and_the_best_in_bold() -> None:
    scores = [
        Score("raw [pixels]", 192, 0.9, 0.95, 1.0, {1: (0.4, 0.05), 5: (0.7, 0.02)}, fractions={0.01: (0.3, 0.01)}),
        Score("pretrained", 512, 0.98, 0.95, 0.1, {1: (0.6, 0.04), 5: (0.65, 0.011)}, fractions={0.01: (0.8, 0.01)}),
    ]
    text = rendered(scores)
    bold = "\x1b[1m"
    for wanted in ("raw [pixels]", "1 label", "5 labels", "per class", "1 % of"):
        assert wanted in text
    for best in ("98.0", "95.0", "60.0 ± 4.0", "70.0 ± 2.0", "80.0 ± 1.0"):
        assert f"{bold}{best}" in text
    assert text.count(f"{bold}95.0") == 2
    for other in ("90.0", "40.0 ± 5.0", "65.0 ± 1.1"):
        assert other in text
        assert f"{bold}{other}" not in text
    assert f"{bold}98.0" not in rendered(scores[1:])


@pytest.mark.parametrize(("width", "num_tables"), [(120, 1), (80, 2), (62, 3)])
def test_columns_go_to_as_few_tables_as_fit(width: int, num_tables: int) -> None:
    shots = {1: (0.4, 0.05), 5: (0.7, 0.02), 10: (0.9, 0.011)}
    score = Score("pretrained encoder", 512, 0.98, 0.95, 0.1, shots, fractions={0.01: (0.3, 0.01), 0.1: (0.5, 0.01)})
    lines = rendered([score, replace(score, name="raw pixels")], width).splitlines()
    assert sum("representation" in line for line in lines) == num_tables
    assert sum("pretrained encoder" in line for line in lines) == num_tables, "no cell wraps"


def test_json_has_the_numbers() -> None:
    score = Score("ours", 8, 0.9, None, None, {5: (0.7, 0.02)}, 20, {10: 0.8, 20: 0.9}, {0.1: (0.6, 0.03)})
    tuned = fine_tune.Score(0.8, 0.1, 0.05, 14, 3, 8, 200, "SGD")
    (found,) = json.loads(json.dumps(as_json([replace(score, fine_tuned={0.01: tuned})])))
    assert found.pop("fine_tuned") == {
        "0.01": {
            "mean": 0.8, "std": 0.1, "lr": 0.05, "num_labels": 14, "num_draws": 3, "batch_size": 8, "num_steps": 200,
            "recipe": "SGD",
        }
    }  # fmt: skip
    assert found.pop("low_shot") == {"5": {"mean": 0.7, "std": 0.02}}
    assert found.pop("fractions") == {"0.1": {"mean": 0.6, "std": 0.03}}
    assert found.pop("knn_held_out") == {"10": 0.8, "20": 0.9}
    assert {name: value for name, value in found.items() if "sgd" not in name} == {
        "name": "ours", "dim": 8, "knn": 0.9, "linear": None, "C": None, "k": 20,
    }  # fmt: skip


def test_what_the_labels_do_not_allow_is_left_out_and_said() -> None:
    label = torch.tensor([0] * 30 + [1] * 30 + [2])
    config, lines = probes.feasible_probes(Config(sgd=True, fine_tune=(0.02, 1.0)), label, ["cat", "dog", "[rare]"])
    assert (config.shots, config.fractions, config.linear, config.sgd) == ((1,), (0.1,), True, True)
    assert config.fine_tune == (1.0,)
    assert lines == [
        "no probe with 5 labels per class: class [rare] has 1 training image",
        "no probe with 10 labels per class: class [rare] has 1 training image",
        "no probe with 1 % of labels: 0.61 of 61 labels is less than one of each class",
        "no fine-tuning on 2 % of labels: 1.2 of 61 labels is less than one of each class",
        "kNN with at most 20 neighbors, not 100, 200: a class has 20 training images on average",
    ]
    config, lines = probes.feasible_probes(Config(shots=(1,), fractions=(), k=(5,)), torch.arange(3), ())
    assert not config.linear
    assert lines == [
        "no linear probe: choosing its regularization needs 2 training images of a class",
        "kNN with 1 neighbor, not 5: a class has 1 training image on average",
    ]


def test_classes_without_test_images_are_named() -> None:
    train, test = torch.arange(40) % 4, torch.tensor([3, 3, 1])
    assert probes.missing_classes(train, train[:4], ()) == ""
    line = probes.missing_classes(train, test, ["a", "b", "c", "d"])
    assert line == (
        "the test split has no image of 2 of 4 classes, the first of which is a: the scores say nothing of them"
    )


@pytest.mark.parametrize(
    "given",
    [
        {"k": (0,)}, {"k": (5, 5)}, {"temperature": 0.0}, {"shots": (0,)}, {"shots": (1, 1)}, {"fractions": (1.0,)},
        {"num_draws": 0}, {"num_fraction_draws": 0}, {"seed": -1}, {"num_views": 1}, {"cache_gb": -1.0},
        {"fine_tune": (1.5,)}, {"fine_tune": (0.1, 0.1)}, {"fine_tune_lrs": (0.0,)}, {"fine_tune_epochs": 0},
        {"fine_tune_batch_size": 1}, {"num_fine_tune_draws": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"probe.{next(iter(given)).replace('_', '-')}: expected .* got"):
        Config(**given)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (replace(TRAIN, label=None), TEST, "need labels, and this source has none"),
        (TRAIN, replace(TEST, label=None), "need labels, and this source has none"),
        (replace(TRAIN, label=torch.ones(150, dtype=torch.int64)), TEST, "all training samples have label 1"),
        (replace(TRAIN, label=torch.arange(150) % 2), TEST, r"1 of 3 classes have none \(the first is label 2\)"),
        (TRAIN, replace(TEST, label=torch.arange(90) % 3 - 1), "labels from 0 to 2 in the test split, got -1"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line_errors(train: Features, test: Features, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        evaluate(Config(), train, test, "ours", 3)
    assert "\n" not in str(caught.value)
