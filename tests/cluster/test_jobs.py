"""``sslx jobs``, ``sslx logs`` and ``sslx cancel`` of runs in folders; with a queue in tests/slurm."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kit.processes import is_one_line
from kit.python import python
from kit.screen import sslx_on_a_terminal
from sslx import cli
from sslx.cluster import jobs
from sslx.console.words import shown
from sslx.errors import ConfigError
from sslx.runs import records

SLURM = records.Job(cluster="slurm", id="12", log="/nowhere/12.log", code="0.1.0", submitted=0.0)


def a_run(folder: Path, job: records.Job | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if job:
        records.write_job(folder, job)
    return folder


def test_a_table_of_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = a_run(tmp_path / "a")
    lines = [{"step": step, "time": 0, "samples_per_s": 1000.4 + step} for step in (1, 2, 1200)]
    (here / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1300, "ti')
    records.write_status(here, "preempted", 1200, "SIGTERM", 75)
    (here / "checkpoints" / "step_1200").mkdir(parents=True)
    a_run(tmp_path / "sweep" / "b")
    (tmp_path / "not a run").mkdir()
    assert cli.main(["jobs", str(tmp_path)]) == 0
    head, a, b = capsys.readouterr().out.splitlines()
    assert head.split() == "run job state step samples/s checkpoint starts last stop".split()
    for word in ("a ", " - ", "preempted", "1,200", "2,200", "step 1,200, ", "SIGTERM"):
        assert word in a
    for word in ("sweep/b", "starting", "none"):
        assert word in b


@pytest.mark.parametrize("width", [80, 120, 250])
def test_a_table_on_a_terminal_shows_all_reasons_at_any_width(
    tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "step 12 has not ended for 600 s: rank 3 on node17 is behind the others; the last checkpoint is step 10"
    long = "a_run_with_a_name_that_is_longer_than_the_terminal_has_room_for_beside_the_others"
    for name in ("short", long):
        records.write_status(a_run(tmp_path / name), "failed", 1200, reason, 70)
    gone = a_run(tmp_path / "killed")
    records.write_status(gone, "running", 5)
    claim = "import os, sys; from sslx.runs import lock; import pathlib; keep = lock.acquire(pathlib.Path(sys.argv[1]))"
    python("-c", f"{claim}; os.kill(os.getpid(), 9)", gone, exit_code=-9)
    monkeypatch.setenv("COLUMNS", str(width))
    with sslx_on_a_terminal("jobs", tmp_path) as terminal:
        assert terminal.wait() == 0
    lines = [line.rstrip() for line in terminal.lines]
    assert " ".join(" ".join(lines).split()).count(reason) == 2
    assert all(len(line) <= width or line == long for line in lines)
    state = next(line for line in lines if line.startswith("killed"))
    assert "dead" in state
    assert re.search(r"its process is gone.*process \d+ on ", " ".join(lines))


STATUS = {"state": "failed", "step": 1, "reason": "", "time": 0.5, "code": 70}
JOB = {"cluster": "slurm", "id": "12", "log": "", "code": "", "submitted": 0.0}
DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGED = {
    "status.json": (b"", b"{}", b"[]", DEEP, b"\xff\0", None, json.dumps(STATUS | {"step": "1"}).encode()),
    "job.json": (b"", DEEP, None, json.dumps(JOB | {"id": "-1"}).encode()),
    "stops.jsonl": (None,),
    "metrics.jsonl": (None,),
}
ODD = {
    "status.json": (
        json.dumps(STATUS | {"reason": "[/x] [bold]a\n\n\x1b[31mb \u202e " + "c" * 5000}).encode(),
        json.dumps(STATUS | {"code": 10**15, "step": 10**15}).encode(),
    ),
    "stops.jsonl": (b"\xff\n\0", DEEP, b"[]\n", b'{"time": 1}\n', b'\n{"step": "a"}\n'),
    "metrics.jsonl": (
        b"[1]\n", DEEP + b"\n", b'{"step": "a"}\n', b'{"step": 1e400}\n', b'{"step": 1, "samples_per_s": "x"}\n',
        b'{"step": 1, "samples_per_s": 1e400}\n', b'{"step": 1, "samples_per_s": 1e308}\n', b"\xff\xfe\n",
    ),
    "config.json": (b"", DEEP, b"\xff"),
}  # fmt: skip


def test_damaged_runs_are_a_row_each_and_end_no_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = a_run(tmp_path / "good", SLURM)
    records.write_status(good, "done", 7)
    for kinds, word in ((DAMAGED, "damaged"), (ODD, "odd")):
        for name, contents in kinds.items():
            for number, data in enumerate(contents):
                path = a_run(tmp_path / f"{word}-{number}-{name}") / name
                path.mkdir() if data is None else path.write_bytes(data)
    assert cli.main(["jobs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert len(rows) == 2 + sum(map(len, DAMAGED.values())) + sum(map(len, ODD.values()))
    assert "done" in rows["good"]
    for name, row in rows.items():
        assert ("damaged" in row.split()[1:3]) == name.startswith("damaged"), row
    assert "[/x] [bold]a \\x1b[31mb \\u202e" in " ".join(" ".join(lines).split())


@pytest.fixture
def no_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm's commands, also where they are installed; with tail, which ``sslx logs`` calls."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "tail").symlink_to(shutil.which("tail") or "/usr/bin/tail")
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize("name", ["a[b]", "[/x]", "[bold]x", "new\nline", "\x1b[31mred", "caf\udce9", ":cat:", "-f"])
def test_any_name_of_a_run_is_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / name, replace(SLURM, log=str(tmp_path / name)))
    assert cli.main(["jobs", str(tmp_path)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert row.startswith(shown(name) + " ")
    assert head.split()[0] == "run"
    assert cli.main(["logs", str(run)]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["cancel", str(run)]) == 64
    assert capsys.readouterr().err == f"error: job 12 of {shown(run)} has already ended\n"


def test_a_crafted_job_signals_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill(-1) is everybody; a log is opened by tail, and not read as a flag of it."""
    run = a_run(tmp_path / "r")
    for number in ("-1", "0", "1", "1 2", "../1", "--help"):
        (run / "job.json").write_text(json.dumps(JOB | {"cluster": "local", "id": number}))
        code = cli.main(["cancel", str(run)])
        assert code == (64 if number.isdecimal() else 65)
        assert capsys.readouterr().err.count("\n") == 1
    (run / "job.json").write_text(json.dumps(JOB | {"log": "--help"}))
    (tmp_path / "--help").write_text("a line\n")
    assert python("-m", "sslx", "logs", "r", cwd=tmp_path).stdout == "a line\n"


