"""``sslx pretrain`` on a real terminal: Ctrl-C is answered, its last words hold true, the cursor is never hidden."""

import re
import shlex
from pathlib import Path

import pytest

from kit.processes import LONG, pretrain
from kit.runs import Run, status_of, steps_of
from kit.screen import Terminal, sslx_on_a_terminal
from sslx import cli

ANSWER_S = 5.0
"""In which Ctrl-C is answered, with room for a loaded machine."""


RARELY = ["--log.every", "1000"]


def bars(terminal: Terminal) -> list[str]:
    return [line for line in terminal.lines if re.search(r"━.* step +\d+/\d+ ", line)]


def moves(sent: str) -> bool:
    """Whether the bar has been seen at two steps beyond the first, all far from a log line."""
    return len(set(re.findall(r"step +(\d+)/", sent)) - {"0", "1"}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_answered_and_the_command_it_ends_with_goes_on(tmp_path: Path, ranks: int):
    flags = "--steps 60 --checkpoint.every 0 --optim.lr 0.01 --batch-size 64 --num-micro-batches 4".split()
    with sslx_on_a_terminal(*pretrain(tmp_path, *RARELY, *flags, "--ranks", str(ranks))) as terminal:
        terminal.until(lambda sent: "starting ..." in sent, "the first word")
        terminal.until(moves, "two steps")
        assert re.search(r"ETA +\d+:\d\d", terminal.sent)
        terminal.press_ctrl_c()
        terminal.until(lambda sent: "press Ctrl-C again to end now" in sent, "the answer", ANSWER_S)
        assert terminal.wait() == 130
    assert "\x1b[?25" not in terminal.sent, "the cursor stays as it is"
    assert len(bars(terminal)) == 1, "no stale copy"
    assert "starting ..." not in "\n".join(terminal.lines)
    status = status_of(tmp_path)
    assert (status.state, status.reason, status.code) == ("stopped", "SIGINT", 130)
    assert 1 < status.step < 60
    lines = [line for line in terminal.lines if line]
    assert f"stopped at step {status.step} by Ctrl-C; checkpoint: " in " ".join(lines)
    assert lines[-2] == "to continue:"
    name, *argv = shlex.split(lines[-1])
    assert name == "sslx"
    with sslx_on_a_terminal(*argv) as terminal:
        assert terminal.wait() == 0
    assert re.sub(r"\s", "", f"resumed {tmp_path / 'r'} at step {status.step}") in re.sub(r"\s", "", terminal.sent)
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("done", 60)
    assert steps_of(tmp_path)[-1] == 60


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_in_a_long_step_ends_it_with_words_and_a_visible_cursor(tmp_path: Path, ranks: int):
    """A step of a minute, none of which is done."""
    endless = "--source.num-samples 4096 --batch-size 4096 --num-micro-batches 1024 --steps 1".split()
    with sslx_on_a_terminal(*pretrain(tmp_path, *RARELY, *endless, "--ranks", str(ranks))) as terminal:
        terminal.until(lambda sent: "first step ... 0:02" in sent, "the first step")
        terminal.press_ctrl_c()
        terminal.until(lambda sent: "press Ctrl-C again to end now" in sent, "the answer", ANSWER_S)
        terminal.until(lambda sent: "first step ... 0:05" in sent, "the same step, more than a second later")
        terminal.press_ctrl_c()
        assert terminal.wait(10) == 130
    assert not any(control in terminal.sent for control in ("\x1b[?25", "Traceback", "step 1/1"))
    lines = [line for line in terminal.lines if line]
    assert lines[-3] == "stopped by Ctrl-C before the first checkpoint: nothing is saved"
    assert lines[-1] == f"  sslx resume {tmp_path}/r"
    assert len(bars(terminal)) == 1
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("stopped", 130)


@pytest.mark.slow
def test_a_display_is_killed_without_a_trace(tmp_path: Path):
    with sslx_on_a_terminal(*pretrain(tmp_path, *RARELY, *LONG)) as terminal:
        terminal.until(moves, "two steps")
    assert "\x1b[?25" not in terminal.sent
    assert terminal.lines[-1] == "", "a prompt gets a line of its own"


@pytest.mark.soak
def test_a_finished_run_says_what_comes_next_and_a_second_start_that_it_is_finished(here: Run, tmp_path: Path):
    assert here()[0] == 0
    run = tmp_path / "r"
    done, *commands = here.out.splitlines()[-4:]
    assert done == f"done: 2 steps; run folder: {run}; checkpoint: {run}/checkpoints/step_2"
    assert commands == ["next:", f"  sslx probe {run}", f"  sslx plot {run}"]
    before = (run / "metrics.jsonl").read_bytes()
    assert here("--resume", "auto")[0] == 0
    finished, _, command = here.out.splitlines()[-3:]
    assert finished == f"{run} has already finished (2 steps): there is nothing to do"
    assert command == f"  sslx pretrain {run}/config.json --name NAME --encoder.weights {run}"
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("done", 2)
    code, err = here("--resume", "auto", "--steps", "3")
    assert code == 64
    assert f"another --name with --encoder.weights {run}, to train longer" in err
    assert cli.main(shlex.split(command.replace("NAME", "longer"))[1:]) == 0, "as it says"
    assert (tmp_path / "longer" / "checkpoints" / "step_2").exists()
