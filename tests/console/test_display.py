"""What a terminal shows of a run, and the lines where there is none."""

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from kit.processes import until
from kit.screen import lines_on
from sslx.console import activity, display
from sslx.console.display import Screen, Terminal
from sslx.runs import last_lines

METRICS = {"epoch": 0.61, "loss": 5.1234, "lr": 0.24, "samples_per_s": 812.3, "data_wait": 0.03}


def plain(text: str) -> list[str]:
    """The lines that a terminal was sent, without colors and cursor moves."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def screen(file: io.StringIO, width: int = 80) -> Screen:
    return Screen(file=file, force_terminal=True, width=width)


@pytest.fixture
def file() -> io.StringIO:
    return io.StringIO()


def until_shown(file: io.StringIO, text: str) -> None:
    until(lambda: text in file.getvalue(), text, 60)


def test_lines_where_there_is_no_terminal(file: io.StringIO) -> None:
    with Terminal(console=Console(file=file, force_terminal=False)) as terminal:
        terminal.begin(3900, 100)
        terminal.log(101, {})  # an hour, for all that the next steps tell
        time.sleep(0.04)
        terminal.message("resumed from step 100 [not markup] :smile:")
        terminal.log(120, METRICS)
        terminal.log(3900, {**METRICS, "loss": float("nan"), "lr": 1e-5, "knn/accuracy": 0.91234, "age": 1.0})
    first, *lines = file.getvalue().splitlines()
    assert first == "step  101/3900  ETA -:--"
    assert lines[0] == "resumed from step 100 [not markup] :smile:"
    fields = "epoch 0.61  loss 5.123  lr 0.240  812 samples/s  data 3 %"
    assert re.fullmatch(rf"step  120/3900  {fields}  ETA (\d+:\d\d)", lines[1])
    minutes, seconds = map(int, lines[1].split("ETA ")[1].split(":"))
    assert 60 * minutes + seconds >= 0.04 / 19 * 3779 - 1
    assert lines[2] == (
        "step 3900/3900  epoch 0.61  loss nan  lr 1.00e-05  812 samples/s  data 3 %  "
        "knn/accuracy 0.9123  age 1  ETA 0:00"
    )
    assert len(lines) == 3


@pytest.mark.parametrize("width", [80, 60, 120, 200])
def test_the_display_on_a_terminal(width: int, file: io.StringIO) -> None:
    health = {"feature_rank": 25.65, "feature_std": 0.4753, "feature_alignment": 0.1234, "feature_uniformity": -1.5}
    worst = {**METRICS, "epoch": 123.45, "loss": 0.012345, "lr": 0.00024, "samples_per_s": 123456, "data_wait": 1.0}
    with Terminal(console=screen(file, width)) as terminal:
        terminal.begin(39000)
        terminal.log(120, METRICS)
        terminal.message("step 100 is damaged: " + 100 * "x")
        terminal.log(38000, {**worst, "embedding/std": 0.9, "positive/similarity": 0.5, **health})
        terminal.log(39000, {"knn": 0.5})
    terminal.close()
    terminal.message("  sslx pretrain " + 100 * "x")
    sent = file.getvalue()
    assert "\x1b[?25" not in sent, "the cursor stays as it is: nothing would bring it back after a kill"
    lines = lines_on(sent)
    long = [line for line in lines if "xxx" in line]
    assert long[0].endswith(100 * "x"), "a name is not broken"
    assert long[1] == "  sslx pretrain " + 100 * "x", "nor is a command"
    assert max(len(line) for line in lines if "xxx" not in line) <= max(width, 60)
    start = next(i for i, line in enumerate(lines) if line.startswith("✓"))
    end = [line.rstrip() for line in lines[start : lines.index(long[1])]]
    assert re.fullmatch(r"✓  ━+  100 %  step 39000/39000  took 0:0\d", end[0])
    assert max(map(len, end)) <= min(width, 100)
    if width >= 80:
        assert end[1] == "epoch 123.45  loss 0.01235  lr 0.000240  123,456 samples/s  data 100 %"
    fields = [field for line in end[1:] for field in line.split("  ")]
    names = ["embedding/std", "positive/similarity", *health, "knn"]
    assert [field.split()[0] for field in fields[5:]] == names, "each is there, none is cut"
    assert "" not in end


def test_an_echoed_ctrl_c_leaves_no_copy_of_the_bar(file: io.StringIO) -> None:
    with Terminal(console=screen(file)) as terminal:
        terminal.begin(200)
        terminal.log(1, {**METRICS, "alignment": 0.1})
        file.write("^C")  # where the cursor stands, by the terminal itself
        terminal.message("saving after this step")
        file.write("^C^C")
    lines = lines_on(file.getvalue())
    assert sum("step" in line and "/200" in line for line in lines) == 1
    assert not any("^C" in line for line in lines)
    assert lines[-1] == "", "a prompt gets a line of its own"
    assert lines[-2] == "alignment 0.1"


def test_what_it_is_busy_with_is_shown_before_the_first_step(file: io.StringIO) -> None:
    with Terminal(console=screen(file)) as terminal:
        assert plain(file.getvalue())[-1] == ""
        assert "starting ..." in plain(file.getvalue())[-2]
        with activity.doing("listing the images"):
            until_shown(file, "listing the images ... 0:0")
        terminal.begin(10)
        with activity.doing("first step"):
            until_shown(file, "first step ... 0:0")
            with activity.doing("decoding"):
                until_shown(file, "decoding ... 0:0")
            assert activity.current()[0] == "first step"
    assert activity.current() == ("", 0.0)
    (end,) = [line for line in lines_on(file.getvalue()) if line]
    assert re.fullmatch(r"■  ━+    0 %  step  0/10  took 0:\d\d", end.rstrip())


def test_a_display_that_ends_before_it_begins_leaves_nothing(file: io.StringIO) -> None:
    with Terminal(console=screen(file)) as terminal:
        pass
    terminal.message("error: no images")
    assert [line for line in lines_on(file.getvalue()) if line] == ["error: no images"]


def test_the_bar_moves_and_tells_the_time_left_between_two_log_lines(file: io.StringIO) -> None:
    with Terminal(console=screen(file)) as terminal:
        terminal.begin(100)
        for step in (1, 2):
            terminal.advance(step)
            time.sleep(0.1)
        until_shown(file, "step   2/100")
    frames = [line for line in plain(file.getvalue()) if "step   2/100" in line]
    assert re.search(r"ETA +\d+:\d\d", frames[0])


def test_a_log_file_is_told_once_what_takes_long(monkeypatch: pytest.MonkeyPatch, file: io.StringIO) -> None:
    monkeypatch.setattr(display, "REPORT_AFTER_S", 0.2)
    monkeypatch.setattr(display, "_SAMPLE_S", 0.05)
    with Terminal(console=Console(file=file, force_terminal=False)):
        for _ in range(2):
            with activity.doing("decoding"):
                time.sleep(0.4)
        with activity.doing("saving"):
            until_shown(file, "saving")
    assert file.getvalue() == "decoding ...\nsaving ...\n"


def test_numbers_without_labels_are_explained_once(file: io.StringIO) -> None:
    terminal = Terminal(console=Console(file=file, force_terminal=False))
    terminal.begin(3)
    for step in (1, 2):
        terminal.log(step, {"loss": 1.0, "std": 0.9, "alignment": 0.1})
    terminal.log(3, {"feature_rank": 2.0})
    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["std:", "step", "step", "feature_rank:", "step"]


def test_on_other_ranks_it_is_silent(file: io.StringIO) -> None:
    with Terminal(False, screen(file)) as terminal:
        terminal.begin(3)
        terminal.log(1, METRICS)
        terminal.advance(2)
        terminal.message("not shown")
    assert file.getvalue() == ""


def test_durations() -> None:
    shown = [display.clock(seconds) for seconds in (0, 59.6, 272, 3600, 100 * 3600 + 62)]
    assert shown == ["0:00", "1:00", "4:32", "1:00:00", "100:01:02"]


def test_the_last_words_name_commands_that_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = Path("my runs/a'b")
    command = """sslx resume 'my runs/a'"'"'b'"""
    assert last_lines.resume_command(folder) == command
    stopped = f"stopped at step 5 by Ctrl-C; checkpoint: {folder}/checkpoints/step_5"
    assert last_lines.stopped(folder, 5, 5, "Ctrl-C") == [stopped, "to continue:", f"  {command}"]
    assert "checkpoint of step 4" in last_lines.stopped(folder, 5, 4, "Ctrl-C")[0]
    assert "nothing is saved" in last_lines.stopped(folder, 5, 0, "SIGTERM")[0]
    assert last_lines.failed(folder, 0) == []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert len(last_lines.stopped(folder, 5, 5, "SIGTERM")) == 1, "the job goes on by itself"
