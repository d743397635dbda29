"""status.json, job.json and stops.jsonl of a run folder."""

import time
from pathlib import Path

import pytest

from sslx import outcome
from sslx.errors import DataError, StorageError


def test_status(tmp_path: Path) -> None:
    assert outcome.read_status(tmp_path) is None
    before = time.time()
    outcome.write_status(tmp_path, "running", 0)
    outcome.write_status(tmp_path, "preempted", 120, "SIGTERM")
    status = outcome.read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.reason) == ("preempted", 120, "SIGTERM")
    assert before <= status.time <= time.time()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    for text in ("", "[]", "{}", '{"state": "odd", "step": 1, "reason": "", "time": 0}'):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(DataError, match=r"status\.json is no status"):
            outcome.read_status(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        outcome.write_status(tmp_path / "no folder", "done", 1)


def test_job(tmp_path: Path) -> None:
    assert outcome.read_job(tmp_path) is None
    job = outcome.Job(cluster="slurm", id="12_3", log="/runs/a/job/12_3.log", code="0.1.0 abc", submitted=1.5)
    outcome.write_job(tmp_path, job)
    assert outcome.read_job(tmp_path) == job
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(DataError, match=r"job\.json is no job"):
        outcome.read_job(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        outcome.write_job(tmp_path / "no folder", job)


def test_stops_are_added_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert outcome.read_stops(tmp_path) == []
    stops = [outcome.Stop(time=float(i), job="12", code=75, step=i, reason="SIGTERM") for i in range(3)]
    for stop in stops:
        outcome.add_stop(tmp_path, stop)
    with open(tmp_path / "stops.jsonl", "a") as file:
        file.write('{"time": 1.0, "job"')
    assert outcome.read_stops(tmp_path) == stops
    with pytest.raises(StorageError, match="cannot write"):
        outcome.add_stop(tmp_path / "no folder", stops[0])


def test_newest_step_is_the_largest_number(tmp_path: Path) -> None:
    assert outcome.newest_step(tmp_path) == 0
    for name in ("step_9", "step_120", "step_200.old", ".step_300.tmp-1", "step_abc", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert outcome.newest_step(tmp_path) == 120
