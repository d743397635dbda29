"""What a step of each recipe does to a GPU is what the table says, and the table can tell."""

import bench_counts
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", bench_counts.cases())
def test_a_recipes_step_is_as_in_the_table(name: str) -> None:
    figures = bench_counts.count(name)
    assert figures["waits"] == 0
    assert not bench_counts.differences(figures, bench_counts.recorded().get(name)), (
        "say why in the commit, and run: python benchmarks/run.py counts --write"
    )


def test_a_change_of_more_than_a_tenth_is_said() -> None:
    counts = {"case": "x", "launches": 100, "collectives": 0, "copies": 1, "waits": 0}
    before = {**counts, "moved_bytes": 1000, "peak_bytes": 1000}
    for name, number, is_told in (
        ("launches", 100, False), ("launches", 109, False), ("launches", 111, True), ("launches", 89, True),
        ("waits", 1, True),
    ):  # fmt: skip
        told = [f"x: {name} {before[name]} -> {number}"] if is_told else []
        assert bench_counts.differences({**before, name: number}, before) == told
    assert bench_counts.differences(before, None) == ["x is not in results/counts.jsonl"]
