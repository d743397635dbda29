"""The benchmark harness: spreads, turns and records."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sslx.bench import measure

CPU = torch.device("cpu")


def test_a_summary_of_numbers_by_hand_and_as_text() -> None:
    assert measure.summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == {"n": 6, "median": 3.5, "p20": 2.0, "p80": 5.0}
    summary = {"median": 1234.56, "p20": 1000.0, "p80": 2000.04}
    assert measure.text(summary) == "1,235 (1,000 to 2,000)"
    assert measure.text(summary, 1, scale=0.1) == "123.5 (100.0 to 200.0)"


def test_arms_take_turns_and_the_first_window_is_not_counted() -> None:
    count = itertools.count(1)
    figures = measure.take_turns(dict.fromkeys("ab", lambda: float(next(count))), 2)
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_an_arm_that_fails_does_not_keep_the_others_from_their_turns() -> None:
    errors: list[tuple[str, str]] = []

    def broken() -> float:
        raise RuntimeError("refused")

    arms: dict[str, Callable[[], float]] = {"a": lambda: 1.0, "b": broken, "c": lambda: 3.0}
    figures = measure.take_turns(arms, 2, on_error=lambda name, error: errors.append((name, str(error))))
    assert figures == {"a": [1.0, 1.0], "c": [3.0, 3.0]}
    assert errors == [("b", "refused")]
    with pytest.raises(RuntimeError, match="refused"):
        measure.take_turns(arms, 2)


def test_after_its_time_no_window_begins_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)

    def arm() -> float:
        nonlocal clock
        clock += 10.0
        return clock

    assert measure.take_turns({"a": arm}, 9, limit_s=35.0) == {"a": [20.0, 30.0, 40.0]}
    assert measure.take_turns({"a": arm}, 9, limit_s=1.0) == {"a": [60.0]}


def test_a_record_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    for value in (1, 2):
        measure.append(path, {"benchmark": "x", "value": value})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["value"] for line in lines] == [1, 2]
    assert lines[0]["cores"] >= 1
    assert lines[0]["versions"]["torch"]
    assert len(lines[0]["commit"]) >= 7


def test_a_window_counts_calls_a_second_over_at_least_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    calls: list[float] = []
    prepared: list[int] = []

    def call() -> None:
        nonlocal clock
        clock += 1.0 if len(calls) < 1 else 0.25 if len(calls) < 3 else 0.125  # compiles; still cold; warm
        calls.append(clock)

    def seconds(run: Callable[[], object], _: torch.device) -> float:
        start = clock
        run()
        return clock - start

    monkeypatch.setattr(measure, "elapsed_s", seconds)
    rate = measure.rate_window(call, CPU, 1.0, lambda: prepared.append(len(calls)))
    assert rate() == 8
    first = len(calls)
    assert first == 1 + 6 + 6  # compiled, 2 cold and 4 warm calls that last 1 s together, then as many on the clock
    assert rate() == 8
    assert len(calls) - first == 6
    assert prepared == [0, first]


def test_a_long_call_is_timed_twice_at_least() -> None:
    calls: list[int] = []
    rate = measure.rate_window(lambda: calls.append(time.sleep(0.02) or 1), CPU, 0.001)
    rate()
    before = len(calls)
    rate()
    assert len(calls) - before == 2


def test_figures_of_two_machines_are_not_compared() -> None:
    stamp = measure.stamp()
    measure.require_same_machine([stamp, measure.stamp()])
    other = {**stamp, "cores": stamp["cores"] + 1}
    with pytest.raises(ValueError, match=r"two machines cannot be compared: cores is \d+ at .* and \d+ at"):
        measure.require_same_machine([stamp, other])


def test_noise_is_the_spread_of_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([9.0, *range(90, 111)])  # the first is a warm-up; of 21, the 5th is 94 and the 17th 106
    monkeypatch.setattr(measure, "rate_window", lambda *_: lambda: next(rates))
    lines: list[str] = []
    assert measure.warn_of_noise(CPU, lines.append) == pytest.approx(12 / 100)
    assert "varies by 12 %" in lines[0]


def test_the_peak_holds_what_was_freed() -> None:
    measure.reset_peak(CPU)
    before = measure.peak_bytes(CPU)
    freed = torch.ones(2**25)
    del freed
    assert 2**27 * 0.9 < measure.peak_bytes(CPU) - before < 2**27 * 1.5
