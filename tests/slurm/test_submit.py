"""What ``sslx submit`` hands to a real Slurm, and what it says."""

import re
from pathlib import Path

import pytest

from kit.processes import TINY
from sslx import cli

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def flags(runs: Path, *more: str) -> list[str]:
    return [*TINY, "--runs", str(runs), "--name", "r", *more]


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "--dry-run --nodes 2 --gpus-per-node 8 --cpus-per-rank 6 --mem-gb 100 --time 1-0:00:00 --partition p "
    asked += "--account a --qos q --constraint c --reservation r --container img.sqsh --mounts /data:/data "
    asked += "--interface eth1 --sbatch exclusive mail-type=END --signal-delay-s 90 --give-up-s 30"
    argv = ["submit", *asked.split(), "--setup", "module load cuda", "--", *flags(tmp_path / "runs")]
    assert cli.main(argv) == 0
    script = capsys.readouterr().out
    for line in (
        "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=6", "--mem=100GB", "--time=1440",
        "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--reservation=r", "--exclusive",
        "--mail-type=END", "--signal=USR2@90", "--requeue", "--open-mode=append", "--job-name=r",
        f"--output={tmp_path}/runs/r/job/%j.log",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    srun = next(line for line in script.splitlines() if line.startswith("srun "))
    for word in (
        "--kill-on-bad-exit=1",
        "--cpus-per-task=6",
        "--container-image=img.sqsh",
        "--container-mounts=/data:",
    ):
        assert word in srun
    for line in ("module load cuda", "export SSLX_GIVE_UP_S=30", "export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME="):
        assert f"\n{line}" in script
    assert script.rstrip().splitlines()[-1] == 'exit "$?"'
    assert not (tmp_path / "runs" / "r" / "config.json").exists()
    assert not (tmp_path / "runs" / "r" / "job.json").exists()


def test_a_sweep_is_one_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text('[grid]\n"optim.lr" = [0.1, 0.2]\nseed = [0, 1, 2]\n')
    assert cli.main(["submit", "--dry-run", "--at-once", "4", "--array", str(path), "--", *flags(tmp_path)]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5%4\n" in script
    assert re.search(rf"#SBATCH --output={tmp_path}/r-array-[0-9a-f]{{8}}/%A_%a.log\n", script)
    assert f"-m sslx.cluster.requeue {tmp_path}/r-array-" in script


def test_a_sweep_of_one_run_is_no_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text("[grid]\nseed = [3]\n")
    assert cli.main(["submit", "--dry-run", "--array", str(path), "--", *flags(tmp_path)]) == 0
    script = capsys.readouterr().out
    assert "--array" not in script
    assert f"-m sslx.cluster.requeue {tmp_path}/r-seed=3 " in script
