"""``sslx pretrain`` started under odd conditions: variables, ports and limits, each in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kit.processes import IN_A_STEP, SSLX, Record, is_one_line, metrics, pretrain, started_by_hand
from kit.runs import Run, status_of, steps_of
from sslx.machine import limits

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
PAIR = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}


def run(argv: list[str], **environ: str) -> tuple[int, str, float]:
    """(exit code, stderr, seconds)."""
    start = time.monotonic()
    done = subprocess.run(argv, env=PLAIN | environ, capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stderr, time.monotonic() - start


# ---------------------------------------------------------------- the environment

AT_ONCE = [
    *((PAIR | {"RANK": wrong}, "RANK") for wrong in ("x", "5", "-1", "٣", "0x1", "1_0")),
    *((PAIR | {"WORLD_SIZE": wrong}, "WORLD_SIZE") for wrong in ("0", "9" * 400)),
    *((PAIR | {"MASTER_PORT": wrong}, "MASTER_PORT") for wrong in ("x", "-1")),
    (PAIR | {"LOCAL_RANK": "two"}, "LOCAL_RANK"),
    ({"SSLX_GIVE_UP_S": "abc"}, "SSLX_GIVE_UP_S"),
    ({"SSLX_STALL_S": "-inf"}, "SSLX_STALL_S"),
    ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS"),
    (SLURM | {"SLURM_NTASKS": "x"}, "SLURM_NTASKS"),
    (SLURM | {"SLURM_PROCID": "a"}, "SLURM_PROCID"),
    (SLURM | {"SLURM_LOCALID": "\x1b[31m"}, "SLURM_LOCALID"),
]


@pytest.mark.slow
def test_an_environment_that_cannot_be_is_one_line_at_once(tmp_path: Path, record_property: Record) -> None:
    longest_s = 0.0
    for environ, name in AT_ONCE:
        code, err, seconds = run([*SSLX, *pretrain(tmp_path)], **environ)
        assert code == 64, (environ, err)
        is_one_line(err, f"expected {name} ")
        assert err.strip().isprintable()
        longest_s = max(longest_s, seconds)
    assert not list(tmp_path.iterdir())
    record_property("figure", f"exit code 64 and one line {len(AT_ONCE)} of {len(AT_ONCE)} times, in {longest_s:.1f} s")


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path: Path, record_property: Record) -> None:
    (tmp_path / "gone").mkdir()
    shell = ["bash", "-c", 'cd "$1" && rmdir "$1" && exec "${@:2}"', "bash", str(tmp_path / "gone")]
    path = os.pathsep.join(filter(None, sys.path))
    code, err, _ = run([*shell, *SSLX, *pretrain(tmp_path)], PYTHONPATH=path)
    assert code == 64
    is_one_line(err, "the current folder does not exist anymore")
    record_property("figure", "exit code 64, one line")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"MASTER_ADDR": "no.such.host.invalid"}, 64, "expected MASTER_ADDR to be the address of rank 0's machine"),
        ({"RANK": "1"}, 70, "waited 3 s for rank 0 of 2"),
        ({"RANK": "0"}, 70, "waited 3 s for rank 1 of 2"),
    ],
)
def test_ranks_that_cannot_meet_are_one_line(
    tmp_path: Path, changes: dict[str, str], code: int, words: str, record_property: Record
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environ = {**PAIR, "MASTER_PORT": port, "SSLX_JOIN_S": "3", **changes}
    came, err, seconds = run([*SSLX, *pretrain(tmp_path)], **environ)
    assert came == code
    is_one_line(err, words)
    assert seconds < 100, "not after minutes"
    assert not (tmp_path / "r").exists()
    record_property("figure", f"{changes}: exit code {code} after {seconds:.1f} s")


@pytest.mark.slow
def test_a_port_that_another_process_has_is_one_line(tmp_path: Path, record_property: Record) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err, seconds = run([*SSLX, *pretrain(tmp_path)], **{**PAIR, "MASTER_PORT": str(port)})
    assert code == 70
    is_one_line(err, f"expected port {port} (MASTER_PORT) of this machine to be free", "in use")
    record_property("figure", f"exit code 70 after {seconds:.1f} s")


# ---------------------------------------------------------------- launchers at the same moment

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
def test_launchers_of_the_same_pid_on_one_network_at_the_same_moment(tmp_path: Path, record_property: Record) -> None:
    """As in containers on the host's network, in which every launcher is process 1."""
    folders = [tmp_path / str(number) for number in range(6)]
    commands = [[*CONTAINER, *SSLX, *pretrain(folder, "--ranks", "2")] for folder in folders]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launchers = [subprocess.Popen(argv, env=PLAIN | {"OMP_NUM_THREADS": "1"}, **pipes) for argv in commands]
    said = [launcher.communicate(timeout=400)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * 6, said
    assert said == [""] * 6
    assert [steps_of(folder) for folder in folders] == [[1, 2]] * 6
    record_property("figure", "6 launchers of 2 ranks, each process 1 of its namespace: all done")


# ---------------------------------------------------------------- limits, and bad luck in a step


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_the_least_address_space_that_is_taken_is_enough(tmp_path: Path, backend: str, record_property: Record) -> None:
    """Below it OpenBLAS would try for ever to allocate its buffers, so a limit of less is refused before it loads."""
    least = limits.min_memory_bytes()
    digits = pretrain(tmp_path, "--source.name", "digits", "--data.backend", backend)
    shell = ["bash", "-c", f'ulimit -v {least // 2**10} && exec "$@"', "bash"]
    assert run([*shell, *SSLX, *digits])[:2] == (0, "")
    record_property("figure", f"ulimit -v {least / 2**30:.1f} GiB: exit code 0")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_that_ends_in_a_step_is_one_line(tmp_path: Path, world_size: int, record_property: Record) -> None:
    harm = f"if number == 5 and os.environ['RANK'] == '{world_size - 1}': raise MemoryError"
    argv = pretrain(tmp_path, "--steps", "20", "--optim.lr", "0.01")
    ranks = started_by_hand(world_size, *argv, code=IN_A_STEP.format(harm=harm))
    assert ranks[-1][0] == 64
    errors = [line for _, said in ranks for line in said.splitlines(keepends=True) if "rror" in line]
    is_one_line("".join(errors), "out of host memory")
    assert (status_of(tmp_path).state, "memory" in status_of(tmp_path).reason) == ("failed", True)
    record_property("figure", f"{world_size} ranks: exit codes {[code for code, _ in ranks]}")


@pytest.mark.slow
def test_the_rank_whose_step_or_loader_is_slow_is_named(tmp_path: Path, record_property: Record) -> None:
    """Half a second of rank 1's every step, and of its every batch."""
    slow_loader = "from sslx.data import Loader; real = Loader.__next__; "
    slow_loader += "Loader.__next__ = lambda self: (time.sleep(0.5), real(self))[1]"
    for where, harm in (
        ("step", "os.environ['RANK'] == '1' and time.sleep(0.5)"),
        ("loader", f"if number == 1 and os.environ['RANK'] == '1': exec({slow_loader!r}, globals())"),
    ):
        argv = pretrain(tmp_path / where, "--steps", "24", "--optim.lr", "0.01", "--log.every", "4")
        ranks = started_by_hand(2, *argv, code=IN_A_STEP.format(harm=harm))
        assert [code for code, _ in ranks] == [0, 0]
        last = metrics(tmp_path / where / "r")[-1]
        assert last["slowest_rank"] == 1
        assert last["slowest_rank_s"] > 0.45
        assert last["samples_per_s"] < 16 / 0.5
        waited_s = last["data_wait"] * 16 / last["samples_per_s"]  # of a step; its share depends on the machine's load
        assert (waited_s > 0.4) == (where == "loader")
        record_property(
            "figure",
            f"slow {where}: rank 1 at {last['slowest_rank_s']:.2f} s a step, the others {last['other_ranks_s']:.2f} s, "
            f"data_wait {last['data_wait']:.2f}",
        )


def test_a_name_of_300_characters_is_one_line(here: Run, record_property: Record) -> None:
    for name in ("x" * 300, "é" * 150, "."):
        code, err = here("--name", name)
        assert code == 64
        is_one_line(err, "--name")
    record_property("figure", "exit code 64, one line")


def test_a_signal_in_the_very_first_moment_gives_no_traceback(tmp_path: Path, record_property: Record) -> None:
    """Before the first line of sslx the process is Python's own: it dies by the signal or ends as documented."""
    codes: set[int] = set()
    for moment in range(12):
        argv = [*SSLX, *pretrain(tmp_path, "--name", str(moment))]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(0.02 * moment)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
        assert "Traceback" not in err
        codes.add(process.returncode)
    assert codes <= {-signal.SIGTERM, 75}
    record_property("figure", f"exit codes {sorted(codes)} of 12")
