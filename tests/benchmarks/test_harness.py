"""The harness of the benchmarks: options, records, resuming."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
from harness import Record, Session, benchmark, option


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A benchmark "squares" of two parts; the list of the numbers that it has measured."""
    measured: list[int] = []

    @benchmark(option("--numbers", type=int, nargs="+"), windows=3, passes_flags=True)
    def run(session: Session) -> bool:
        def square(number: int) -> Record:
            measured.append(number)
            return {"square": number**2}

        parts = [
            session.part({"number": n, "flags": session.flags}, lambda n=n: square(n)) for n in session.options.numbers
        ]
        return all(part["square"] < 100 for part in parts)

    monkeypatch.setattr(harness, "summaries", lambda: {"squares": "Squares."})
    monkeypatch.setattr(harness, "import_module", lambda _: SimpleNamespace(__doc__="Squares.", run=run))
    return measured


def test_a_part_is_measured_and_recorded_once(squares: list[int], tmp_path: Path) -> None:
    path, (one, two) = tmp_path / "squares.jsonl", random.sample(range(10), 2)
    argv = ["squares", "--results", str(path), "--steps", "4", "--numbers", str(one)]
    assert harness.main(argv) == 0
    assert harness.main([*argv, str(two)]) == 0
    assert harness.main([*argv, str(two)]) == 0
    assert squares == [one, two]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(r["benchmark"], r["number"], r["square"]) for r in records]
    assert found == [("squares", number, number**2) for number in (one, two)]
    assert all(r["flags"] == ["--steps", "4"] and r["cores"] and r["versions"]["torch"] for r in records)
    harness.main([*argv[:3], "--steps", "5", "--numbers", str(one)])
    assert squares == [one, two, one], "other settings are another part"


def test_a_missed_limit_is_the_exit_code_and_no_record_writes_nothing(squares: list[int], tmp_path: Path) -> None:
    path = tmp_path / "squares.jsonl"
    assert harness.main(["squares", "--results", str(path), "--no-record", "--numbers", "12"]) == 1
    assert squares == [12]
    assert not path.exists()


def test_every_benchmark_is_listed_with_its_summary_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main([]) == 0
    listed = capsys.readouterr().out
    summaries = harness.summaries()
    assert len(summaries) >= 20
    assert all(name in listed and len(summary) > 30 for name, summary in summaries.items())
    assert harness.main(["no_such_benchmark"]) == 64
    for name in ("harness", "startup", "nt_xent"):
        with pytest.raises(SystemExit) as exit:
            harness.main([name, "--help"])
        assert exit.value.code == 0
        assert summaries[name][:40] in capsys.readouterr().out


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        harness.main(["harness", "--bogus", "1"])
    assert "unknown options: --bogus 1" in capsys.readouterr().err


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    assert harness.digest({"a": 1, "b": 2}) == harness.digest({"b": 2, "a": 1})
    assert harness.digest({"a": 1, "b": 2}) != harness.digest({"a": 1, "b": 3})
