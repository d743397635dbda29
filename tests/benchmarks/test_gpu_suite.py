"""The GPU suite's logic, on the CPU: what is done stays done, what fails or hangs is seen and tried again."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_suite
import numpy as np
import pytest
from PIL import Image

from processes import ended, until


def part(name: str, code: str) -> gpu_suite.Part:
    return gpu_suite.Part(name, (sys.executable, "-c", code), results="")


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[gpu_suite.Part]:
    found: list[gpu_suite.Part] = []
    monkeypatch.setattr(gpu_suite, "parts", lambda _: found)
    return found


def test_done_parts_are_left_out_and_failed_ones_tried_again(wanted: list[gpu_suite.Part], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    wanted += [
        part("first", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"),
        part("second", f"import os, sys; sys.exit(0 if os.path.exists({str(mark)!r}) else 3)"),
    ]
    out = ["--small", "--out", str(tmp_path / "out")]
    assert gpu_suite.main(out) == 1
    assert json.loads((tmp_path / "out" / "second.json").read_text())["code"] == 3
    mark.touch()
    assert gpu_suite.main(out) == 0
    assert (tmp_path / "count").read_text() == "x"


def test_a_part_that_hangs_ends_with_all_its_processes(wanted: list[gpu_suite.Part], tmp_path: Path) -> None:
    number = tmp_path / "number"
    child = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    wanted.append(part("hangs", code))
    assert gpu_suite.main(["--small", "--out", str(tmp_path), "--limit-s", "10"]) == 1
    assert json.loads((tmp_path / "hangs.json").read_text())["code"] == 124
    assert (tmp_path / "hangs.log").read_text() == "started\n"
    until(lambda: ended(int(number.read_text())), "end of the part's child", 5)


def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--cifar", "/cifar", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step_224px") and "simclr_imagenet" in line for line in lines)
    assert any("--data.root /cifar" in line for line in lines)
    assert any(line.startswith("loader_224px") and "needs --photos DIR" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_part_of_every_script_runs_on_the_cpu_with_small_sizes(tmp_path: Path) -> None:
    parts = ["nt_xent", "loader_32px", "byol_200_epochs", "scaling"]
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(24):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    images, out = str(tmp_path / "images"), tmp_path / "out"
    command = [sys.executable, str(Path(gpu_suite.__file__)), "--small", "--cifar", images, "--photos", images]
    command += ["--parts", *parts]
    done = subprocess.run([*command, "--out", str(out), "--runs", str(tmp_path / "runs")], check=False, timeout=1750)
    logs = {path.stem: path.read_text()[-2000:] for path in out.glob("*.log")}
    assert done.returncode == 0, logs
    records = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}
    assert set(records) == set(logs) == set(parts)
    assert records["loader_32px"][0]["samples_per_s"]["step alone"]["median"] > 0
    assert {line["world_size"] for line in records["scaling"]} == {1, 2}
    assert 0 <= records["byol_200_epochs"][0]["scores"][-1]["linear"] <= 1
