"""``sslx compare``: rankings by scores without labels, their agreement with accuracies, and what cannot be compared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.processes import is_one_line
from sslx import cli
from sslx.probe import compare

NAMES = ("a", "b", "[c]", "d", "e", "f")


def probed(folder: Path, *, labeled: bool = True, record: dict[str, Any] | None = None, **scores: Any) -> Path:
    """A run folder with a ``probe.json`` of random scores."""
    draw = np.random.default_rng().uniform
    row = {"name": "pretrained encoder", "dim": 64, "num_images": 300, "num_views": 10, "std": 0.9, "retrieval": 0.5}
    row |= {"rank": draw(1, 64), "lidar": draw(1, 64), "alpha": draw(0.1, 3), "alignment": draw(0, 1)}
    row |= {"uniformity": draw(-4, 0)}
    other = {**row, "name": "untrained encoder", "rank": 64.0}
    accuracies = [{"name": row["name"], "knn": draw(0.1, 1), "linear": draw(0.1, 1)}] if labeled else []
    whole = {"step": 5, "source": "digits", "view_px": 8, "split": "test", "num_images": 355, "scores": accuracies}
    whole |= {"label_free": [other, row | scores], "augmented_as": "runs/a"}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "probe.json").write_text(json.dumps(whole | (record or {})))
    return folder


def test_runs_are_ranked_in_the_direction_of_each_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [probed(tmp_path / name) for name in NAMES]
    output = tmp_path / "comparison.json"
    assert cli.main(["compare", *map(str, folders), "--json", str(output)]) == 0
    out = capsys.readouterr().out
    for words in (*NAMES, "RankMe", "nearer 1", "2202.05808", "Bonett and Wright", f"wrote {output}"):
        assert words in out
    assert "note:" not in out
    found = json.loads(output.read_text())
    keys = {
        "rank": lambda value: -value,
        "lidar": lambda value: -value,
        "alpha": lambda value: abs(value - 1),
        "alignment": lambda value: value,
        "uniformity": lambda value: value,
    }
    for key, badness in keys.items():
        best_first = sorted(found["runs"], key=lambda run: badness(run[key]))
        assert [run["ranks"][key] for run in best_first] == [1, 2, 3, 4, 5, 6], key
    means = [run["ranks"]["mean_rank"] for run in found["runs"]]
    assert means == sorted(means)
    assert means == [pytest.approx(np.mean([run["ranks"][key] for key in keys])) for run in found["runs"]]
    for accuracy in ("knn", "linear"):
        by_accuracy = sorted(found["runs"], key=lambda run: -run[accuracy])
        gaps = [run["ranks"]["lidar"] - place for place, run in enumerate(by_accuracy, 1)]
        rho = 1 - 6 * sum(gap**2 for gap in gaps) / (6 * 35)  # Spearman's formula without ties
        assert found["agreement"]["lidar"][accuracy]["rho"] == pytest.approx(rho)
        assert found["agreement"]["lidar"][accuracy]["num_runs"] == 6


def test_runs_without_a_score_have_no_rank_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [probed(tmp_path / name, labeled=False) for name in "abc"]
    folders.append(probed(tmp_path / "d", labeled=False, alpha=None, lidar=float("nan"), dim=3))
    comparison = compare.compare(compare.read_all(folders))
    (row,) = [i for i, run in enumerate(comparison.runs) if run.folder.name == "d"]
    assert np.isnan([comparison.ranks[key][row] for key in ("alpha", "lidar")]).all()
    common = ("rank", "alignment", "uniformity")
    np.testing.assert_allclose(
        comparison.ranks["mean_rank"], np.mean([comparison.ranks[key] for key in common], axis=0)
    )
    assert cli.main(["compare", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert "note: the runs differ in the number of dimensions" in out
    assert "No rho with accuracies: it needs three or more runs" in out


def test_the_interval_covers_the_true_rho_in_95_of_100_samples():
    """Of pairs that are normal with correlation r, whose Spearman's rho is 6 / pi * asin(r / 2)."""
    generator, num = np.random.default_rng(), 500
    for r in (0.0, 0.6):
        pairs = generator.multivariate_normal([0, 0], [[1, r], [r, 1]], (num, 26))
        found = [compare.spearman(x, y) for x, y in pairs.transpose(0, 2, 1)]
        true = 6 / math.pi * math.asin(r / 2)
        covered = [each.low < true < each.high for each in found if each and each.low is not None and each.high]
        assert len(covered) == num
        assert 0.9 < np.mean(covered) < 0.99, r


def test_rankings_that_have_no_rho_or_no_interval():
    x = np.random.default_rng().normal(size=6)
    assert compare.spearman(x[:2], x[:2]) is None
    assert compare.spearman(x, np.ones(6)) is None
    for found, rho, num_runs in (
        (compare.spearman(np.where(x == x[0], np.nan, x), x), 1, 5),
        (compare.spearman(x[:3], -x[:3]), -1, 3),
    ):
        assert found
        assert (found.low, found.high, found.num_runs) == (None, None, num_runs)
        assert found.rho == pytest.approx(rho, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("one run", 64, "expected two or more different run folders, got"),
        ("twice", 64, "expected two or more different run folders, got"),
        ("no run", 66, "no config.json: "),
        ("not probed", 66, "run sslx probe "),
        ("only with labels", 66, "run sslx probe "),
        ("other images", 65, "on 300 of 355 test images of photos: probe them together"),
        ("damaged", 65, "probe.json was not written by sslx probe"),
        ("unwritable", 74, "cannot write"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    case: str, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first, second = probed(tmp_path / "a"), tmp_path / "b"
    if case != "no run":
        probed(second, record={"source": "photos"} if case == "other images" else None)
    if case == "not probed":
        (second / "probe.json").unlink()
    elif case == "only with labels":
        record = json.loads((second / "probe.json").read_text())
        (second / "probe.json").write_text(json.dumps({key: record[key] for key in record if key != "label_free"}))
    elif case == "damaged":
        (second / "probe.json").write_text('{"step": 5, "scores": [3], "label_free": []}')
    runs = {"one run": [first], "twice": [first, first]}.get(case, [first, second])
    flags = ["--json", str(tmp_path / "none" / "c.json")] if case == "unwritable" else []
    assert cli.main(["compare", *map(str, runs), *flags]) == code
    is_one_line(capsys.readouterr().err, words, "b" if len(runs) == 2 and runs[0] != runs[1] else "")
