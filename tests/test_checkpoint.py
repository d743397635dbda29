"""Checkpoints against what happens to files: kills, bit flips, truncation, full disks, hostile pickles."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from processes import Record
from sslx import checkpoint, outcome, rng
from sslx.errors import ConfigError, DataError, MissingInput, StorageError

State = dict[str, Any]


def make_state(value: float = 1.0) -> State:
    linear = nn.Linear(4, 3)
    nn.init.constant_(linear.weight, value)
    encoder = nn.Sequential(linear, nn.BatchNorm1d(3))
    return {
        "encoder": encoder.state_dict(),
        "queue": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "step": int(value),
        "lr": 0.1,
        "config": {"name": "simclr", "crops": [224, (0.2, 1.0)], "seed": None, "flip": True},
    }


def weight(state: dict[str, Any]) -> float:
    return state["encoder"]["0.weight"][0, 0].item()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with good checkpoints at steps 100 and 200, in whose states the step is the weight."""
    for step in (100, 200):
        checkpoint.save(tmp_path, step, make_state(step), keep=3)
    return tmp_path


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def reseal(folder: Path, step: int) -> None:
    """Write the manifest anew, as one who wants a changed state.pt to pass would."""
    data = (folder / "state.pt").read_bytes()
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {"format": checkpoint.FORMAT, "step": step, "files": {"state.pt": digest}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("give", ["directory", "state.pt", "run"])
def test_round_trip(tmp_path: Path, give: str) -> None:
    state = make_state(7.0)
    path = checkpoint.save(tmp_path, 7, state, keep=1)
    assert (path, names(tmp_path)) == (tmp_path / "checkpoints" / "step_7", {"step_7"})
    loaded = checkpoint.load({"directory": path, "state.pt": path / "state.pt", "run": tmp_path}[give])
    assert loaded.keys() == state.keys()
    torch.testing.assert_close(loaded["encoder"], dict(state["encoder"]), rtol=0, atol=0)
    torch.testing.assert_close(loaded["queue"], state["queue"], rtol=0, atol=0)
    for key in ("step", "lr", "config"):
        assert loaded[key] == state[key]


def test_a_copied_and_renamed_checkpoint_loads(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step_100", run / "best")
    assert weight(checkpoint.load(run / "best")) == 100


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_truncation_falls_back(run: Path, share: float) -> None:
    state = run / "checkpoints" / "step_200" / "state.pt"
    size = state.stat().st_size
    os.truncate(state, int(size * share))
    path, lines = checkpoint.newest(run)
    assert path == run / "checkpoints" / "step_100"
    short = f"state.pt: {int(size * share)} bytes instead of {size}"
    assert lines == [f"checkpoint step_200 is damaged ({short}): using step_100"]
    assert weight(checkpoint.load(run)) == 100
    with pytest.raises(DataError, match=f"step_200 is damaged \\({short}\\)"):
        checkpoint.load(state)


def test_every_single_bit_flip_is_found(run: Path, record_property: Record) -> None:
    folder = run / "checkpoints" / "step_200"
    for i, (word, bit) in enumerate(rng.words(0, "flips", np.arange(200), num=2).tolist()):
        file = folder / ("manifest.json" if i % 5 == 0 else "state.pt")
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
    file.write_bytes(good.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(DataError, match="format 2, this sslx reads 1"):
        checkpoint.load(file.parent)
    for place in range(0, 8 * len(good), 7):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(DataError, match="damaged"):
            checkpoint.load(file.parent)


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_a_missing_file_falls_back(run: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints" / "step_200" / file).unlink()
    path, lines = checkpoint.newest(run)
    assert path == run / "checkpoints" / "step_100"
    assert lines == [f"checkpoint step_200 is damaged ({file}: No such file or directory): using step_100"]
    assert weight(checkpoint.load(run)) == 100
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", lines[0])]


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless"])
def test_what_is_no_regular_file_falls_back_without_a_wait(run: Path, file: str, kind: str) -> None:
    path = run / "checkpoints" / "step_200" / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
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


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "no run") == (None, [])
    (tmp_path / "empty run" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "no run", tmp_path / "empty run", tmp_path / "checkpoints" / "step_3"):
        with pytest.raises(MissingInput, match="no checkpoint at") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)


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
    with open(folder / "state.pt", "wb") as file:
        write({"encoder": Hostile(trap)}, file)
    reseal(folder, 200)
    with pytest.raises(DataError, match="untrusted") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    if write is torch.save:
        torch.load(folder / "state.pt", weights_only=False)
    else:
        pickle.loads((folder / "state.pt").read_bytes())
    assert trap.exists(), "the trap does not work, so the test shows nothing"


def test_what_is_no_state_at_all(run: Path) -> None:
    folder = run / "checkpoints" / "step_200"
    for data in (b"", b"hello", b"PK\x03\x04 and no more"):
        (folder / "state.pt").write_bytes(data)
        reseal(folder, 200)
        with pytest.raises(DataError, match=r"cannot be loaded|untrusted") as caught:
            checkpoint.load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"method": {"heads": [nn.Linear(1, 1)]}}, r"state\['method'\]\['heads'\]\[0\] is a Linear"),
        ({"loss": np.float64(1.0)}, r"state\['loss'\] is a float64"),
        ({"rng": {(1, 2): 3}}, r"state\['rng'\]: key \(1, 2\)"),
        ({"path": Path("x")}, r"state\['path'\] is a .*Path"),
    ],
)
def test_only_plain_data_is_saved(tmp_path: Path, state: State, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        checkpoint.save(tmp_path, 1, state, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_keep(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, step, make_state(step), keep=2)
    assert names(tmp_path) == {"step_10", "step_11"}
    checkpoint.save(tmp_path, 12, make_state(12), keep=1)
    assert names(tmp_path) == {"step_12"}


def test_damaged_newer_ones_do_not_push_out_the_one_just_saved(run: Path) -> None:
    (run / "checkpoints" / "step_200" / "state.pt").write_bytes(b"")
    checkpoint.save(run, 150, make_state(150), keep=1)
    assert names(run) == {"step_150", "step_200"}
    assert weight(checkpoint.load(run)) == 150


def test_saving_again_replaces(run: Path) -> None:
    for value in (201, 201, 202):
        checkpoint.save(run, 200, make_state(value), keep=3)
        assert names(run) == {"step_100", "step_200"}
        assert weight(checkpoint.load(run)) == value


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(run: Path) -> None:
    place = run / "checkpoints"
    (place / "step_200").rename(place / "step_200.old")
    assert checkpoint.newest(run) == (place / "step_200.old", [])
    assert weight(checkpoint.load(run)) == 200
    checkpoint.save(run, 300, make_state(300), keep=3)
    assert names(run) == {"step_100", "step_200", "step_300"}
    shutil.copytree(place / "step_200", place / "step_200.old")  # a kill after the second rename
    assert checkpoint.newest(run)[0] == place / "step_300"
    checkpoint.save(run, 400, make_state(400), keep=9)
    assert names(run) == {"step_100", "step_200", "step_300", "step_400"}


def test_step_numbers_decide_not_times_and_foreign_names_are_ignored(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, make_state(step), keep=3)
    place = tmp_path / "checkpoints"
    for path in place.iterdir():
        then = 1e9 - int(path.name.removeprefix("step_"))
        os.utime(path, (then, then))
    for name in ("step_abc", "step_0200", "step_200.bak", "best", "step_-1", ".step_300.tmp-1"):
        shutil.copytree(place / "step_100", place / name)
    (place / "step_999").write_text("a file")
    assert checkpoint.newest(tmp_path) == (place / "step_100", [])
    (place / "step_500").mkdir()  # named like one, but empty
    path, lines = checkpoint.newest(tmp_path)
    assert path == place / "step_100"
    assert [line.split(" (")[0] for line in lines] == ["checkpoint step_500 is damaged"]
    shutil.copytree(place / "step_9", place / "step_600")  # another's content under a higher number
    assert checkpoint.newest(tmp_path)[1][0] == (
        "checkpoint step_600 is damaged (manifest.json: of step 9): using step_100"
    )
    checkpoint.save(tmp_path, 101, make_state(101), keep=1)
    assert ".step_300.tmp-1" not in names(tmp_path)


def tree(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_only_what_sslx_wrote_is_deleted_or_renamed(tmp_path: Path) -> None:
    """In a folder that others use, too, reached by a link."""
    shared, images = tmp_path / "shared", tmp_path / "images"
    named = "step_1/precious step_5/deep/down step_7/manifest.json .step_2.tmp-1/precious .step_x.tmp-1/a"
    for name in (*named.split(), "step_4.old/precious", "step_30/precious", "precious"):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_text("{}" if "manifest" in name else "not sslx's")
    images.mkdir()
    (images / "a.png").write_text("an image")
    (shared / "step_2").symlink_to(images)
    checkpoint.save(tmp_path / "other", 3, make_state(3), keep=1)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_3", shared / "step_3")
    (shared / "step_3" / "notes.txt").write_text("what I found out with it")  # beside sslx's own
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(shared)
    before, seen = tree(shared), tree(images)
    for step in (1, 2, 5, 6, 7, 8, 30):
        assert weight(checkpoint.load(checkpoint.save(run, step, make_state(step), keep=1))) == step
    after = tree(shared)
    assert {name: data for name, data in after.items() if name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"step_30.old"}
    assert tree(images) == seen
    assert (shared / "step_2").is_symlink()


def test_a_foreign_folder_is_no_checkpoint_and_no_damaged_one(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    (place / "step_999").mkdir(parents=True)
    (place / "step_999" / "precious").write_text("not sslx's")
    assert outcome.newest_step(tmp_path) == 0
    path, lines = checkpoint.newest(tmp_path)
    assert path is None
    assert len(lines) == 1
    assert "step_999" in lines[0]
    good = checkpoint.save(tmp_path, 10, make_state(10), keep=1)
    assert checkpoint.newest(tmp_path)[0] == good
    assert "step_999" in checkpoint.newest(tmp_path)[1][0]
    assert outcome.newest_step(tmp_path) == 10
    assert (place / "step_999" / "precious").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"files":' * 100_000, " " * (1 << 22), "{}", "[]", "null", "1e999", '"a\\nb"', "9" * 5000, "\0",
        '{"format": "1\\n2", "step": 200, "files": {"state.pt": {}}}', '{"format": 1, "step": 200, "files": []}',
        '{"format": 1, "step": 1e999, "files": {"state.pt": {"bytes": 1, "sha256": 2}}}',
        '{"format": 1, "step": 200, "files": {"state.pt": []}}',
        '{"format": 1, "step": 200, "files": {"state.pt": {}}}',
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
    """500 mutations of the manifest and 200 bit flips of the state, each found in newest() and load()."""
    folder, good = run / "checkpoints" / "step_200", run / "checkpoints" / "step_100"
    original = {name: (folder / name).read_bytes() for name in ("manifest.json", "state.pt")}
    meaning = json.loads(original["manifest.json"])
    draws = torch.randint(1 << 40, (700, 4), generator=generator).tolist()
    for number, words in enumerate(draws):
        name = "manifest.json" if number < 500 else "state.pt"
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
    record_property("figure", "500 mutations of manifest.json, 200 of state.pt: 0 that are no DataError")


KILL = """
import os, signal, sys, time
from pathlib import Path
import torch
from sslx import checkpoint
torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
run, waits = Path(sys.argv[1]), [float(w) for w in sys.argv[2:]]
state = lambda step: {"step": step, "weight": torch.full((1 << 18,), float(step))}
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
    assert loaded["step"] >= last and (loaded["weight"] == loaded["step"]).all(), (loaded["step"], last)
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


FULL = """
import resource, sys
from pathlib import Path
import torch
from sslx import checkpoint
from sslx.errors import StorageError
run = Path(sys.argv[1])
for limit in (0, 1 << 20):  # the first byte fails; the disk fills up on the way
    checkpoint.save(run, 1, {"weight": torch.ones(8)}, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(run, 2, {"encoder": {"weight": torch.ones(1 << 20)}}, keep=1)
    except StorageError as error:
        print(error)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_1"]
    assert checkpoint.newest(run) == (run / "checkpoints" / "step_1", [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.save(run, 2, {"weight": torch.ones(8)}, keep=2)
"""


@pytest.mark.soak
def test_what_a_save_of_a_resnet50_costs(tmp_path: Path, record_property: Record) -> None:
    """The step waits for it: fp32 weights and a momentum each, a digest, and what is there already is looked at."""
    model = torchvision.models.resnet50()
    state = {"method": model.state_dict(), "optimizer": {name: p.clone() for name, p in model.named_parameters()}}
    times: list[float] = []
    for step in range(1, 8):
        start = time.perf_counter()
        checkpoint.save(tmp_path, step, {"step": step, **state}, keep=3)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    loaded = checkpoint.load(tmp_path)
    read_s = time.perf_counter() - start
    assert loaded["step"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(loaded["method"][name], value)
    size = (tmp_path / "checkpoints" / "step_7" / "state.pt").stat().st_size
    record_property(
        "figure",
        f"{size / 1e6:.0f} MB: save {1e3 * sorted(times)[3]:.0f} ms (median of 7, at most {1e3 * max(times):.0f} ms), "
        f"load and verify {1e3 * read_s:.0f} ms",
    )


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f"cannot write {tmp_path}/checkpoints/step_2: File too large; 4,194,304 bytes needed, " in line
        free = int(line.split("bytes needed, ")[1].split(" bytes free")[0].replace(",", ""))
        assert 0.5 < free / shutil.disk_usage(tmp_path).free < 2
    assert names(tmp_path) == {"step_1", "step_2"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="Not a directory"):
        checkpoint.save(tmp_path / "run", 1, make_state(), keep=1)


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, width)
        self.head = nn.Linear(width, 1)


def test_weights_load_through_wrappers() -> None:
    state = Net().state_dict()
    compiled = cast(nn.Module, torch.compile(Net()))
    for old, new in (("", ""), ("", "module."), ("", "_orig_mod.module."), ("encoder.", "encoder._orig_mod.")):
        given = {key.replace(old, new, 1): value for key, value in state.items()}
        for target in (Net(), compiled, nn.DataParallel(Net())):
            checkpoint.load_weights(target, given, "weights")
            for mine, theirs in zip(target.state_dict().values(), state.values(), strict=True):
                assert torch.equal(mine, theirs)
            nn.init.zeros_(next(target.parameters()))


def test_weights_that_do_not_fit() -> None:
    given = Net(4).state_dict()
    del given["head.bias"]
    given |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    target = Net(3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(DataError) as caught:
        checkpoint.load_weights(target, given, "runs/x/step_5", expected="resnet18", found="resnet50")
    assert str(caught.value) == (
        "runs/x/step_5 does not fit: expected resnet18, found resnet50; of 4 keys 1 missing (head.bias), "
        "5 unexpected (extra.0, extra.1, extra.2, ...), "
        "3 of another shape (encoder.weight (3, 2), not (4, 2), encoder.bias (3,), not (4,), "
        "head.weight (1, 3), not (1, 4)): "
        "build the model as in the run's config.json, or give other weights"
    )
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_config() -> None:
    assert checkpoint.Config(every=0, keep=1).keep == 1
    for wrong in ({"every": -1}, {"keep": 0}):
        with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(wrong))}: expected .*, got "):
            checkpoint.Config(**wrong)
