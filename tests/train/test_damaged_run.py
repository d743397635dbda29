"""A restart of a run whose small files are damaged: it goes on with what the checkpoint holds, or says what is gone."""

import json
import shutil
from pathlib import Path

import pytest

from kit.processes import is_one_line
from kit.runs import Run

DAMAGED = [b"", b"\xff\0", b"[" * 100_000, b"{}", b"[]", None]


@pytest.mark.slow
def test_a_run_goes_on_whatever_its_small_files_hold(here: Run, tmp_path: Path) -> None:
    run = tmp_path / "r"
    assert here() == (0, "")
    whole = json.loads((run / "config.json").read_text())
    for data in DAMAGED:
        for name in ("config.json", "status.json", "run_id"):
            (run / name).unlink()
            (run / name).mkdir() if data is None and name == "config.json" else (run / name).write_bytes(data or b"")
        assert here("--resume", "auto") == (0, "")
        (note,) = [line for line in here.out.splitlines() if "is damaged" in line]
        assert note.startswith(f"{run}/config.json is damaged (")
        assert note.endswith("): using the config of step_2 instead")
        assert f"resumed {run} at step 2\n" in here.out
        if data is None:
            (run / "config.json").rmdir()
            (run / "config.json").write_text(json.dumps(whole))
        assert json.loads((run / "config.json").read_text()) == {**whole, "resume": "auto"} or data is None
    shutil.rmtree(run / "checkpoints")
    (run / "run_id").write_bytes(b"\xff")
    assert here("--resume", "auto") == (0, ""), "as a new start"
    assert f"{run} has no checkpoint yet: starting at step 0\n" in here.out
    assert (run / "run_id").read_text().isalnum()
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_text("")
    code, err = here("--resume", "auto")
    assert code == 64
    is_one_line(err, "config.json is damaged (it is empty), and there is no checkpoint")
