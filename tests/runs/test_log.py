"""Logging: device-side means, metrics.jsonl over restarts, real wandb runs."""

import importlib
import io
import json
import math
import os
import random
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kit import words
from kit.processes import metrics as read
from kit.processes import pretrain
from sslx.console.display import Terminal
from sslx.errors import ConfigError, StorageError
from sslx.runs import log, trackers

METRICS = {"epoch": 0.61, "loss": 5.1234, "lr": 0.24, "samples_per_s": 812.3, "data_wait": 0.03}


def test_meter_means_without_a_sync(no_host_sync: AbstractContextManager[object]) -> None:
    meter = log.Meter()
    value = torch.tensor(0.0)
    with no_host_sync:
        for step in range(10):
            value.fill_(step)  # a buffer that is overwritten, as CUDA graphs do
            metrics = {"loss": value, "std": torch.tensor(1.0, dtype=torch.bfloat16, requires_grad=True)}
            meter.add(metrics)
            if step % 5 == 0:
                meter.add({"rare": value, "loss": value}, weight=3)
    with pytest.raises(AssertionError, match="waits for the device"), no_host_sync:
        value.item()
    means, _ = meter.fetch()
    assert means == pytest.approx({"loss": (45 + 3 * 5) / 16, "std": 1.0, "rare": 2.5}, rel=1e-15)
    assert meter.fetch() == ({}, [])
    meter.add({})
    meter.add({"loss": torch.tensor(7)})
    assert meter.fetch()[0] == {"loss": 7.0}


def test_meter_sums_in_float64() -> None:
    meter = log.Meter()
    for value in (2.0**30, 1.0, 1.0, -(2.0**30)):  # in float32 the ones vanish
        meter.add({"float32": torch.tensor(value)})
        meter.add({"float64": torch.tensor(0.1, dtype=torch.float64)})
    assert meter.fetch()[0] == {"float32": 0.5, "float64": pytest.approx(0.1, rel=1e-15)}
    meter.add({"loss": torch.tensor(float("nan"))})
    assert str(meter.fetch()[0]) == "{'loss': nan}"


def test_meter_reduces_before_the_transfer() -> None:
    meter, other = log.Meter(), torch.tensor([6.0, 3.0], dtype=torch.float64)  # another rank's sum and weight
    meter.add({"loss": torch.tensor(1.0)})
    beside = torch.tensor([1.5, math.inf], dtype=torch.float64)
    assert meter.fetch(lambda mine: (mine + other) / 2, beside) == ({"loss": 7 / 4}, [1.5, math.inf])
    assert meter.fetch(beside=beside) == ({}, [1.5, math.inf])


def open_log(
    folder: Path, start_step: int = 0, enabled: bool = True, file: io.StringIO | None = None, **config: Any
) -> log.Log:
    terminal = Terminal(console=Console(file=file or io.StringIO(), force_terminal=False))
    return log.Log(log.Config(**config), folder, enabled, terminal, 200, start_step, "0123456789ab", {"seed": 3})