@pytest.mark.parametrize(
    "flags", [["cancel", "r", "--wait-s", "nan"], ["logs", "r", "-n", "-3"], ["logs", "r", "-n", "x"]]
)
def test_odd_numbers_are_refused(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "r", replace(SLURM, log=__file__))
    assert cli.main(flags) == 64


def test_a_row_of_a_job(tmp_path: Path) -> None:
    run = a_run(tmp_path / "b", SLURM)
    records.write_status(run, "running", 7)
    records.add_stop(run, records.Stop(time=0.0, job="12", code=75, step=0, reason="SIGUSR2"))
    queue = {"12": ("RUNNING", "None")}
    assert jobs.table_row(run, queue) == ["12 (slurm)", "running", "7", "-", "none", "2", "SIGUSR2"]


def test_states() -> None:
    running, failed = records.Status("running", 1, "", 0.0, 0), records.Status("failed", 1, "", 0.0, 70)
    waiting = {"12": ("PENDING", "Resources")}
    assert jobs.run_state(None, None, {}) == "starting"
    assert jobs.run_state(None, running, waiting) == "running"
    assert jobs.run_state(SLURM, running, waiting) == "waiting (Resources)"
    assert jobs.run_state(SLURM, running, {}) == "dead: no job is running it"
    assert jobs.run_state(SLURM, None, {}) == "dead: the job ended before it began"
    assert jobs.run_state(SLURM, failed, {}) == "failed (70)"
    assert jobs.run_state(SLURM, None, {"12": ("COMPLETING", "None")}) == "ending"


def test_logs_are_the_last_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "12.log"
    run = a_run(tmp_path / "r", replace(SLURM, log=str(log)))
    assert cli.main(["logs", str(run)]) == 0
    assert "job 12 has printed nothing yet: " in capfd.readouterr().err
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert cli.main(["logs", str(run), "-n", "3"]) == 0
    assert capfd.readouterr().out == "line 97\nline 98\nline 99\n"


def test_following_shows_what_comes(tmp_path: Path) -> None:
    log = tmp_path / "12.log"
    run = a_run(tmp_path / "r", replace(SLURM, log=str(log)))
    log.write_text("first\n")
    argv = [sys.executable, "-m", "sslx", "logs", "-f", str(run)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        with open(log, "a") as file:
            file.write("second\n")
        assert process.stdout.readline() == "second\n"
        process.terminate()


@pytest.mark.parametrize(("command", "words"), [("jobs", "folder"), ("logs", "run folder"), ("cancel", "run folder")])
def test_what_is_not_there(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "nowhere"]) == 66
    is_one_line(capsys.readouterr().err, f"error: {words} nowhere does not exist")


def test_a_run_without_a_job_and_a_job_that_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cancel", str(a_run(tmp_path / "r"))]) == 66
    assert "was not submitted as a job" in capsys.readouterr().err
    gone = a_run(tmp_path / "s", replace(SLURM, cluster="local", id=str(2**22 + 1)))
    assert cli.main(["cancel", str(gone)]) == 64
    assert "has already ended" in capsys.readouterr().err
    assert not (tmp_path / "s" / "cancel").exists()


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys; from sslx.cluster import job, jobs, requeue; print({'torch', 'tyro'} & sys.modules.keys())"
    started = time.perf_counter()
    assert python("-c", code).stdout == "set()\n"
    assert time.perf_counter() - started < 20


def test_a_batch_job_claims_its_run_and_another_ones_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "999999")
    assert jobs.claim(tmp_path / "r", "0.1.0 abc") == ""
    job = records.read_job(tmp_path / "r")
    assert job is not None
    assert (job.cluster, job.id, job.code) == ("slurm", "999999", "0.1.0 abc")
    assert jobs.claim(tmp_path / "r", "0.1.0 abc") == ""  # requeued
    assert "0.1.0 abc -> 0.1.0 xyz" in jobs.claim(tmp_path / "r", "0.1.0 xyz")
    assert records.read_job(tmp_path / "r") == job
    code = [sys.executable, "-c", "import time; time.sleep(60)", "submitit"]  # as its controller's command line says
    with subprocess.Popen(code) as other:
        records.write_job(tmp_path / "r", replace(SLURM, cluster="local", id=str(other.pid)))
        time.sleep(0.2)
        with pytest.raises(ConfigError, match=f"belongs to job {other.pid}, which is running"):
            jobs.claim(tmp_path / "r", "0.1.0 abc")
        other.kill()
