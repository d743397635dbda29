"""Scores without labels: each against its definition, on features that are known."""

import io

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from sslx.errors import DataError
from sslx.losses import spread
from sslx.probe import geometry, label_free, tables

PLAIN = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
VIEWS = torch.stack(
    [PLAIN + 0.6 * torch.randn(200, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)], dim=1
)
FIRST, SECOND = VIEWS[:, 0], VIEWS[:, 1]


def test_scores_are_those_of_health_and_of_a_search() -> None:
    row = label_free.score("ours", PLAIN, VIEWS)
    assert (row.dim, row.num_images, row.num_views) == (12, 200, 3)
    assert row.rank == pytest.approx(float(geometry.rank_me(PLAIN)))
    assert row.lidar == pytest.approx(float(geometry.lidar(VIEWS)))
    assert row.alpha == pytest.approx(float(geometry.alpha_req(PLAIN)))
    assert row.std == pytest.approx(float(spread(PLAIN)))
    assert row.alignment == pytest.approx(float(geometry.alignment(FIRST, SECOND)), rel=1e-5)
    assert row.uniformity == pytest.approx(float(geometry.uniformity(FIRST)), rel=1e-5)
    hits = [int((F.normalize(PLAIN) @ F.normalize(x, dim=0)).argmax()) == i for i, x in enumerate(FIRST)]
    assert 0.3 < row.retrieval < 1
    assert row.retrieval == pytest.approx(sum(hits) / 200)


def test_retrieval_is_all_of_the_same_and_chance_when_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert label_free.retrieval(3 * PLAIN, PLAIN) == 1
    assert label_free.retrieval(torch.ones(50, 4), torch.ones(50, 4)) == pytest.approx(1 / 50)
    whole = label_free.retrieval(FIRST, PLAIN)
    monkeypatch.setattr(label_free, "_BLOCK_BYTES", 8 * 200 * 7)
    assert label_free.retrieval(FIRST, PLAIN) == whole


def test_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="2 or more images to tell apart, got 1"):
        label_free.score("ours", PLAIN[:1], VIEWS[:1])


def test_the_table_has_each_number_and_a_line_for_each() -> None:
    rows = [label_free.score(name, PLAIN, VIEWS, with_ranks=name == "ours") for name in ("raw pixels", "ours")]
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables.fitting([row.name for row in rows], label_free.columns(rows), console):
        console.print(table)
    text = console.export_text()
    assert f"{rows[1].rank:.1f}/12" in text
    assert f" {rows[1].lidar:.1f} " in text
    assert f" {rows[1].alpha:.2f} " in text
    assert text.count("/12") == 1, "pixels have no rank"
    assert text.count(f"{100 * rows[1].retrieval:.1f} %") == 2
    lines = label_free.legend(200)
    for head in ("rank", "LiDAR", "alpha", "std", "alignment", "uniformity", "retrieval"):
        assert head in text
        (line,) = [line for line in lines if line.startswith(f"{head}: ")]
        assert any(word in line for word in ("higher is better", "lower is better", "1 is"))
    assert "among 200 (0.5 % by chance)" in lines[-1]
