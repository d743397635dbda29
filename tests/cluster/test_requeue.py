"""When a job starts again: decided from exit code, status.json and stops.jsonl."""

import json
import pickle
import time
from pathlib import Path

import pytest

from kit.python import python
from sslx.cluster import requeue
from sslx.cluster.job import Job
from sslx.errors import DataError
from sslx.runs import records


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SSLX_ENDED_BY_SLURM"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def saved(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step}").mkdir(parents=True, exist_ok=True)


def asked(run: Path, code: int) -> int:
    return requeue.main([str(run), str(code), "0"])


def test_a_finished_run_leaves_no_stop_even_if_its_processes_end_badly(run: Path) -> None:
    records.write_status(run, "done", 10)
    assert [asked(run, 0), asked(run, 134)] == [0, 0]
    assert records.read_stops(run) == []


@pytest.mark.parametrize("code", [64, 65, 66, 74, 76, 77, 130, 141])
def test_what_would_end_alike_is_not_started_again(run: Path, code: int) -> None:
    assert asked(run, code) == code
    (stop,) = records.read_stops(run)
    assert (stop.code, stop.reason) == (code, f"exit code {code}")


@pytest.mark.parametrize("code", [75, 70, 71, 1, 137, 143])
def test_a_preempted_or_crashed_run_is(run: Path, code: int) -> None:
    assert asked(run, code) == requeue.SAVED


def test_the_runs_own_word_wins_over_what_torchrun_and_srun_return(run: Path) -> None:
    records.write_status(run, "failed", 3, "the loss is nan", 76)
    assert asked(run, 1) == 76
    records.write_status(run, "preempted", 3, "SIGTERM", 75)
    assert asked(run, 1) == 75
    assert [stop.reason for stop in records.read_stops(run)] == ["the loss is nan", "SIGTERM"]


def test_a_status_of_an_earlier_start_says_nothing(run: Path) -> None:
    records.write_status(run, "failed", 3, "the loss is nan", 76)
    assert requeue.main([str(run), "137", str(time.time() + 5)]) == requeue.SAVED
    records.write_status(run, "running", 3)
    assert asked(run, 137) == requeue.SAVED
    assert [stop.reason for stop in records.read_stops(run)] == ["exit code 137"] * 2


def test_three_starts_without_a_new_checkpoint_are_enough(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [asked(run, 70) for _ in range(3)] == [75, 75, 93]
    assert (status := records.read_status(run)) is not None
    assert (status.state, status.code) == ("failed", 93)
    assert "3 starts ended at step 0" in status.reason
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 3 starts ended at step 0")


def test_each_new_checkpoint_gives_three_more(run: Path) -> None:
    found: list[int] = []
    for step in (0, 0, 10, 10, 20, 20, 20, 20):
        if step:
            saved(run, step)
        (run / "status.json").unlink(missing_ok=True)
        found.append(asked(run, 70))
    assert found == [75, 75, 75, 75, 75, 75, 75, 93]


def test_a_job_submitted_again_has_three_starts_of_its_own(run: Path) -> None:
    assert [asked(run, 70) for _ in range(3)] == [75, 75, 93]
    time.sleep(0.01)
    records.write_job(run, records.Job(cluster="slurm", id="2", log="", code="", submitted=time.time()))
    (run / "status.json").unlink()
    time.sleep(0.01)
    assert [asked(run, 70) for _ in range(3)] == [75, 75, 93]


def test_an_arrays_task_is_requeued_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # as of an array's last task
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue.job_id() == "17_2"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert requeue.job_id() == "17"


def test_what_the_user_cancelled_ends_once(run: Path) -> None:
    (run / "cancel").touch()
    records.write_status(run, "preempted", 5, "SIGUSR2", 75)
    assert asked(run, 75) == requeue.CANCELLED
    assert records.read_stops(run)[-1].reason == "sslx cancel"
    assert asked(run, 75) == requeue.SAVED


def test_what_slurm_ends_itself_is_left_to_slurm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLX_ENDED_BY_SLURM", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "0")  # a requeue would complain
    assert [asked(run, 75) for _ in range(5)] == [75] * 5


def test_an_arrays_task_is_the_run_at_its_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    folders = [run / "a", run / "b"]
    for folder in folders:
        folder.mkdir()
    (run / "runs.json").write_text(json.dumps(list(map(str, folders))))
    assert asked(run, 64) == 64
    assert [[stop.code for stop in records.read_stops(folder)] for folder in folders] == [[], [64]]


@pytest.mark.parametrize("name", ["status.json", "job.json", "stops.jsonl"])
@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\0\n", b'{"state": 1, "id": []}\n'])
def test_damaged_records_do_not_keep_a_run_from_starting_again(run: Path, name: str, data: bytes) -> None:
    (run / name).write_bytes(data)
    saved(run, 10)
    assert asked(run, 137) == requeue.SAVED
    assert asked(run, 66) == 66


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '["a"]', "{}", "[1, 2, 3]"])
def test_a_damaged_list_of_an_arrays_runs_is_one_line(run: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "runs.json").write_text(text)
    for task in ("1", "x"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        with pytest.raises(DataError, match="does not name the run of this task"):
            requeue.run_folder(run)


def test_jobs_that_sslx_0_1_queued_go_on(run: Path) -> None:
    """Their batch scripts and pickles name the old places."""
    records.write_status(run, "failed", 3, "the loss is nan", 76)
    python("-m", "sslx.requeue", run, "1", "0", exit_code=76)
    python("-m", "sslx.train.job", run)
    assert records.read_job(run) is not None
    old = pickle.dumps(Job(folder="f", code="c"), protocol=0).replace(b"csslx.cluster.job\n", b"csslx.train.job\n")
    assert b"sslx.train.job" in old
    assert pickle.loads(old) == Job(folder="f", code="c")
