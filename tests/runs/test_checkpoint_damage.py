"""Checkpoints against what happens to files: kills, bit flips, truncation, full disks, hostile pickles."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.checkpoints import State, make_state, names, reseal, saved_run, weight
from kit.processes import Record
from sslx import rng
from sslx.errors import DataError, StorageError
from sslx.runs import checkpoint, checkpoint_files

FILES = (*checkpoint_files.NAMES[:4], "manifest.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved_run(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("name", checkpoint_files.NAMES[:4])
def test_truncation_falls_back(run: Path, share: float, name: str) -> None:
    file = run / "checkpoints" / "step_200" / name
    size = file.stat().st_size
    os.truncate(file, int(size * share))
    path, lines = checkpoint.newest(run)
    assert path == run / "checkpoints" / "step_100"
    short = f"{name}: {int(size * share)} bytes instead of {size}"
    assert lines == [f"checkpoint step_200 is damaged ({short}): using step_100"]
    assert weight(checkpoint.load(run)) == 100
    with pytest.raises(DataError, match=f"step_200 is damaged \\({short}\\)"):
        checkpoint.load(file)


def test_every_single_bit_flip_is_found(run: Path, record_property: Record) -> None:
    folder = run / "checkpoints" / "step_200"
    for i, (word, bit) in enumerate(rng.words(0, "flips", np.arange(200), num=2).tolist()):
        file = folder / FILES[i % len(FILES)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[word % len(bad)] ^= 1 << bit % 8
        file.write_bytes(bad)
        path, lines = checkpoint.newest(run)
        found = path == run / "checkpoints" / "step_100" and len(lines) == 1
        assert found, (file.name, word % len(bad), bit % 8)
        with pytest.raises(DataError, match="damaged"):
            checkpoint.load(folder)
        file.write_bytes(good)
    assert weight(checkpoint.load(run)) == 200
    record_property("figure", "200 of 200 flips found; the checkpoint before is taken")


def test_every_byte_of_the_manifest_counts(run: Path) -> None:
    file = run / "checkpoints" / "step_200" / "manifest.json"
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"format": 2', b'"format": 3'))
    with pytest.raises(DataError, match="format 3; this version of sslx reads formats 1 and 2"):
        checkpoint.load(file.parent)
    for place in range(0, 8 * len(good), 7):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(DataError, match="damaged"):
            checkpoint.load(file.parent)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_falls_back(run: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step_200" / file).unlink()
    path, lines = checkpoint.newest(run)
    assert path == run / "checkpoints" / "step_100"
    assert lines == [f"checkpoint step_200 is damaged ({file}: No such file or directory): using step_100"]
    assert weight(checkpoint.load(run)) == 100
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", lines[0])]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless"])
def test_what_is_no_regular_file_falls_back_without_a_wait(run: Path, file: str, kind: str) -> None:
    path = run / "checkpoints" / "step_200" / file
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "endless": partial(os.symlink, "/dev/zero")}[kind](path)
    found, lines = checkpoint.newest(run)
    assert found == run / "checkpoints" / "step_100"
    assert lines[0].startswith(f"checkpoint step_200 is damaged ({file}: ")


def test_no_good_checkpoint_is_no_fresh_start(run: Path) -> None:
    for step in (100, 200):
        (run / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"step_200 is damaged .*; .*step_100 is damaged") as caught:
        checkpoint.newest(run)
    assert "\n" not in str(caught.value)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("a file")
    with pytest.raises(DataError, match="Not a directory"):
        checkpoint.newest(run)


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, pickle.dump], ids=["torch.save", "pickle.dump"])
def test_a_hostile_pickle_is_not_run(run: Path, write: Callable[[object, Any], None]) -> None:
    trap = run / "trap"
    folder = run / "checkpoints" / "step_200"
    with open(folder / "method.pt", "wb") as file:
        write({"queue": Hostile(trap)}, file)
    reseal(folder, 200)
    with pytest.raises(DataError, match="is not trusted") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    if write is torch.save:
        torch.load(folder / "method.pt", weights_only=False)
    else:
        pickle.loads((folder / "method.pt").read_bytes())
    assert trap.exists(), "the trap does not work, so the test shows nothing"


def test_what_is_no_state_at_all(run: Path) -> None:
    folder = run / "checkpoints" / "step_200"
    for name in FILES[:-1]:
        good = (folder / name).read_bytes()
        for data in (b"", b"hello", b"PK\x03\x04 and no more", b"\xff" * 8 + b"{}"):
            (folder / name).write_bytes(data)
            reseal(folder, 200)
            with pytest.raises(DataError, match=r"cannot be loaded|not trusted|not written by sslx") as caught:
                checkpoint.load(folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(good)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"files":' * 100_000, " " * (1 << 22), "{}", "[]", "null", "1e999", '"a\\nb"', "9" * 5000, "\0",
        '{"format": "1\\n2", "step": 200, "files": {"facts.json": {}}}', '{"format": 1, "step": 200, "files": []}',
        '{"format": 1, "step": 1e999, "files": {"facts.json": {"bytes": 1, "sha256": 2}}}',
        '{"format": 1, "step": 200, "files": {"facts.json": []}}',
        '{"format": 1, "step": 200, "files": {"facts.json": {}}}',
    ],
)  # fmt: skip
def test_a_crafted_manifest_is_a_damaged_one(run: Path, text: str) -> None:
    (run / "checkpoints" / "step_200" / "manifest.json").write_text(text)
    path, (line,) = checkpoint.newest(run)
    assert path == run / "checkpoints" / "step_100"
    assert line.startswith("checkpoint step_200 is damaged (manifest.json: ")
    assert line.isprintable()
    checkpoint.save(run, 300, make_state(300), keep=1)
    assert checkpoint.newest(run)[0] == run / "checkpoints" / "step_300"


def mutated(data: bytes, words: list[int]) -> bytes:
    """The bytes after one of many kinds of damage, by random words."""
    kind, a, b, c = words
    bad, place = bytearray(data), a % len(data)
    match kind % 6:
        case 0:
            bad[place] = b % 256
        case 1:
            del bad[place : place + 1 + b % 40]
        case 2:
            bad[place:place] = bytes([b % 256]) * (1 + c % 50_000)
        case 3:
            bad[place:place] = [b"[", b'{"a":', b"-", b"1e", b"null", b"\xff\xfe", b"\0"][b % 7] * (1 + c % 9000)
        case 4:
            other = b % len(data)
            bad[place], bad[other] = bad[other], bad[place]
        case _:
            return bytes(bad[:place])
    return bytes(bad)


@pytest.mark.slow
def test_no_damage_to_a_checkpoint_gives_more_than_an_older_one(
    run: Path, generator: torch.Generator, record_property: Record
) -> None:
    """500 mutations of the manifest and 200 changed bytes of the other files, each found in newest() and load()."""
    folder, good = run / "checkpoints" / "step_200", run / "checkpoints" / "step_100"
    original = {name: (folder / name).read_bytes() for name in FILES}
    meaning = json.loads(original["manifest.json"])
    draws = torch.randint(1 << 40, (700, 4), generator=generator).tolist()
    for number, words in enumerate(draws):
        name = "manifest.json" if number < 500 else FILES[number % (len(FILES) - 1)]
        bad = mutated(original[name], words if number < 500 else [0, *words[1:]])
        (folder / name).write_bytes(bad)
        path, _ = checkpoint.newest(run)
        with suppress(ValueError, RecursionError):
            if name == "manifest.json" and json.loads(bad) == meaning:  # a space more
                assert path == folder
        if bad == original[name] or path == folder:
            assert weight(checkpoint.load(folder)) == 200
        else:
            assert path == good
            with pytest.raises(DataError) as caught:
                checkpoint.load(folder)
            assert str(caught.value).isprintable()
        (folder / name).write_bytes(original[name])
    record_property("figure", "500 mutations of manifest.json, 200 of the other files: 0 that are no DataError")


KILL = """
import os, signal, sys, time
from pathlib import Path
import torch
from sslx.runs import checkpoint
torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
run, waits = Path(sys.argv[1]), [float(w) for w in sys.argv[2:]]
full = lambda step: torch.full((1 << 17,), float(step))
state = lambda step: {"step": step, "method": {"encoder.weight": full(step), "head": full(step)}}
checkpoint.save(run, 0, state(0), keep=2)
torch.save(state(0), os.devnull)
kills, temps, last = 0, 0, 0
for wait in waits:
    child = os.fork()
    if child == 0:
        step = last
        while True:  # overwrites the one that it resumes from, then goes on: every path of save()
            checkpoint.save(run, step, state(step), keep=2)
            step += 1
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    temps += any(path.name.startswith(".") for path in (run / "checkpoints").iterdir())
    path, skipped = checkpoint.newest(run)
    assert path is not None and not skipped, skipped
    loaded = checkpoint.load(path)
    assert loaded["step"] >= last, (loaded["step"], last)
    assert all((x == loaded["step"]).all() for x in loaded["method"].values())
    last = loaded["step"]
