"""Standard streams that are closed, full, slow or of another locale: commands go on, and nothing else is written to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.processes import TINY, metrics
from sslx.console import streams

LOST = "cannot write to standard output (No space left on device): further output to it is lost\n"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(script: str, *arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """bash, with $PYTHON and the arguments."""
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environ
    return subprocess.run(command, capture_output=True, check=False, timeout=240, env=variables)


CHILD = """
import os, subprocess, sys
from sslx.console import streams
streams.make_safe()
streams.make_safe()
kept = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert kept > 2, kept
os.write(1, b"from a library\\n")
os.write(2, b"from a library\\n")
print("printed")
print("printed", file=sys.stderr)
sys.stdin.read()
code = "import sys, os; [os.fstat(n) for n in (0, 1, 2)]; print(1); print(2, file=sys.stderr)"
sys.exit(subprocess.run([sys.executable, "-c", code]).returncode)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_written_to_by_nobody(tmp_path: Path, closed: str) -> None:
    """Else the file opened next would have its number, and hold what libraries and child processes print."""
    done = shell(f'exec {closed}; "$PYTHON" -c "$1" "$2"', CHILD, tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept").read_bytes() == b""
    assert done.stdout.count(b"printed") == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_full_disk_is_told_once_on_the_other_stream(flags: list[str]) -> None:
    code = (
        "import sys; from sslx.console import streams; streams.make_safe()\n"
        "for _ in range(3): print('x' * 10_000, flush=True); print('y', file=sys.stderr)"
    )
    done = shell('"$PYTHON" "$@" >/dev/full', *flags, "-c", code)
    assert (done.returncode, done.stderr.decode()) == (0, LOST + "y\n" * 3)
    done = shell('"$PYTHON" "$@" 2>/dev/full', *flags, "-c", code)
    assert done.returncode == 0
    assert done.stdout.count(b"cannot write to standard error (No space left on device)") == 1
    assert done.stdout.count(b"x") == 30_000
    assert shell('"$PYTHON" "$@" >/dev/full 2>&1', *flags, "-c", code).returncode == 0


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(flags: list[str]) -> None:
    code = (
        "import os; os.set_blocking(1, False)\n"
        "from sslx.console import streams; streams.make_safe()\n"
        "for i in range(20_000): print(i, '.' * 90)"
    )
    reader = "import sys, time; time.sleep(0.3); print(sys.stdin.read().split('\\n')[19_999][:6])"
    done = shell('"$PYTHON" "${@:2}" | "$PYTHON" -c "$1"; exit "${PIPESTATUS[0]}"', reader, *flags, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"19999 \n", b"")


def test_what_an_encoding_does_not_have_is_replaced() -> None:
    code = "import sys; from sslx.console import streams; streams.make_safe(); print('\\xfc\\udcff\\u2501')"
    code += "; sys.stderr.write('\\xfc\\n')"
    done = shell('"$PYTHON" -c "$1"', code, **ASCII)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"???\n", b"\\xfc\n")
    done = shell('"$PYTHON" -c "$1"', code, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout) == (0, b"\xfc??\n")


def test_a_stream_of_a_test_stays(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    streams.make_safe()
    assert (sys.stdout, sys.stderr) == before
    sys.stdout.write("ü")
    assert capsys.readouterr().out == "ü"


SLOW_COMMANDS = [pytest.param(command, marks=pytest.mark.slow) for command in ("pretrain --help", "doctor")]


@pytest.mark.parametrize("command", ["--help", "jobs .", *SLOW_COMMANDS])
def test_commands_print_whatever_the_streams_are(tmp_path: Path, command: str) -> None:
    run = tmp_path / "ünï"
    run.mkdir()
    (run / "config.json").write_text("{}")
    go = f'cd "$1" && "$PYTHON" -m sslx {command}'
    done = shell(go, tmp_path, **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert len(done.stdout.splitlines()) > 1
    done = shell(go + " >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    done = shell(go + " >/dev/full", tmp_path)
    assert (done.returncode, done.stderr.decode()) == (0, LOST)
    done = shell(go + ' | head -c 0; exit "${PIPESTATUS[0]}"', tmp_path)
    assert (done.returncode, done.stderr) in [(141, b""), (0, b"")]  # whichever was faster


def test_a_closed_pipe_of_a_table_is_141(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sslx", "jobs", str(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"])
def test_training_goes_on_to_its_end(tmp_path: Path, streams: str, ranks: str) -> None:
    script = f'"$PYTHON" -m sslx pretrain --name r "$@" {streams}'
    done = shell(script, *TINY, "--ranks", ranks, "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "status.json").read_text())["state"] == "done"
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]


@pytest.mark.slow
def test_training_with_all_streams_closed_ends_as_done(tmp_path: Path) -> None:
    test_training_goes_on_to_its_end(tmp_path, "<&- >&- 2>&-", "1")
