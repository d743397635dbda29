"""Checkpoints: what is saved, which is the newest, whose they are to delete, and how weights are loaded."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from kit.checkpoints import State, equal, make_state, names, saved_run, weight
from kit.processes import Record
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.runs import checkpoint, records
from sslx.runs.config import CheckpointConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved_run(tmp_path)


@pytest.mark.parametrize("give", ["directory", "method.pt", "encoder.safetensors", "run"])
def test_round_trip(tmp_path: Path, give: str) -> None:
    state = make_state(7.0)
    path = checkpoint.save(tmp_path, 7, state, keep=1)
    assert (path, names(tmp_path)) == (tmp_path / "checkpoints" / "step_7", {"step_7"})
    loaded = checkpoint.load({"directory": path, "run": tmp_path}.get(give, path / give))
    assert equal(loaded, state)


def test_the_encoder_is_a_file_that_other_libraries_read(tmp_path: Path) -> None:
    state = make_state(7.0)
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    state["method"] |= {f"encoder.conv.{name}": value for name, value in convolution.state_dict().items()}
    state["method"]["encoder.again.weight"] = state["method"]["encoder.conv.weight"]  # one tensor of two names
    path = checkpoint.save(tmp_path, 7, state, keep=1)
    tensors = safetensors.torch.load_file(path / "encoder.safetensors")
    assert torch.equal(tensors["again.weight"], tensors["conv.weight"])
    expected = {name.removeprefix("encoder."): x for name, x in state["method"].items() if name.startswith("encoder.")}
    assert equal(tensors, expected)
    assert torch.load(path / "method.pt", weights_only=True).keys() == {"queue"}


def test_only_the_files_that_are_needed_are_read(run: Path) -> None:
    """Features need neither the optimizer's state nor the heads, damaged or not."""
    folder = run / "checkpoints" / "step_200"
    for name in ("method.pt", "optimizer.pt"):
        (folder / name).write_bytes(b"damaged")
    state = checkpoint.load(folder, needs=("step", "encoder"))
    assert state["encoder"]["0.weight"][0, 0] == 200
    assert state.keys() == {"encoder", "step", "lr", "config"}
    with pytest.raises(DataError, match=r"damaged \(method.pt: 7 bytes instead of"):
        checkpoint.load(folder, needs=("step", "method"))


def test_a_copied_and_renamed_checkpoint_loads(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step_100", run / "best")
    assert weight(checkpoint.load(run / "best")) == 100


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "no run") == (None, [])
    (tmp_path / "empty run" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "no run", tmp_path / "empty run", tmp_path / "checkpoints" / "step_3"):
        with pytest.raises(MissingInput, match="no checkpoint at") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)


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
    (run / "checkpoints" / "step_200" / "method.pt").write_bytes(b"")
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
    assert records.newest_step(tmp_path) == 0
    path, lines = checkpoint.newest(tmp_path)
    assert path is None
    assert len(lines) == 1
    assert "step_999" in lines[0]
    good = checkpoint.save(tmp_path, 10, make_state(10), keep=1)
    assert checkpoint.newest(tmp_path)[0] == good
    assert "step_999" in checkpoint.newest(tmp_path)[1][0]
    assert records.newest_step(tmp_path) == 10
    assert (place / "step_999" / "precious").exists()


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
    assert equal((loaded["step"], loaded["method"]), (7, dict(model.state_dict())))
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step_7").iterdir())
    record_property(
        "figure",
        f"{size / 1e6:.0f} MB: save {1e3 * sorted(times)[3]:.0f} ms (median of 7, at most {1e3 * max(times):.0f} ms), "
        f"load and verify {1e3 * read_s:.0f} ms",
    )


def test_config() -> None:
    assert CheckpointConfig(every=0, keep=1).keep == 1
    for wrong in ({"every": -1}, {"keep": 0}):
        with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(wrong))}: expected .*, got "):
            CheckpointConfig(**wrong)
