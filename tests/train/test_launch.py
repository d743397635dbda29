"""``sslx pretrain`` from outside: real processes, their exit codes, their one line, and what they leave behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslx import checkpoint, cli, evaluate, log

TINY = (
    "--data.source synthetic --data.num-synthetic 64 --data.size 16 --data.backend synthetic "
    "--encoder.layers 1 1 1 1 --encoder.channels 8 8 8 8 --method.hidden-dim 16 --method.projection-dim 8 "
    "--batch-size 16 --steps 2 --optim.name sgd --log.every 1 --online.every 0 --device cpu --precision fp32"
).split()
LONG = ["--steps", "1000000", "--checkpoint.every", "0"]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """``here("--flag", ...)`` -> (exit code, stderr) of one rank in this process; runs go to tmp_path."""

    def run(*flags: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "r", *map(str, flags)])
        return code, capfd.readouterr().err

    return run


@contextmanager
def started(folder: Path, *flags: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A run in processes of its own, output in ``folder/{out,err}``; whatever is left of it is killed."""
    argv = [sys.executable, "-m", "sslx", "pretrain", *TINY, "--runs", str(folder), "--name", "r", *map(str, flags)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, text=True, env=environ, start_new_session=True)
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            if process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def outside(folder: Path, *flags: str | Path, timeout_s: float = 120) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in processes of its own."""
    with started(folder, *flags) as process:
        process.wait(timeout_s)
    return process.returncode, (folder / "out").read_text(), (folder / "err").read_text()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 90) -> float:
    """Wait; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def until_training(folder: Path, process: subprocess.Popen[str]) -> None:
    until(lambda: bool(re.search(r"step +2/", (folder / "out").read_text())) or process.poll() is not None, "step 2")
    assert process.poll() is None, (folder / "err").read_text()


def children(parent: int) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(after[1]) == parent and after[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def is_one_line(err: str, *words: str) -> None:
    """stderr is one line that says ``error:`` and these words."""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def images(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (good, 24, 24, 3), dtype=np.uint8)
    for i in range(good):
        Image.fromarray(pixels[i]).save(folder / f"{i:03}.png")
    for i in range(bad):
        (folder / f"bad{i:03}.png").write_bytes(b"no image")
    return folder


# ---------------------------------------------------------------- one rank, what it leaves


def test_a_run_leaves_its_files(here: Run, tmp_path: Path):
    assert here() == (0, "")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step, status.reason) == ("done", 2, "")
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]
    assert {"loss", "lr", "epoch", "samples_per_s", "data_wait"} <= metrics(tmp_path / "r")[0].keys()
    assert checkpoint.load(tmp_path / "r")["step"] == 2
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "status.json",
    ]  # fmt: skip


def test_an_existing_run_is_not_overwritten_and_one_of_another_config_not_resumed(here: Run, tmp_path: Path):
    assert here()[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, err = here()
    assert code == 64
    is_one_line(err, "exists", "--resume auto", "--name")
    code, err = here("--resume", "auto", "--encoder.channels", "8", "8", "8", "16")
    assert code == 64
    is_one_line(err, "another config", "--encoder.channels [8, 8, 8, 8] -> [8, 8, 8, 16]")
    code, err = here("--resume", "auto", "--optim.lr=0.2")
    assert code == 64
    is_one_line(err, "--optim.lr 0.3 -> 0.2")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert here("--resume", "auto", "--checkpoint.keep", "1")[0] == 0  # what may differ


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--data.source folder", 64, ["--data.root"]),
        ("--data.source folder --data.root {tmp}/no/such", 66, ["{tmp}/no/such", "nearest that does: {tmp})"]),
        ("--data.source folder --data.root {tmp}/empty", 66, ["no images below {tmp}/empty", "found nothing"]),
        ("--data.source folder --data.root {tmp}/texts", 66, ["no images below", "1 other files", "a.txt"]),
        ("--data.source cifar10 --data.root {tmp}", 66, ["cifar10 not found under {tmp}", "--data.root"]),
        ("--encoder.name resnet999", 64, ["'resnet999' is no timm model", "did you mean resnet"]),
        ("--encoder.weights {tmp}/no.pt", 66, ["--encoder.weights {tmp}/no.pt does not exist"]),
        ("--batch-size 15 --accumulate 2", 64, ["15 must be divisible", "--batch-size 14"]),
        ("--batch-size 100", 64, ["batch size 100 is more than the 64 images", "--batch-size 64"]),
        ("--device cuda", 64, ["none is visible", "--device cpu"]),
        ("--runs /proc/no", 64, ["cannot write the run folder /proc/no/r", "--runs"]),
    ],
)
def test_a_mistake_is_one_line_and_a_code(here: Run, tmp_path: Path, flags: str, code: int, words: list[str]):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    came, err = here(*flags.format(tmp=tmp_path).split())
    assert came == code, err
    is_one_line(err, *[word.format(tmp=tmp_path) for word in words])
    assert not (tmp_path / "r").exists()  # nothing is claimed for a run that cannot start


