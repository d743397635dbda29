"""``sslx report``: one file without links to others, right figures, and text from outside that is never markup."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.processes import pretrain
from sslx import cli
from sslx.probe.confusion import Confusion
from sslx.report import curves, facts
from sslx.report.page import duration

HOSTILE = '<script>alert(1)</script>"&\x1b[31m'


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}|"

    def images(self) -> dict[str, bytes]:
        """The contents of the images by their titles."""
        found = {str(given["alt"]): str(given["src"]) for tag, given in self.tags if tag == "img"}
        assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in found.values())
        return {title: base64.b64decode(source.split(",")[1]) for title, source in found.items()}


def report(*argv: str | Path) -> None:
    assert cli.main(["report", "--no-scores", "--no-pictures", *map(str, argv)]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(pretrain(folder, "--name", "a")) == 0
    return folder / "a"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of two steps; the second has odd names, a picture and scores."""
    shutil.copytree(trained, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b & <i>b")
    b = tmp_path / "b & <i>b"
    settings = json.loads((b / "config.json").read_text())
    settings["optim"]["lr"] = HOSTILE
    (b / "config.json").write_text(json.dumps(settings | {HOSTILE: HOSTILE}))
    lines = [{"step": step, "time": 1e9 + step, HOSTILE: step * 1.5, "loss": 1.0 / step} for step in range(1, 99)]
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (b / "starts.jsonl").unlink()
    scores = [{"name": name, "dim": 8, "knn": value, "linear": 0.5, "low_shot": {"1": {"mean": 0.25, "std": 0.01}},
               "k": 20, "knn_held_out": {"5": 0.625, "20": 0.6875}, "sgd": 0.375, "sgd_lr": 0.03, "sgd_batch_size": 256,
               "fractions": {"0.01": {"mean": 0.3125, "std": 0.02}},
               "fine_tuned": {"1.0": {"mean": 0.875, "std": 0, "recipe": "AdamW"}}}
              for name, value in ((HOSTILE, 0.125), ("pretrained encoder", 0.75))]  # fmt: skip
    free = [{"name": "average of the encoder", "rank": 12.34, "lidar": 5.67, "alpha": None, "std": 0.5,
             "alignment": 0.9, "uniformity": -2.5, "retrieval": 0.4375}]  # fmt: skip
    (b / "probe.json").write_text(
        json.dumps({"scores": scores, "label_free": free, "split": HOSTILE, "num_images": 3, "source": "x"})
    )
    (b / "confusion.json").write_bytes(
        Confusion.of("kNN", torch.tensor([0, 1]), torch.tensor([1, 1])).to_json(
            [HOSTILE, "b"], step=2, source="x", split="test"
        )
    )
    Image.fromarray(np.random.default_rng().integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(b / "neighbors.png")
    return tmp_path / "a", b


def test_a_page_needs_no_other_file_and_shows_what_the_run_folder_says(runs: tuple[Path, Path]) -> None:
    a, b = runs
    report(a)
    page = Page(a / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "a"})
    assert "http" not in re.sub(r"base64,[^\"]*", "", (a / "report.html").read_text())
    assert page.images()["Loss"].startswith(b"<?xml")
    (start,) = facts.read(a).starts
    assert f"|{start.command}|" in page.text
    assert "Not measured yet" in page.text
    assert "|2|steps|" in page.text
    report(b)
    page = Page(b / "report.html")
    assert page.images()["Nearest neighbors"] == (b / "neighbors.png").read_bytes()
    assert "|75.0 %|kNN accuracy|" in page.text
    for text in ("25.0 ± 1.0", "37.5", "31.2 ± 2.0", "87.5 ± 0.0", "12.3", "5.7", "-2.50", "43.8", HOSTILE[:8]):
        assert f"|{text}" in page.text
    for paper in ("1805.01978", "1911.05722", "2002.05709", "2204.07141", "2210.02885", "2312.04000", "2005.10242"):
        assert f"arXiv {paper}" in page.text
    assert "arXiv 2202.05808" not in page.text, "nothing has an alpha"
    assert "|k = 20 (held-out accuracy by k: 5: 62.5, 20: 68.8); SGD with learning rate 0.03" in page.text
    assert "fine-tuning by AdamW" in page.text
    assert "|97 s|time|" in page.text


def test_a_report_draws_the_confusions_of_the_newest_probe(runs: tuple[Path, Path]) -> None:
    _, b = runs
    shutil.copy(b / "neighbors.png", b / "tsne.png")
    (b / "confusion.png").write_bytes(b"of an earlier probe")
    os.utime(b / "confusion.png", (0, 0))
    for _ in range(2):  # the second time, the picture is there
        assert cli.main(["report", "--no-scores", str(b)]) == 0
        assert Image.open(io.BytesIO(Page(b / "report.html").images()["Confusion matrix"])).width > 500
    (b / "confusion.json").unlink()
    report(b)
    assert "Confusion matrix" not in Page(b / "report.html").images(), "this probe had no labels"


@pytest.mark.slow
def test_what_is_missing_is_measured_and_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--source.name", "digits", "--data.backend", "resident", "--data.size", "16"]
    assert cli.main(pretrain(tmp_path, *flags)) == 0
    run = tmp_path / "r"
    assert cli.main(["report", str(run)]) == 0
    assert {"probe.json", "tsne.png", "report.html"} <= {path.name for path in run.iterdir()}
    made = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "report.html"}
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name in made} == made


