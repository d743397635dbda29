"""The benchmark harness: spreads, turns and records."""

import json
from pathlib import Path

from sslx import measure


def test_spread_on_numbers_by_hand() -> None:
    assert measure.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == {"n": 6, "median": 3.5, "p20": 2.0, "p80": 5.0}


def test_arms_take_turns_and_the_first_window_is_not_counted() -> None:
    calls: list[str] = []

    def arm(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = measure.take_turns({"a": lambda: arm("a"), "b": lambda: arm("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_record_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    for value in (1, 2):
        measure.append(path, {"benchmark": "x", "value": value})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["value"] for line in lines] == [1, 2]
    assert lines[0]["cores"] >= 1
    assert lines[0]["versions"]["torch"]
    assert len(lines[0]["commit"]) >= 7