def test_a_batch_of_one_has_no_negatives(here: Run, tmp_path: Path):
    code, err = here("--batch-size", "1")
    assert code == 64
    is_one_line(err, "no negatives", "2 samples")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("failed", 0)
    assert "no negatives" in status.reason


def test_a_loss_that_is_no_number_ends_the_run(here: Run, tmp_path: Path):
    code, err = here("--optim.name", "sgd", "--optim.lr", "1e30", "--optim.warmup", "0", "--steps", "9")
    assert code == 76
    is_one_line(err, "the loss is nan", "lower --optim.lr")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, "loss is nan" in status.reason) == ("failed", True)
    assert not (tmp_path / "r" / "checkpoints").exists()  # nothing of it is worth going on from


def test_unreadable_images_are_replaced_up_to_the_share_allowed(
    here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    root = images(tmp_path / "images", good=28, bad=4)
    folder = ["--data.source", "folder", "--data.root", root, "--data.backend", "torchvision", "--data.threads", "0"]
    code, err = here(*folder, "--steps", "4")
    assert code == 65
    is_one_line(err, "of 32 images are unreadable", "--data.max-bad", "/bad00")
    cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "s", *map(str, folder), "--data.max-bad", "0.2"])
    told = capfd.readouterr().out
    assert told.count("unreadable image") == 4  # 2 epochs of 2 steps: each of the four once
    status = log.read_status(tmp_path / "s")
    assert status is not None
    assert status.state == "done"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert here("--checkpoint.every", "1")[0] == 0
    newest = tmp_path / "r" / "checkpoints" / "step_2" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    code = cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "r", "--resume", "auto"])
    said = capfd.readouterr().out
    assert code == 0
    assert "checkpoint step_2 is damaged (state.pt: 1000 bytes instead of" in said
    assert "using step_1" in said
    assert "resumed" in said
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]
    for state in (tmp_path / "r").glob("checkpoints/*/state.pt"):
        state.write_bytes(state.read_bytes()[:-1])
    code, err = here("--resume", "auto")
    assert code == 65
    is_one_line(err, "no good checkpoint", "step_1", "step_2")


def test_resuming_gives_the_weights_of_an_unbroken_run(here: Run, tmp_path: Path):
    """Two steps, as a kill would leave them, and two more are bit for bit four."""
    four = ["--steps", "4", "--checkpoint.every", "2", "--data.backend", "auto", "--data.threads", "1"]
    assert here(*four, "--name", "whole")[0] == 0
    assert here(*four, "--name", "broken")[0] == 0
    folder = tmp_path / "broken"
    for path in (folder / "checkpoints" / "step_4").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step_4").rmdir()
    assert here(*four, "--name", "broken", "--resume", "auto")[0] == 0
    whole, broken = (checkpoint.load(tmp_path / name)["method"] for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    pick = [(line["step"], line["loss"]) for line in metrics(tmp_path / "whole")]
    assert pick == [(line["step"], line["loss"]) for line in metrics(folder)]


def test_an_encoder_trained_small_is_probed_large(here: Run, tmp_path: Path):
    """The stem goes with the training views: 16 px keep the small one, whatever the probes' 96 px would get."""
    assert here("--data.eval-size", "96")[0] == 0
    trained = evaluate.load(tmp_path / "r")
    encoder = trained.encoder(trained=True, device=torch.device("cpu"))
    assert (trained.size, trained.view.size) == (16, 96)
    assert encoder(torch.zeros(2, 3, 96, 96)).shape == (2, 8)


# ---------------------------------------------------------------- signals


def test_sigterm_saves_and_a_resumed_run_finishes(here: Run, tmp_path: Path):
    steps = ["--steps", "80", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    assert (tmp_path / "err").read_text() == ""
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    assert 2 <= status.step < 80
    assert checkpoint.load(tmp_path / "r")["step"] == status.step
    assert metrics(tmp_path / "r")[-1]["step"] == status.step
    assert here(*steps, "--resume", "auto") == (0, "")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("done", 80)
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 81))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_ends_with_130(tmp_path: Path, ranks: int):
    with started(tmp_path, *LONG, "--ranks", str(ranks)) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert (tmp_path / "err").read_text() == ""
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGINT")
    assert checkpoint.load(tmp_path / "r")["step"] == status.step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_a_long_step_at_once(tmp_path: Path, ranks: int):
    """One step of 2,048 micro-batches takes half a minute; the second Ctrl-C does not wait for it."""
    endless = "--data.num-synthetic 4096 --batch-size 4096 --accumulate 1024 --steps 1".split()
    with started(tmp_path, *endless, "--ranks", str(ranks)) as process:
        until(lambda: "1 steps of 4096" in (tmp_path / "out").read_text(), "start")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.wait(20) == 130
        assert time.monotonic() - start < 3
        until(lambda: not children(process.pid), "end of the ranks", 5)
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "step 1/1" not in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_an_output_that_nothing_reads_ends_the_run_and_its_status_says_so(tmp_path: Path):
    """sslx pretrain ... | head -1"""
    argv = [sys.executable, "-m", "sslx", "pretrain", *TINY, *LONG, "--runs", str(tmp_path), "--name", "r"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("synthetic: ")
        process.stdout.close()
        assert process.wait(30) == 141
        is_one_line(process.stderr.read(), "nothing reads the output")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, "closed pipe" in status.reason) == ("failed", True)


