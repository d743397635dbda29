"""``sslx pretrain`` while no data comes: stopped by a signal, at its limit, without /dev/shm, without its workers."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.checkpoints import equal
from kit.hanging import hanging, hanging_mount
from kit.processes import SSLX, Record, is_one_line, outside, pretrain, started, until, until_training
from kit.runs import status_of, steps_of
from kit.sources import noise
from sslx.runs import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(noise(tmp_path_factory.mktemp("images"), 24, 64).iterdir())


def flags(images: list[Path], backend: str, ranks: int = 1) -> list[str]:
    return (
        f"--source.name folder --source.root {images[0].parent} --data.backend {backend} --data.threads 1 "
        f"--encoder.channels 16 16 16 16 --batch-size 24 --data.size 32 --ranks {ranks}"
    ).split()


def weights(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "r")["method"]


@pytest.mark.parametrize(("backend", "ranks"), [("torchvision", 1), ("torchvision", 2), ("dali", 1), ("dali", 2)])
def test_a_signal_while_no_data_comes_saves_the_run_as_it_is(
    images: list[Path], tmp_path: Path, backend: str, ranks: int, record_property: Record
) -> None:
    steps = [*flags(images, backend, ranks), "--steps", "60", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        with hanging(images):
            time.sleep(1)  # until what was made ahead is used up
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            assert process.wait(60) == 75
            seconds = time.monotonic() - start
            assert seconds < 25  # the files would be let go after 45
    record_property("figure", f"{backend}, {ranks} ranks: exit code 75 after {seconds:.1f} s")
    assert "error" not in (tmp_path / "err").read_text()
    status = status_of(tmp_path)
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    assert 2 <= status.step < 60
    assert checkpoint.load(tmp_path / "r")["step"] == status.step
    assert steps_of(tmp_path) == list(range(1, status.step + 1))
    assert outside(tmp_path, *steps, "--resume", "auto")[0] == 0
    assert outside(tmp_path / "whole", *steps)[0] == 0
    assert equal(weights(tmp_path), weights(tmp_path / "whole"))


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_files_that_never_answer_end_the_run_with_one_line(images: list[Path], tmp_path: Path, backend: str) -> None:
    late = [*flags(images, backend), "--steps", "100000", "--data.timeout-s", "2"]
    with hanging(images):  # from the start: no run is claimed
        code, _, err = outside(tmp_path, *late, timeout_s=40)
    assert code == 74
    is_one_line(err, "rank 0 waited 2 s for data", "--data.timeout-s")
    assert not (tmp_path / "r").exists()
    with started(tmp_path, *late) as process:
        until_training(tmp_path, process)
        with hanging(images):
            assert process.wait(40) == 74
    is_one_line((tmp_path / "err").read_text(), "rank 0 waited 2 s for data", "--resume auto")
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("failed", 74)


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse, to mount")
def test_a_mount_that_does_not_answer_ends_the_list_of_images(tmp_path: Path, record_property: Record) -> None:
    source = ["--source.name", "folder", "--source.root", str(tmp_path / "mount"), "--data.timeout-s", "2"]
    (tmp_path / "mount").mkdir()
    with hanging_mount(tmp_path / "mount"):
        for ranks in (1, 2):
            code, _, err = outside(tmp_path, *source, "--ranks", str(ranks), timeout_s=100)
            assert code == 74
            is_one_line(err, "waited 2 s for data", "the list of the images below", "check the disk or the mount")
        with started(tmp_path, *source, "--data.timeout-s", "1000") as process:
            threads = Path(f"/proc/{process.pid}/task")
            until(lambda: any("request_wait" in w.read_text() for w in threads.glob("*/wchan")), "a read of the mount")
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75
            seconds = time.monotonic() - start
            assert seconds < 20
    assert not (tmp_path / "r").exists()
    record_property("figure", f"exit code 74 after --data.timeout-s; SIGTERM: 75 after {seconds:.1f} s")


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="only root may mount another /dev/shm",
)
@pytest.mark.parametrize("backend", ["torchvision", "resident", "dali"])
def test_little_shared_memory_is_enough(images: list[Path], tmp_path: Path, backend: str) -> None:
    command = [*SSLX, *pretrain(tmp_path, *flags(images, backend, 2))]
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    argv, environ = ["unshare", "-m", "sh", "-c", small, "sh", *command], os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values() if isinstance(w, torch.Tensor))
