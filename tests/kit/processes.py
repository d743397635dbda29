"""``sslx pretrain`` of a tiny encoder in processes of its own, for the tests that look at it from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kit import words

TINY = (
    "--source.name synthetic --source.num-samples 64 --data.size 16 --data.backend synthetic "
    "--encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --steps 2 --optim.name sgd --log.every 1 --online.every 0 --device cpu --precision fp32"
).split()
Record = Callable[[str, object], None]
"""Of pytest's ``record_property("figure", ...)``: what tests/faults.py writes down."""
LONG = ["--steps", "1000000", "--checkpoint.every", "0"]
SSLX = [sys.executable, "-m", "sslx"]

# ``sslx`` with a training loop that does something before each step.
IN_A_STEP = """
import os, sys, time, torch
from sslx import cli
from sslx.train import pretrain as loop
number, train_step = 0, loop.train_step
def harmed(model, *given):
    global number
    number += 1
    {harm}
    return train_step(model, *given)
loop.train_step = harmed
sys.exit(cli.main(sys.argv[1:]))
"""


def pretrain(folder: Path, *flags: str | Path) -> list[str]:
    """The arguments of ``sslx`` for a run in folder/r."""
    return ["pretrain", *TINY, "--runs", str(folder), "--name", "r", *map(str, flags)]


@contextmanager
def started(folder: Path, *flags: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A run in processes of its own, output in ``folder/{out,err}``; whatever is left of it is killed."""
    folder.mkdir(exist_ok=True)
    argv = [*SSLX, *pretrain(folder, *flags)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, text=True, env=environ, start_new_session=True)
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            if process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def said(folder: Path) -> str:
    """What a run of ``started`` said on stderr, without other people's warnings."""
    return words.own((folder / "err").read_text())


def outside(folder: Path, *flags: str | Path, timeout_s: float = 240) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in processes of its own."""
    with started(folder, *flags) as process:
        process.wait(timeout_s)
    return process.returncode, (folder / "out").read_text(), said(folder)


def started_by_hand(
    world_size: int, *argv: str | Path, code: str = "", of_rank_1: Sequence[str] = ()
) -> list[tuple[int, str]]:
    """(exit code, stderr) of ranks that are started one by one; code: run in place of ``-m sslx``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    head = [sys.executable, "-c", code] if code else SSLX
    shared = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes: list[subprocess.Popen[str]] = []
    for rank in map(str, range(world_size)):
        command, environ = [*head, *map(str, argv)], shared | {"RANK": rank, "LOCAL_RANK": rank}
        command += of_rank_1 if rank == "1" else ()
        none, pipe = subprocess.DEVNULL, subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environ, stdout=none, stderr=pipe, text=True))
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def until(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> float:
    """Wait; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def until_training(folder: Path, process: subprocess.Popen[str]) -> None:
    until(lambda: bool(re.search(r"step +2/", (folder / "out").read_text())) or process.poll() is not None, "step 2")
    assert process.poll() is None, (folder / "err").read_text()


def children(parent: int) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(after[1]) == parent and after[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def is_one_line(err: str, *words: str) -> None:
    """stderr is one line that says ``error:`` and these words."""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
