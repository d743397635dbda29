"""Schedules: their ends, their middle, and what lies outside."""

import math

import pytest

from sslx.optim.schedule import cosine, warmup_cosine


@pytest.mark.parametrize(("progress", "expected"), [(0, 0.996), (0.5, 0.998), (1, 1.0), (-1, 0.996), (2, 1.0)])
def test_cosine_of_byol(progress: float, expected: float) -> None:
    assert cosine(progress, 0.996, 1.0) == pytest.approx(expected, abs=1e-15)


def test_cosine_is_byols_formula() -> None:
    for step in range(0, 1001, 37):
        byol = 1 - (1 - 0.99) * (math.cos(math.pi * step / 1000) + 1) / 2
        assert cosine(step / 1000, 0.99, 1.0) == pytest.approx(byol, abs=1e-15)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.505), (1, 0.01), (1.5, 0.01), (-0.1, 0)],
)
def test_warmup_cosine(progress: float, expected: float) -> None:
    assert warmup_cosine(progress, warmup=0.1, final=0.01) == pytest.approx(expected, abs=1e-12)


def test_warmup_cosine_has_no_jump_where_the_line_ends() -> None:
    before, after = (warmup_cosine(0.3 + d, warmup=0.3) for d in (-1e-9, 1e-9))
    assert before == pytest.approx(1, abs=1e-8)
    assert after == pytest.approx(1, abs=1e-8)


def test_warmup_may_be_nothing_or_everything() -> None:
    assert warmup_cosine(0, warmup=0) == 1
    assert warmup_cosine(0.25, warmup=1) == 0.25
    assert warmup_cosine(1, warmup=1) == 1
