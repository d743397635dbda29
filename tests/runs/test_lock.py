"""One owner of a run folder: real processes that race for it, are killed in it, or live in containers."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.processes import Record, until
from sslx.errors import ConfigError, StorageError
from sslx.runs import lock
from sslx.runs.owner import GONE_AFTER_S

# Claims the folder that a line names, says "won" or why not, and releases it at the next line.
CLAIMANT = """
import sys
from pathlib import Path
from sslx.errors import ConfigError
from sslx.runs import lock
for line in sys.stdin:
    try:
        claim = lock.acquire(Path(line.strip()))
        print("won", flush=True)
    except ConfigError as error:
        claim = None
        print(error, flush=True)
    sys.stdin.readline()
    if claim:
        claim.release()
    print("released", flush=True)
"""

# Claims, looks whether it is alone, releases, for ever.
WORKER = """
import os, random, sys, time
from pathlib import Path
from sslx.errors import ConfigError
from sslx.runs import lock
folder, inside, said = Path(sys.argv[1]), Path(sys.argv[2]), open(sys.argv[3], "a", buffering=1)
while True:
    try:
        claim = lock.acquire(folder)
    except ConfigError:
        time.sleep(random.uniform(0, 0.002))
        continue
    other = inside.read_text() if inside.exists() else ""
    if other and Path(f"/proc/{other}").exists() and "Z" not in Path(f"/proc/{other}/stat").read_text().split(")")[1]:
        said.write(f"violated {os.getpid()} {other}\\n")
    inside.write_text(str(os.getpid()))
    said.write("owned\\n")
    time.sleep(random.uniform(0, 0.002))
    inside.unlink(missing_ok=True)
    claim.release()
"""


@contextmanager
def claimants(num: int) -> Iterator[list[subprocess.Popen[str]]]:
    argv = [sys.executable, "-c", CLAIMANT]
    made = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(num)]
    try:
        yield made
    finally:
        for process in made:
            process.kill()
            process.communicate()


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def race(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    """Exactly one wins; the others say who has it, or, where they looked before it was there, whom they wait for."""
    for process in processes:
        say(process, str(folder))
    said = [answer(process) for process in processes]
    winners = [process for process, words in zip(processes, said, strict=True) if words == "won"]
    assert len(winners) == 1, said
    for words in said:
        assert words == "won" or f"is in use by process {winners[0].pid} on {socket.gethostname()}" in words
    for process in processes:
        say(process, "")
    assert [answer(process) for process in processes] == ["released"] * len(processes)
    assert not list(folder.iterdir())


def killed(folder: Path, *wrapper: str) -> None:
    """Leave the claim of a process that was killed by SIGKILL; wrapper: a command to run it under."""
    code = "import os, sys; from pathlib import Path; from sslx.runs import lock; "
    code += "claim = lock.acquire(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    argv = [*wrapper, sys.executable, "-c", code, str(folder)]
    done = subprocess.run(argv, check=False, timeout=60)
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert (folder / lock.NAME).exists()


def alter(folder: Path, **changes: Any) -> None:
    path = folder / lock.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def silence(folder: Path, age_s: float) -> None:
    """Let the owner's last sign of life be so long ago."""
    then = time.time() - age_s
    os.utime(folder / lock.NAME, (then, then))


def test_of_several_who_claim_a_free_folder_exactly_one_wins(tmp_path: Path, record_property: Record) -> None:
    with claimants(4) as processes:
        for number in range(60):
            (tmp_path / str(number)).mkdir()
            race(processes, tmp_path / str(number))
    record_property("figure", "4 processes claimed 60 folders: one owner each")


def test_of_several_successors_of_a_killed_owner_exactly_one_wins(tmp_path: Path) -> None:
    killed(tmp_path)
    left = (tmp_path / lock.NAME).read_text()
    with claimants(4) as processes:
        for number in range(60):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / lock.NAME).write_text(left)
            if number % 3 == 1:  # a file system without locks
                alter(folder, flocked=False)
            if number % 3 == 2:  # a first successor that was killed before it renamed its claim
                killed_token = json.loads(left)["token"]
                (folder / f".owner.{killed_token}.successor").write_text(left.replace(killed_token, "5" * 16))
            race(processes, folder)


