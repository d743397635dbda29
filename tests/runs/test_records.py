"""status.json, job.json, starts.jsonl and stops.jsonl of a run folder."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from sslx.errors import DataError, StorageError
from sslx.runs import records

WRONG_STATUS = [
    ("state", "odd"), ("state", []), ("step", "1"), ("step", -1), ("step", 1.5), ("step", True), ("step", 10**400),
    ("reason", None), ("reason", ["a"]), ("time", float("inf")), ("time", "now"), ("code", {}), ("other", 1),
]  # fmt: skip
WRONG_JOB = [
    ("cluster", "other"), ("id", 1), ("id", "-1"), ("id", "1; ls"), ("id", "../1"), ("id", "1\n"), ("log", ["/a"]),
    ("log", "/a\0"), ("code", 1), ("submitted", float("nan")),
]  # fmt: skip


def test_status(tmp_path: Path) -> None:
    assert records.read_status(tmp_path) is None
    before = time.time()
    records.write_status(tmp_path, "running", 0)
    records.write_status(tmp_path, "preempted", 120, "SIGTERM")
    status = records.read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.reason) == ("preempted", 120, "SIGTERM")
    assert before <= status.time <= time.time()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    right = {"state": "done", "step": 1, "reason": "", "time": 0.5, "code": 0}
    wrong = [right | {name: value} for name, value in WRONG_STATUS]
    for text in ("", "[]", "{}", "\0", "[" * 100_000, '{"a":' * 100_000, *map(json.dumps, wrong)):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(DataError, match=r"status\.json is not a status record"):
            records.read_status(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        records.write_status(tmp_path / "no folder", "done", 1)


def test_job(tmp_path: Path) -> None:
    assert records.read_job(tmp_path) is None
    job = records.Job(cluster="slurm", id="12_3", log="/runs/a/job/12_3.log", code="0.1.0 abc", submitted=1.5)
    records.write_job(tmp_path, job)
    assert records.read_job(tmp_path) == job
    right = json.loads((tmp_path / "job.json").read_text())
    for wrong in [{}, *(right | {name: value} for name, value in WRONG_JOB)]:
        (tmp_path / "job.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"job\.json is not a job record"):
            records.read_job(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        records.write_job(tmp_path / "no folder", job)


STOP = records.Stop(time=1.0, job="12", code=75, step=1, reason="SIGTERM")
START = records.Start(
    time=1.0, step=0, command="sslx pretrain a", device="A GPU", cores=2, hosts=["n1", "n2"], code="0.2.0",
    versions={"torch": "2.14.1"},
)  # fmt: skip
LISTS: dict[str, tuple[Any, Any, Any]] = {
    "stops.jsonl": (STOP, records.add_stop, records.read_stops),
    "starts.jsonl": (START, records.add_start, records.read_starts),
}
of_lists = pytest.mark.parametrize("name", LISTS)


@of_lists
def test_they_are_added_and_a_torn_line_is_left_out(tmp_path: Path, name: str) -> None:
    record, add, read = LISTS[name]
    assert read(tmp_path) == []
    all_records = [dataclasses.replace(record, step=step) for step in range(3)]
    for one in all_records:
        add(tmp_path, one)
    with open(tmp_path / name, "a") as file:
        file.write('{"time": 1.0, "job"')
    assert read(tmp_path) == all_records
    with pytest.raises(StorageError, match="cannot write"):
        add(tmp_path / "no folder", record)


@of_lists
@pytest.mark.parametrize(
    "damage", [b"\xff\x00\n", b"[]\n", b"[" * 100_000 + b"\n", b'{"time": 1}\n', b"\n" * 3, b"x" * 200_000]
)
def test_damaged_lines_among_them_are_left_out(tmp_path: Path, name: str, damage: bytes) -> None:
    record, add, read = LISTS[name]
    add(tmp_path, record)
    line = (tmp_path / name).read_bytes()
    wrong = [json.dumps(json.loads(line) | {field: {"a": []}}).encode() + b"\n" for field in dataclasses.asdict(record)]
    (tmp_path / name).write_bytes(line + b"".join(wrong) + damage.rstrip() + b"\n" + line)
    assert read(tmp_path) == [record, record]


METRICS = [
    (b'{"step": 3, "loss": 0.5, "n": 2}', {"step": 3, "loss": 0.5, "n": 2}),
    (b'{"step": 3, "loss": null, "a": "text", "b": [1], "c": true, "d": {}}', {"step": 3, "loss": math.nan}),
    (b'{"step": 3, "loss": Infinity, "lr": -1e400}', {"step": 3, "loss": math.nan, "lr": math.nan}),
    *((line, None) for line in (
        b"[1]", b"", b"{", b"{}", b'"step"', b'{"step": "3"}', b'{"step": 1e400}', b'{"step": -1}', b'{"step": 1.5}',
        b'{"step": true}', b'{"step": null}', b'{"step": [3]}', b'\xff{"step": 3}',
        b'{"step": 3, "a": ' + b"[" * 100_000,
        b'{"step": ' + b"9" * 400 + b"}", b'{"step": 3, "a": "' + b"x" * 100_000 + b'"}',
    )),
]  # fmt: skip


@pytest.mark.parametrize(("line", "metrics"), METRICS)
def test_a_line_of_metrics(tmp_path: Path, line: bytes, metrics: dict[str, float] | None) -> None:
    good = b'{"step": 1, "loss": 2.0}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(good + line + b"\n" + good + line)  # the last one is not finished
    read = [{"step": 1, "loss": 2.0}, *([metrics] if metrics else []), {"step": 1, "loss": 2.0}]
    assert repr(list(records.read_metrics(path))) == repr(read)  # nan is not equal to itself
    path.write_bytes(good + line + b"\n")
    assert repr(records.last_metrics(path)) == repr(metrics or ({} if len(line) > 2**16 else {"step": 1, "loss": 2.0}))


def test_metrics_that_are_not_there_and_that_cannot_be_read(tmp_path: Path) -> None:
    assert (list(records.read_metrics(tmp_path / "a")), records.last_metrics(tmp_path / "a")) == ([], {})
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(records.read_metrics(tmp_path))


def test_newest_step_is_the_largest_number(tmp_path: Path) -> None:
    assert records.newest_step(tmp_path) == 0
    for name in ("step_9", "step_120", "step_200.old", ".step_300.tmp-1", "step_abc", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert records.newest_step(tmp_path) == 120