print(kills, temps, last)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    waits = [f"{0.01 + 0.2 * wait:.4f}" for wait in rng.uniform(0, "waits", num=25)[0]]
    command = [sys.executable, "-c", KILL, str(tmp_path), *waits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, temps, last = map(int, done.stdout.split())
    assert kills == 25
    assert temps > 0, "no kill fell into a save, so the test shows nothing"
    assert last > 0
    checkpoint.save(tmp_path, last + 1, make_state(), keep=2)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """The first byte fails, or the disk fills up on the way."""
    small: State = {"method": {"head": torch.ones(8)}}
    checkpoint.save(tmp_path, 1, small, keep=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match=f"cannot write {tmp_path}/checkpoints/step_2: File too large") as caught:
            checkpoint.save(tmp_path, 2, {"method": {"encoder.weight": torch.ones(1 << 20)}}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    free = str(caught.value).split("; 4,194,304 bytes needed, ")[1].split(" bytes free")[0].replace(",", "")
    assert 0.5 < int(free) / shutil.disk_usage(tmp_path).free < 2
    assert names(tmp_path) == {"step_1"}
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoints" / "step_1", [])
    checkpoint.save(tmp_path, 2, small, keep=2)
    assert names(tmp_path) == {"step_1", "step_2"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="Not a directory"):
        checkpoint.save(tmp_path / "run", 1, make_state(), keep=1)