@pytest.mark.soak
def test_nobody_shares_a_folder_while_owners_are_killed_at_random(tmp_path: Path, record_property: Record) -> None:
    folder, inside, said = tmp_path / "run", tmp_path / "inside", tmp_path / "said"
    folder.mkdir()
    argv = [sys.executable, "-c", WORKER, str(folder), str(inside), str(said)]
    workers = [subprocess.Popen(argv) for _ in range(4)]
    try:
        until(lambda: said.exists() and said.read_text().count("owned") >= 50, "50 claims", 30)
        for number in range(20):
            time.sleep(0.02 + 0.0007 * number)
            workers[number % 4].kill()
            workers[number % 4].wait()
            workers[number % 4] = subprocess.Popen(argv)
        before = said.read_text().count("owned")
        until(lambda: said.read_text().count("owned") >= before + 20, "20 claims after the last kill", 30)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert "violated" not in said.read_text()
    record_property("figure", f"20 owners killed, {said.read_text().count('owned')} claims, none shared")


def test_a_released_folder_is_free_and_a_claim_is_released_once(tmp_path: Path) -> None:
    first = lock.acquire(tmp_path)
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on .* since 20.*: let it end, or stop"):
        lock.acquire(tmp_path)
    first.release()
    second = lock.acquire(tmp_path)
    first.release()
    second.check()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_what_refers_to_it(tmp_path: Path) -> None:
    claim = lock.acquire(tmp_path)
    assert claim.is_valid
    del claim
    lock.acquire(tmp_path).release()


