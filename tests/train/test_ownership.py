"""Two runs in one folder, and a run whose folder goes away: real processes of ``sslx pretrain``."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from kit.processes import LONG, Record, is_one_line, outside, said, started, until, until_training
from kit.runs import Run, status_of, steps_of
from sslx import cli
from sslx.runs import checkpoint

pytestmark = pytest.mark.slow
ENDLESS = [*LONG, "--optim.lr", "0.01"]


def test_a_run_that_goes_on_is_not_touched_and_a_killed_one_is_resumed_at_once(here: Run, tmp_path: Path) -> None:
    with started(tmp_path, *ENDLESS) as process:
        until_training(tmp_path, process)
        for resume in ("no", "auto"):
            code, err = here(*ENDLESS, "--resume", resume)
            assert code == 64
            is_one_line(err, f"run folder {tmp_path / 'r'} is in use by process {process.pid} on ", "let it end")
        assert process.poll() is None
        process.kill()
        process.wait()
    steps = len(steps_of(tmp_path))
    assert steps >= 2
    assert (tmp_path / "r" / "owner.json").exists()
    code, err = here(*ENDLESS, "--resume", "auto", "--steps", str(steps + 3))
    assert (code, "--steps" in err) == (64, True)  # another config; the claim was had, and given back
    assert not (tmp_path / "r" / "owner.json").exists()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_resume_of_a_run_that_goes_on_ends_with_one_line(tmp_path: Path, ranks: str) -> None:
    flags = [*ENDLESS, "--ranks", ranks, "--resume", "auto"]
    with started(tmp_path, *flags) as process:
        until_training(tmp_path, process)
        code, _, err = outside(tmp_path / "second", *flags, "--runs", tmp_path)
        assert code == 64
        is_one_line(err, "is in use by process ", "let it end")
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 75
    assert "error" not in (tmp_path / "err").read_text()
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_of_two_runs_that_start_at_once_exactly_one_goes_on(
    tmp_path: Path, resume: str, record_property: Record
) -> None:
    flags = ["--steps", "40", "--checkpoint.every", "1", "--optim.lr", "0.01", "--resume", resume]
    for number in range(2):
        folder, other = tmp_path / str(number), tmp_path / f"{number}b"
        with started(folder, *flags) as first, started(other, *flags, "--runs", folder) as second:
            codes = sorted([first.wait(100), second.wait(100)])
        errors = said(folder) + said(other)
        if codes == [0, 0]:  # the second came when the first had ended
            assert resume == "auto"
            assert errors == ""
        else:
            assert codes == [0, 64]
            is_one_line(errors, str(folder / "r"))
        assert steps_of(folder) == list(range(1, 41))
        assert checkpoint.load(folder / "r")["step"] == 40
        assert status_of(folder).state == "done"
        assert not list((folder / "r").glob("*owner*"))
    record_property("figure", f"--resume {resume}: 2 of 2 times one run alone, 40 lines in order")


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_folder_deleted_in_mid_run_ends_the_run_and_stays_deleted(tmp_path: Path, ranks: str) -> None:
    with started(tmp_path, "--ranks", ranks, *ENDLESS) as process:
        until_training(tmp_path, process)
        (tmp_path / "r").rename(tmp_path / "gone")  # at once, which the deletion of many files is not
        shutil.rmtree(tmp_path / "gone")
        assert process.wait(60) == 74
    errors = [
        line for line in (tmp_path / "err").read_text().splitlines(keepends=True) if line.startswith(("error", "Trace"))
    ]
    is_one_line("".join(errors), f"run folder {tmp_path / 'r'} was deleted or moved", "nothing more is written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["err", "out"]


def test_a_run_whose_folder_another_one_has_by_now_ends_without_a_word_in_it(tmp_path: Path) -> None:
    """As where a machine was silent for so long that its run was taken for dead."""
    with started(tmp_path, *ENDLESS) as process:
        until_training(tmp_path, process)
        os.kill(process.pid, signal.SIGSTOP)
        taken = (tmp_path / "r" / "owner.json").read_text().replace('"token": "', '"token": "f')
        (tmp_path / "r" / "owner.json").write_text(taken)
        before = {p: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.name != "metrics.jsonl"}
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(60) == 74
    is_one_line((tmp_path / "err").read_text(), "now belongs to process ")
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.name != "metrics.jsonl"}


def test_jobs_tells_a_killed_run_from_one_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(tmp_path, *ENDLESS) as process:
        until_training(tmp_path, process)
        assert cli.main(["jobs", str(tmp_path)]) == 0
        assert " running " in capsys.readouterr().out
        process.kill()
        process.wait()
    until(lambda: cli.main(["jobs", str(tmp_path)]) == 0, "table")
    out = capsys.readouterr().out
    assert "dead: its process is gone" in out
    assert "running" not in out
