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
    before = {
        "case": "x",
        "launches": 100,
        "collectives": 0,
        "copies": 1,
        "waits": 0,
        "moved_bytes": 1000,
        "peak_bytes": 1000,
    }
    assert bench_counts.differences(before, before) == []
    assert bench_counts.differences({**before, "launches": 109}, before) == []
    assert bench_counts.differences({**before, "launches": 111}, before) == ["x: launches 100 -> 111"]
    assert bench_counts.differences({**before, "launches": 89}, before) == ["x: launches 100 -> 89"]
    assert bench_counts.differences({**before, "waits": 1}, before) == ["x: waits 0 -> 1"]
    assert bench_counts.differences(before, None) == ["x is not in results/counts.jsonl"]
