"""READMEs say what the results do, and a figure that does not is found."""

import json
from functools import partial
from pathlib import Path

import figures
import pytest

import report
from sslx.bench import charts


def test_every_figure_between_marks_is_that_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_is_found_and_mended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = (Path(report.__file__).parent / "README.md").read_text()
    changed = tmp_path / "README.md"
    line = next(line for line in original.splitlines() if line.startswith("| pretrained encoder |"))
    changed.write_text(original.replace(line, line.replace("| pretrained encoder | ", "| pretrained encoder | 1")))
    assert changed.read_text() != original
    monkeypatch.setattr(report, "READMES", [changed])
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert changed.read_text() == original


def test_a_value_in_a_sentence_is_written_and_a_wrong_mark_is_refused() -> None:
    seconds = figures.startup()["one_s"]
    assert report.written("takes <!-- startup.one_s -->?<!-- /startup.one_s --> s") == (
        f"takes <!-- startup.one_s -->{seconds}<!-- /startup.one_s --> s"
    )
    for text, message in {
        "<!-- startup.one_s -->9<!-- /startup.two_s -->": "2 marks enclose 0 figures",
        "takes <!-- startup.one_s -->9 s": "1 marks enclose 0 figures",
        "takes <!-- startup.three_s -->9<!-- /startup.three_s --> s": "no figure startup.three_s",
        "takes\n<!-- startup.one_s -->9<!-- /startup.one_s --> s": "begins a line",
    }.items():
        with pytest.raises(ValueError, match=message):
            report.written(text)


def test_a_recipe_with_another_score_is_reported_and_not_edited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = next(path for path in report.RECIPES if path.stem == "simclr_cifar10_6min").read_text()
    changed = tmp_path / "simclr_cifar10_6min.toml"
    changed.write_text(original.replace("# Score: kNN ", "# Score: kNN 1"))
    text = changed.read_text()
    assert text != original
    monkeypatch.setattr(report, "RECIPES", [changed])
    monkeypatch.setattr(report, "READMES", [])
    assert report.main([]) == 1
    assert changed.read_text() == text
    line = next(line for line in original.splitlines() if line.startswith("# Score: "))
    assert f"Write: {line}" in capsys.readouterr().out


def test_the_newest_line_of_a_key_counts_and_machines_do_not_mix(tmp_path: Path) -> None:
    lines = [{"size": size, "value": value, "cores": 2} for size, value in ((1, 1), (2, 2), (1, 3))]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [r["value"] for r in figures.newest("x", "size", folder=tmp_path)] == [3, 2]
    assert [r["value"] for r in figures.newest("x", folder=tmp_path, size=2)] == [2]
    path.write_text(path.read_text() + json.dumps({"size": 3, "value": 4, "cores": 16}) + "\n")
    with pytest.raises(ValueError, match=r"cores is 2 .* and 16"):
        figures.newest("x", "size", folder=tmp_path)
    with pytest.raises(ValueError, match=r"results/x\.jsonl has no line with"):
        figures.newest("x", folder=tmp_path, size=9)


def test_a_picture_is_drawn_anew_when_what_it_shows_changes_and_only_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [("sslx", 3.0, 2.5, 3.5), ("other", 1.0, 0.9, 1.2)]
    monkeypatch.setitem(report.PICTURES, "x", lambda: partial(charts.bars, list(rows), title="a title", subtitle=""))
    path = tmp_path / "x.svg"
    assert report.is_stale("x", tmp_path, check=True)
    assert not path.exists()
    assert report.is_stale("x", tmp_path, check=False)
    first = path.read_text()
    assert not report.is_stale("x", tmp_path, check=True)
    rows[1] = ("other", 1.0, 0.8, 1.2)
    assert report.is_stale("x", tmp_path, check=True)
    assert path.read_text() == first
    assert report.is_stale("x", tmp_path, check=False)
    assert path.read_text() != first