def test_text_from_outside_is_never_markup(runs: tuple[Path, Path], tmp_path: Path) -> None:
    report(*runs, "-o", tmp_path / "new" / "both.html")
    page = Page(tmp_path / "new" / "both.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "i "})
    assert page.text.count("<script>alert(1)</script>") >= 4, "a metric, an option, its value and a score"
    assert "b & <i>b" in page.text
    assert "\x1b" not in page.text
    assert "What differs|" in page.text
    assert {"optim.lr", "What differs"} <= set(page.text.split("|"))


def test_only_a_methods_own_metrics_are_called_its_own(trained: Path) -> None:
    of_the_loop = "loss lr epoch samples_per_s data_wait grad_norm slowest_rank slowest_rank_s other_ranks_s "
    of_the_loop += "unreadable_images skipped_steps knn feature_rank feature_std feature_alignment feature_uniformity"
    two = np.arange(2.0), np.arange(2.0)
    run = replace(facts.read(trained), curves=dict.fromkeys((*of_the_loop.split(), "std"), two))
    charts = curves.charts([run])
    assert [chart.title for chart in charts if "method" in chart.title] == ["Std (of the method)"]
    assert {chart.metric for chart in charts} == {*of_the_loop.split(), "std"} - {"epoch", "slowest_rank"}


def test_curves_are_those_of_all_runs_without_what_is_not_finite(runs: tuple[Path, Path]) -> None:
    a, b = (facts.read(run) for run in runs)
    with open(b.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 98, "loss": 7.0}\n{"step": 99, "loss": NaN}\n{"step": 100, "lo')
    b = facts.read(b.folder)
    steps, loss = b.curves["loss"]
    assert steps.tolist() == list(range(1, 99))
    assert loss[-1] == 7.0, "a repeated step's last line counts"
    assert "loss" in {chart.metric for chart in curves.charts([a, b])}
    chart = next(chart for chart in curves.charts([a, b]) if chart.metric == "loss")
    drawn = curves.svg(chart, [a, b])
    assert {curves.color(0), curves.color(1)} <= set(re.findall(r"#[0-9a-f]{6}", drawn))
    assert drawn == curves.svg(chart, [a, b]), "the same bytes each time"


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_scores_cost_nothing_else(runs: tuple[Path, Path], damage: bytes) -> None:
    (runs[0] / "probe.json").write_bytes(damage)
    report(runs[0])
    assert "Not measured yet" in Page(runs[0] / "report.html").text


def test_scores_of_other_kinds_than_expected_cost_nothing_else(runs: tuple[Path, Path]) -> None:
    odd = {"fine_tuned": {"1": 3, "x": {"mean": "?"}}, "low_shot": 5, "k": [1], "knn_held_out": {"5": "x"}, "knn": True}
    good = {"name": "pretrained encoder", "linear": 0.625}
    probe = {"scores": [7, odd, good, {"name": [], "fractions": {"most": {"mean": 0.5}}}], "label_free": "x"}
    probe["transfer"] = [4, {"images": "pets", "scores": [{"name": "pretrained encoder", "knn": 0.8125}]}]
    (runs[0] / "probe.json").write_text(json.dumps(probe))
    report(*runs)
    words = set(Page(runs[0] / "report.html").text.split("|"))
    assert {"62.5", "50.0", "most of labels", "81.2", "Transfer to pets, accuracy in %"} <= words


def test_what_is_no_run_or_cannot_be_written_is_one_line(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, words in (
        ([str(tmp_path)], "has no config.json: use a folder under runs/"),
        ([str(runs[0]), "-o", "/proc/report.html"], "cannot write /proc/report.html"),
    ):
        assert cli.main(["report", "--no-scores", "--no-pictures", *argv]) != 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert words in said


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(runs: tuple[Path, Path], tmp_path: Path, width: int) -> None:
    report(*runs, "-o", tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    probe = "<script>document.title = [document.body.scrollWidth, innerWidth, document.images.length].join()</script>"
    (tmp_path / "both.html").write_text(text.replace("</body>", f"{probe}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/both.html"], capture_output=True, text=True, check=True)
    match = re.search(r"<title>(\d+),(\d+),(\d+)</title>", done.stdout)
    assert match is not None
    assert int(match[1]) <= int(match[2])
    assert int(match[3]) > 1
