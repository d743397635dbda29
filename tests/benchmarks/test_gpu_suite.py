"""The GPU suite's logic, on the CPU: what is done stays done, what fails or hangs is seen and tried again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_suite
import numpy as np
import pytest
from PIL import Image

from kit.processes import ended, until
from kit.python import python

PARTS = ["kernels", "nt_xent", "loader_32px", "byol_200_epochs", "scaling", "verify_nccl"]
SOME_PARTS = ["nt_xent", "byol_200_epochs"]


def part(name: str, code: str) -> gpu_suite.Part:
    return gpu_suite.Part(name, (sys.executable, "-c", code), records=False)


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[gpu_suite.Part]:
    parts: list[gpu_suite.Part] = []
    monkeypatch.setattr(gpu_suite, "parts", lambda _: parts)
    return parts


def test_done_parts_are_left_out_and_failed_ones_tried_again(selected: list[gpu_suite.Part], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    selected += [
        part("first", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"),
        part("second", f"import os, sys; sys.exit(0 if os.path.exists({str(mark)!r}) else 3)"),
    ]
    out = ["--small", "--out", str(tmp_path / "out")]
    assert gpu_suite.main(out) == 1
    assert json.loads((tmp_path / "out" / "second.json").read_text())["code"] == 3
    mark.touch()
    assert gpu_suite.main(out) == 0
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.slow
def test_a_part_that_hangs_ends_with_all_its_processes(selected: list[gpu_suite.Part], tmp_path: Path) -> None:
    number = tmp_path / "number"
    child = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    selected.append(part("hangs", code))
    assert gpu_suite.main(["--small", "--out", str(tmp_path), "--limit-s", "10"]) == 1
    assert json.loads((tmp_path / "hangs.json").read_text())["code"] == 124
    assert (tmp_path / "hangs.log").read_text() == "started\n"
    until(lambda: ended(int(number.read_text())), "end of the part's child", 5)


@pytest.mark.soak
def test_a_part_that_saves_continues_at_the_next_call(selected: list[gpu_suite.Part], tmp_path: Path) -> None:
    """It hears SIGTERM before its time is over, and says by its exit code that there is more to do."""
    saves = (
        f"import os, signal, sys, time; path = {str(tmp_path / 'saved')!r}\n"
        "if os.path.exists(path): sys.exit(0)\n"
        "def save(*_):\n    open(path, 'w').close()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('listens', flush=True)\ntime.sleep(60)\n"
    )
    selected.append(gpu_suite.Part("trains", (sys.executable, "-c", saves), records=False, continues=True))
    out = ["--small", "--out", str(tmp_path), "--limit-s", str(gpu_suite.SAVING_S + 3)]
    assert [gpu_suite.main(out), gpu_suite.main(out)] == [75, 0]
    assert json.loads((tmp_path / "trains.json").read_text())["code"] == 0


def test_no_part_begins_that_would_not_end_in_time(
    selected: list[gpu_suite.Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selected += [part("first", "print(1)"), part("second", "print(2)")]
    assert gpu_suite.main(["--small", "--out", str(tmp_path), "--for-s", "20"]) == 75
    assert "left for the next call" in capsys.readouterr().out
    assert not (tmp_path / "first.json").exists()


def test_the_table_has_a_row_a_part_with_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = {"time": "2026", "gpu": "a GPU", "cpu": "", "commit": "abc", "versions": {"torch": "2.14"}}
    for name, code in (("nt_xent", 0), ("tests", 1), ("step_32px", 124)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"code": code, "seconds": 7.0, **stamp}))
    spread = {"median": 30.5, "p20": 30, "p80": 31}
    record = {"benchmark": "nt_xent", "batch_size": 65536, "arm": "sslx", "ms": spread}
    (tmp_path / "nt_xent.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "tests.log").write_text("....F\n== 1 failed, 4 passed ==\n")
    assert gpu_suite.main(["--out", str(tmp_path), "--table"]) == 0
    text = capsys.readouterr().out
    assert "a GPU, torch 2.14, commit abc" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "done, 7 s" in rows["nt_xent"]
    assert "B = 65,536, sslx: 30.500 ms" in rows["nt_xent"]
    assert "31 ms" in rows["nt_xent"]
    assert "failed (1)" in rows["tests"]
    assert "1 failed, 4 passed" in rows["tests"]
    assert "out of time" in rows["step_32px"]
    assert "has not run" in rows["step_224px"]


def test_the_order_is_that_of_the_first_eight_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--small", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    first = ["kernels", "tests", "nt_xent", "step_32px", "step_224px", "step_224px_sync", "verify_nccl", "scaling"]
    assert names[: len(first)] == first
    assert names[-1] == "byol_200_epochs"


@pytest.mark.slow
def test_its_tests_need_no_package_that_a_lent_machine_may_lack() -> None:
    """All are collected, and those of the kernels run, without DALI and what submitit brings."""
    lacks = ("cloudpickle", "submitit", "wandb", "lightly", "nvidia.dali")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacks!r})); import pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:timeout', '-p', 'no:xdist', *sys.argv[1:]]))"
    )
    root = Path(gpu_suite.__file__).parents[1]
    paths = [str(root / path) for path in (*gpu_suite.GPU_TESTS, "tests/kernels")]
    collected = python("-c", code, "--collect-only", *paths, cwd=root).stdout
    assert "error" not in collected.lower().rpartition("tests collected")[0][-300:]
    python("-c", code, "tests/kernels/test_operator.py", "-m", "not slow", "-k", "tiled", cwd=root)


def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--cifar", "/cifar", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step_224px") and "simclr_imagenet" in line for line in lines)
    assert any("--source.root /cifar" in line for line in lines)
    assert any(line.startswith("loader_224px") and "needs --photos DIR" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parts", [SOME_PARTS, pytest.param(PARTS, marks=pytest.mark.soak)], ids=["some", "all"])
def test_a_part_of_every_script_runs_on_the_cpu_with_small_sizes(parts: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(24):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    images, out = str(tmp_path / "images"), tmp_path / "out"
    (tmp_path / "all").mkdir()
    for name in ("cifar10", "photos"):
        (tmp_path / "all" / name).symlink_to(images)
    command = ["bash", str(Path(gpu_suite.__file__).with_name("run_gpu.sh")), str(tmp_path / "all"), "--small"]
    command += ["--out", str(out), "--runs", str(tmp_path / "runs"), "--parts", *parts]
    environ = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, check=False, timeout=1750, env=environ, stdout=subprocess.PIPE, text=True)
    assert "kNN" in done.stdout
    logs = {path.stem: path.read_text()[-2000:] for path in out.glob("*.log")}
    assert done.returncode == 0, logs
    records = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}
    assert set(logs) == set(parts)
    assert set(records) == set(parts) - {"kernels", "verify_nccl"}
    if parts == PARTS:
        assert records["loader_32px"][0]["samples_per_s"]["step alone"]["median"] > 0
        assert {line["world_size"] for line in records["scaling"]} == {1, 2}
    assert 0 <= records["byol_200_epochs"][0]["scores"][-1]["linear"] <= 1
