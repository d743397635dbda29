"""The five commands of slurm/README.md, as they stand there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kit.on_slurm import ROOT
from kit.processes import until
from sslx.runs import records

pytestmark = [pytest.mark.slurm]


def commands() -> list[str]:
    text = (ROOT / "slurm" / "README.md").read_text().split("## Try it on one machine")[1]
    return text.split("```bash\n")[1].split("```")[0].splitlines()


def test_five_commands_from_nothing_to_a_preempted_and_resumed_run(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("slurmctld"):
        pytest.skip("needs root and slurmctld: bash tests/run.sh --slurm")
    lines = commands()
    assert len(lines) == 5
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    run = tmp_path / "runs" / "simclr_digits"
    # A newcomer types the fourth once the run is training.
    lines.insert(3, f"until [ -s {run}/metrics.jsonl ]; do sleep 0.2; done")
    folder = tempfile.mkdtemp(prefix="sslx-cluster-")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {"SSLX_CLUSTER": folder, "SSLX_CLUSTER_PORT": "17000", "PATH": path}

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        said = bash("\n".join(lines))
        assert "simclr_digits on 2 nodes x 1 rank\n" in said
        assert said.splitlines()[-1].split()[0] == "simclr_digits"
        until(lambda: bool(records.read_stops(run)), "preemption")
        (stop,) = records.read_stops(run)
        assert (stop.code, stop.reason) == (75, "SIGTERM")
        until(lambda: records.last_metrics(run / "metrics.jsonl").get("step", 0) > stop.step, "going on")
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))
    finally:
        bash("bash slurm/local_cluster.sh stop")
    assert not Path(folder).exists()