def test_a_forked_child_neither_holds_nor_releases_the_claim(tmp_path: Path) -> None:
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from sslx.runs import lock
        claim = lock.acquire(Path(sys.argv[1]))
        if os.fork() == 0:
            claim.release()
            claim.check()
            print("child", flush=True)
            os.close(1)
            time.sleep(30)
        time.sleep(0.2)
        os.kill(os.getpid(), 9)
    """
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        assert answer(owner) == "child"
        owner.wait(20)
        assert lock.read_owner(tmp_path) is not None
        lock.acquire(tmp_path).release()
        os.killpg(owner.pid, signal.SIGKILL)


def test_a_stopped_owner_is_one(tmp_path: Path) -> None:
    with claimants(1) as (owner,):
        say(owner, str(tmp_path))
        assert answer(owner) == "won"
        owner.send_signal(signal.SIGSTOP)
        with pytest.raises(ConfigError, match=f"process {owner.pid} "):
            lock.acquire(tmp_path)


@pytest.mark.parametrize(
    ("changes", "age_s", "free"),
    [
        ({}, 0, True),
        ({"pid": 1, "started": "1"}, 0, True),  # another process has the pid by now
        ({"boot": "another kernel"}, 1, False),  # its death cannot be seen from here
        ({"boot": "another kernel"}, GONE_AFTER_S + 60, True),
        ({"pid_namespace": "pid:[1]"}, 0, True),  # a container of this kernel: by the file's lock
        ({"pid_namespace": "pid:[1]", "flocked": False}, 0, False),
        ({"pid_namespace": "pid:[1]", "flocked": False}, GONE_AFTER_S + 60, True),
    ],
)
def test_a_dead_owner_is_recognized(tmp_path: Path, changes: dict[str, Any], age_s: float, free: bool) -> None:
    killed(tmp_path)
    alter(tmp_path, **changes)
    silence(tmp_path, age_s)
    if free:
        lock.acquire(tmp_path).release()
    else:
        with pytest.raises(ConfigError, match="is in use by process"):
            lock.acquire(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, '{"token": "../../x"}', '{"token": "a", "pid": -1}', "\0", "9" * 10_000]
)
def test_a_file_that_names_nobody_is_an_owner_until_it_is_old(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.NAME).write_text(content)
    with pytest.raises(ConfigError, match=r"is in use by an unknown process: let it end, or stop"):
        lock.acquire(tmp_path)
    silence(tmp_path, GONE_AFTER_S + 60)
    lock.acquire(tmp_path).release()


def test_a_pipe_in_the_owners_place_is_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / lock.NAME)
    with pytest.raises(ConfigError, match=r"is in use by an unknown process: let it end, or stop"):
        lock.acquire(tmp_path)


def test_a_silent_owner_elsewhere_is_named_with_its_silence(tmp_path: Path) -> None:
    killed(tmp_path)
    alter(tmp_path, boot="another kernel", host="n7", job="123")
    silence(tmp_path, 60)
    words = r"on n7, Slurm job 123 since .*; its last sign of life was 6\d s ago, and it counts as gone after 120 s"
    with pytest.raises(ConfigError, match=words):
        lock.acquire(tmp_path)


def test_a_requeued_job_takes_over_its_own_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "there")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    killed(tmp_path)  # as restart 2 of job 77
    alter(tmp_path, boot="another kernel")
    with pytest.raises(ConfigError, match="Slurm job 77"):  # another step of the same start
        lock.acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    lock.acquire(tmp_path).release()


def test_the_heartbeat_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslx.runs.owner.HEARTBEAT_S", 0.02)
    claim = lock.acquire(tmp_path)
    silence(tmp_path, 1000)
    until(lambda: time.time() - (tmp_path / lock.NAME).stat().st_mtime < 5, "a heartbeat", 10)
    claim.release()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (shutil.rmtree, "was deleted or moved during the run: nothing more is written"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "was deleted or moved"),
        (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "was replaced, or its owner.json was deleted,"),
        (lambda folder: alter(folder, token=secrets.token_hex(8), host="n9"), "now belongs to process .* on n9"),
    ],
)
def test_a_lost_claim_is_noticed(tmp_path: Path, harm: Callable[[Path], object], words: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    claim = lock.acquire(folder)
    claim.check()
    harm(folder)
    with pytest.raises(StorageError, match=words):
        claim.check()
    before = sorted(tmp_path.rglob("*"))
    claim.release()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_in_trouble_is_no_loss_of_the_claim(tmp_path: Path) -> None:
    claim = lock.acquire(tmp_path)
    (tmp_path / lock.NAME).write_bytes(b"")
    claim.check()
    assert claim.is_valid


def test_a_copied_folder_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    claim = lock.acquire(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    lock.acquire(tmp_path / "b").release()
    claim.check()
    claim.release()


def lives(folder: Path) -> bool:
    owner = lock.read_owner(folder)
    return owner is not None and owner[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces")
def test_containers_in_which_every_process_has_the_pid_1(tmp_path: Path) -> None:
    """The owner is pid 1 on a host of this name, as is who comes after it, in a namespace of its own."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    folder = tmp_path / "run"
    folder.mkdir()
    argv = [*container, sys.executable, "-c", CLAIMANT]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as first, subprocess.Popen(argv, **pipes) as second:
        say(first, str(folder))
        assert answer(first) == "won"
        assert json.loads((folder / lock.NAME).read_text())["pid"] == 1
        say(second, str(folder))
        assert f"is in use by process 1 on {socket.gethostname()}" in answer(second)
        with pytest.raises(ConfigError, match="is in use by process 1 "):
            lock.acquire(folder)
        first.kill()  # and, a moment later, its child with it
        until(lambda: not lives(folder), "the end of the first container", 20)
        say(second, "")
        assert answer(second) == "released"
        say(second, str(folder))
        assert answer(second) == "won"
        assert lives(folder)
        second.kill()
    until(lambda: not lives(folder), "the end of the second container", 20)
    lock.acquire(folder).release()