def test_jsonl_over_restarts(tmp_path: Path) -> None:
    with open_log(tmp_path) as first:
        before = time.time()
        for step in (20, 40, 60):
            first.log(step, {"loss": step / 10})
            assert read(tmp_path)[-1]["step"] == step, "a line is on disk at once"
        first.log(80, {"loss": float("nan"), "std": float("inf")})
    lines = read(tmp_path)
    assert [line["loss"] for line in lines] == [2.0, 4.0, 6.0, None]
    assert lines[3]["std"] is None
    assert all(before - 1 < line["time"] < time.time() + 1 for line in lines)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')  # killed in the middle of a line
    with open_log(tmp_path, start_step=50) as second:
        assert [line["step"] for line in read(tmp_path)] == [20, 40]
        for step in (60, 80, 100):
            second.log(step, {"loss": 0.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 90, "loss": 0.0}')  # killed before the end of the line
    with open_log(tmp_path, start_step=100):
        pass
    losses = {20: 2.0, 40: 4.0, 60: 0.0, 80: 0.0, 100: 0.0}
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == list(losses.items())
    with open_log(tmp_path, start_step=0):
        assert read(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path, enabled=False, wandb="offline") as other:
        other.log(20, METRICS)
        other.message("not shown")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_once_and_survived(tmp_path: Path) -> None:
    shown = io.StringIO()
    with open_log(tmp_path, file=shown) as main:
        main.log(20, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            main.log(40, {"loss": 1.0})
            main.log(60, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        main.log(80, {"loss": 1.0})
    assert shown.getvalue().count("cannot write metrics.jsonl: File too large") == 1
    assert [line["step"] for line in read(tmp_path)] == [20, 40, 60, 80]
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl"):
        log.Log(log.Config(), tmp_path / "no folder", True, Terminal(), 200, 0, "id", {})
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: it is a named pipe"):
        log.Log(log.Config(), tmp_path, True, Terminal(), 200, 0, "id", {})


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = proto.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def offline_runs(folder: Path) -> list[tuple[str, str, dict[str, Any], list[dict[str, Any]]]]:
    """(id, project, config, history) of each offline run, in the order of their files' dates."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        of_run: Any = None
        history: list[dict[str, Any]] = []
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                of_run = record.run
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items})
        if of_run is not None:  # a killed run's file may hold nothing but its header
            config = {item.key: json.loads(item.value_json) for item in of_run.config.update}
            runs.append((of_run.run_id, of_run.project, config, history))
    return runs


WANDB = """
import os, sys
from pathlib import Path
from sslx.runs import log
from sslx.console.display import Terminal
folder, mode = Path(sys.argv[1]), sys.argv[2]
def train(start):
    config = log.Config(wandb=mode, project="tests", wandb_timeout_s=1.0)
    run = log.Log(config, folder, True, Terminal(), 200, start, "0123456789ab", {"seed": 3})
    for step in range(start + 20, start + 81, 20):
        run.log(step, {"loss": 1 / step, "knn": float("nan")})
    return run
if len(sys.argv) > 3:
    if os.fork() == 0:
        train(0)
        os._exit(9)  # at once, like a kill
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    train(40).close()
else:
    train(0).close()
"""


def wandb_run(*arguments: object, **env: str) -> list[str]:
    """What a training with wandb printed besides its steps."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", WANDB, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=clean | env)
    assert (done.returncode, words.own(done.stderr)) == (0, ""), "wandb's own chatter"
    return [line for line in done.stdout.splitlines() if not line.startswith(("step ", "knn: "))]


@pytest.mark.slow
def test_wandb_offline_crash_and_resume(tmp_path: Path) -> None:
    assert wandb_run(tmp_path, "offline", "crash first") == []
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    run_id, project, config, history = offline_runs(tmp_path)[-1]
    assert (run_id, project, config["seed"]) == ("0123456789ab", "tests", 3)
    steps = [20, 40, 60, 80, 100, 120]  # all, though the kill lost what wandb had buffered
    assert [line["step"] for line in history] == [line["_step"] for line in history] == steps
    assert [line["loss"] for line in history] == pytest.approx([1 / step for step in steps])
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == steps
    assert [line["time"] for line in lines] == pytest.approx([line["_timestamp"] for line in history], abs=0.1)


@pytest.mark.slow
def test_wandb_without_a_server_goes_on_offline(tmp_path: Path) -> None:
    with socket.socket() as silent:  # accepts and never answers: worse than refusing
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "before").mkdir()
        begun = time.monotonic()
        wandb_run(tmp_path / "before", "offline")
        offline = time.monotonic() - begun
        lines = wandb_run(tmp_path, "online", WANDB_BASE_URL=url, WANDB_API_KEY=40 * "a")
    assert time.monotonic() - begun - 2 * offline < 20, "wandb_timeout_s is 1; wandb itself would wait for 30"
    assert len(lines) == 1
    assert lines[0].startswith("wandb: ")
    assert re.search(
        rf": logging offline; send the logs later with `wandb sync {tmp_path}/wandb/offline-run-\S+`$", lines[0]
    )
    ((run_id, _, _, history),) = offline_runs(tmp_path)
    assert run_id == "0123456789ab"
    assert [line["_step"] for line in history] == [20, 40, 60, 80]


@pytest.mark.slow
def test_scores_and_pictures_go_to_the_wandb_run_of_the_training(tmp_path: Path) -> None:
    code = "import sys; from sslx import cli; sys.exit(max(cli.main(line.split()) for line in sys.argv[1:]))"
    run = tmp_path / "r"
    train = " ".join(pretrain(tmp_path, "--log.wandb", "offline"))
    commands = [train, f"probe {run}", f"plot {run}", f"probe {run} --wandb off"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, timeout=500)
    assert (done.returncode, words.own(done.stderr)) == (0, "")
    said = re.findall(r"^wandb: added (.*) to the run, offline; send it with `wandb sync (.*)`$", done.stdout, re.M)
    assert [what.split(", ")[0] for what, _ in said] == ["scorecard", "pictures/loss"]
    runs = offline_runs(run)
    assert len(runs) == 3
    assert {run_id for run_id, _, _, _ in runs} == {(run / "run_id").read_text()}
    (scores,), (drawn,) = (history for _, _, _, history in runs[1:])
    assert [(line["_step"], line["step"]) for line in (scores, drawn)] == [(3, 2)] * 2, "after the training's last"
    record = json.loads((run / "probe.json").read_text())["label_free"]
    assert scores["probe/rank"] == pytest.approx(record[-1]["rank"])
    of_scores, of_pictures = (Path(path) / "files" for _, path in said)
    content = json.loads((of_scores / scores["scorecard.path"]).read_text())
    assert [row[0] for row in content["data"]] == [score["name"] for score in record]
    assert {"rank", "LiDAR", "uniformity"} <= set(content["columns"])
    for path in run.glob("*.png"):
        assert (of_pictures / drawn[f"pictures/{path.stem}.path"]).read_bytes() == path.read_bytes()


def test_event_files_hold_what_metrics_jsonl_holds_after_kills_and_restarts(tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (0, 40, 60):  # each start repeats a step, as after a kill
        one = open_log(tmp_path, start_step=start, tensorboard=start > 0)  # the first without TensorBoard
        for step in range(start + 20, start + 61, 20):
            one.log(step, {"loss": random.random(), **({"knn": float("nan")} if step % 40 else {})})
        if start == 60:
            one.close()  # the others are left as by a kill
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "knn"}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "one file for each start"
    for name in ("loss", "knn"):
        shown = [(event.step, event.value, event.wall_time) for event in events.Scalars(name)]
        lines = [(line["step"], line[name], line["time"]) for line in read(tmp_path) if name in line]
        assert [step for step, _, _ in shown] == [step for step, _, _ in lines]
        expected = [(math.nan if value is None else value, time_s) for _, value, time_s in lines]
        for (_, value, time_s), (want, want_s) in zip(shown, expected, strict=True):
            assert (value, time_s) == (pytest.approx(want, rel=1e-6, nan_ok=True), pytest.approx(want_s, abs=0.1))
    assert [event.step for event in events.Scalars("loss")] == [20, 40, 60, 80, 100, 120]


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, module, None)  # as Python itself does for what cannot be imported
    shown = io.StringIO()
    with open_log(tmp_path, file=shown, wandb="offline", tensorboard=True) as one:
        one.log(20, {"loss": 1.0})
    lines = [line for line in shown.getvalue().splitlines() if "loss" not in line]
    assert [line.partition(":")[0] for line in lines] == ["wandb", "TensorBoard"]
    assert "pip install tensorboard" in lines[1]
    results = trackers.Results(step=20, values={"probe/knn": 0.5})
    trackers.add_results(log.Config(wandb="online"), tmp_path, results, lines.append)
    assert len(lines) == 3
    assert lines[2].startswith("wandb: import of wandb halted")
    assert [line["loss"] for line in read(tmp_path)] == [1.0]


def test_run_ids_and_config() -> None:
    state = torch.get_rng_state()
    ids = {trackers.new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"[0-9a-f]{12}", run_id) for run_id in ids)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ConfigError, match=r"log\.every: expected at least 1 step, got 0"):
        log.Config(every=0)
