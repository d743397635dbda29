"""All probes together: the scores, their table and JSON, and errors that tell what to do."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from sslx.errors import ConfigError, DataError
from sslx.probe import Config, Score, as_json, evaluate, knn, linear, low_shot, table
from sslx.probe.features import Features


def clusters(size: int, spread: float = 0.4, classes: int = 3) -> Features:
    generator = torch.Generator().manual_seed(size)
    label = torch.arange(size) % classes
    x = torch.eye(classes, 8)[label] + spread * torch.randn(size, 8, generator=generator)
    return Features(x, label, torch.arange(size))


TRAIN, TEST = clusters(150), clusters(90)


def rendered(scores: list[Score], note: str = "") -> str:
    text = io.StringIO()
    Console(file=text, width=120, color_system="standard", force_terminal=True).print(table(scores, "scores", note))
    return text.getvalue()


def test_evaluate_runs_each_probe_with_its_settings() -> None:
    config = Config(k=9, temperature=0.2, shots=(2,), num_draws=3, seed=5)
    score = evaluate(config, TRAIN, TEST, "ours", 3)
    assert (score.name, score.dim) == ("ours", 8)
    assert score.knn == knn.accuracy(TRAIN, TEST, 3, 9, 0.2)
    assert (score.linear, score.C) == linear.accuracy(TRAIN, TEST, 3, seed=5)
    assert score.low_shot == {2: low_shot.accuracy(TRAIN, TEST, 2, 3, draws=3, seed=5)}


def test_probes_can_be_left_out() -> None:
    score = evaluate(Config(k=0, linear=False, shots=()), TRAIN, TEST, "ours", 3)
    assert score == Score("ours", 8, None, None, None, {})
    text = rendered([replace(score, linear=0.5)])
    assert "linear" in text
    assert "kNN" not in text


def test_table_has_percentages_and_the_best_in_bold() -> None:
    scores = [
        Score("raw pixels", 192, 0.9, 0.95, 1.0, {1: (0.4, 0.05), 5: (0.7, 0.02)}),
        Score("pretrained", 512, 0.98, 0.95, 0.1, {1: (0.6, 0.04), 5: (0.65, 0.011)}),
    ]
    text = rendered(scores, "on 10 classes")
    bold = "\x1b[1m"
    for wanted in ("raw pixels", "1 label per class", "5 labels per class", "on 10 classes"):
        assert wanted in text
    for best in ("98.0", "95.0", "60.0 ± 4.0", "70.0 ± 2.0"):
        assert f"{bold}{best}" in text
    assert text.count(f"{bold}95.0") == 2
    for other in ("90.0", "40.0 ± 5.0", "65.0 ± 1.1"):
        assert other in text
        assert f"{bold}{other}" not in text
    assert f"{bold}98.0" not in rendered(scores[1:])


def test_json_has_the_numbers() -> None:
    score = Score("ours", 8, 0.9, None, None, {5: (0.7, 0.02)}, k=20)
    (found,) = json.loads(json.dumps(as_json([score])))
    assert found.pop("low_shot") == {"5": {"mean": 0.7, "std": 0.02}}
    assert found == {"name": "ours", "dim": 8, "knn": 0.9, "linear": None, "C": None, "k": 20}


@pytest.mark.parametrize(
    "given", [{"k": -1}, {"temperature": 0.0}, {"shots": (0,)}, {"shots": (1, 1)}, {"num_draws": 0}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"probe.{next(iter(given))}: expected .* got"):
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