def test_a_log_that_cannot_be_written_is_one_line(here: Run, tmp_path: Path):
    (tmp_path / "r" / "metrics.jsonl").mkdir(parents=True)
    code, err = here()
    assert code == 74
    is_one_line(err, "cannot write", "metrics.jsonl")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert status.state == "failed"


# ---------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_ranks_say_everything_once(tmp_path: Path):
    code, out, err = outside(tmp_path, "--ranks", "2", "--data.backend", "auto")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(set(lines)) == len(lines)
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/2", "2/2"]
    assert "2 x cpu" in out
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("done", 2)
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]


def test_killing_one_of_two_ranks_ends_the_job_with_one_line(tmp_path: Path):
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        said = [line.split()[1] for line in (tmp_path / "out").read_text().splitlines()]
        assert len(set(said)) == len(said)  # "1/1000000", ...: each step once, from rank 0
        ranks = children(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - start < 15
    assert code == 137
    is_one_line((tmp_path / "err").read_text(), "another rank ended")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("failed", "another rank ended, without a word")


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path):
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.kill()
        process.wait()
        until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), "end of the ranks", 10)


@pytest.mark.slow
def test_two_ranks_are_preempted_together_and_resume(tmp_path: Path):
    steps = ["--ranks", "2", "--steps", "60", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    code, out, err = outside(tmp_path, *steps, "--resume", "auto")
    assert (code, err) == (0, "")
    assert f"at step {status.step}" in out
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--data.source folder --data.root {tmp}/texts", 66, ["no images below", "a.txt"]),
        ("--encoder.name resnet999", 64, ["no timm model", "did you mean resnet"]),
        ("--batch-size 15", 64, ["15 must be divisible", "--batch-size 14"]),
        ("--name old --resume auto --optim.lr 0.2", 64, ["another config", "--optim.lr 0.3 -> 0.2"]),
        ("--name old", 64, ["exists", "--resume auto"]),
    ],
)
def test_a_mistake_on_two_ranks_is_one_line_too(here: Run, tmp_path: Path, flags: str, code: int, words: list[str]):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    assert here("--name", "old")[0] == 0
    start = time.monotonic()
    came, _, err = outside(tmp_path, "--ranks", "2", *flags.format(tmp=tmp_path).split())
    assert came == code, err
    assert time.monotonic() - start < 60
    is_one_line(err, *words)


@pytest.mark.slow
def test_a_wrong_flag_on_two_ranks_is_explained_once(tmp_path: Path):
    argv = [sys.executable, "-m", "sslx", "pretrain", "--stesp", "3"]
    environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    ranks = [
        subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | environ | {"RANK": r})
        for r in ("0", "1")
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [64, 64]
    assert "--steps" in said[0]
    assert said[1] == ""


@pytest.mark.slow
def test_the_rank_that_meets_unreadable_images_names_them_and_all_end(tmp_path: Path):
    root = images(tmp_path / "images", good=20, bad=20)
    flags = ["--ranks", "2", "--data.source", "folder", "--data.root", root, "--data.backend", "auto"]
    code, _, err = outside(tmp_path, *flags)
    assert code == 65
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2  # both ranks may meet some of their own
    for line in lines:
        assert line.startswith("error: ")
        assert "--data.max-bad" in line
        assert "/bad0" in line
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert status.state == "failed"
    assert "unreadable" in status.reason


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_out_of_gpu_memory_is_one_line(here: Run, tmp_path: Path):
    huge = "--device cuda --data.size 224 --encoder.name wide_resnet101_2 --encoder.layers --encoder.channels"
    code, err = here(*huge.split(), "--data.num-synthetic", "65536", "--batch-size", "65536", "--compile", "off")
    assert code == 64
    is_one_line(err, "out of GPU memory", "--batch-size", "--accumulate")
    status = log.read_status(tmp_path / "r")
    assert status is not None
    assert status.state == "failed"
