"""``sslx pretrain`` from outside: exit codes, the one line of an error, and what a run leaves behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kit.processes import TINY, is_one_line, metrics, outside
from sslx import cli
from sslx.runs import checkpoint, records
from sslx.trained import load

Run = Callable[..., tuple[int, str]]


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
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step, status.reason) == ("done", 2, "")
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]
    assert {"loss", "lr", "epoch", "samples_per_s", "data_wait"} <= metrics(tmp_path / "r")[0].keys()
    assert checkpoint.load(tmp_path / "r")["step"] == 2
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "run_id", "status.json",
    ]  # fmt: skip


def test_an_existing_run_is_not_overwritten_and_one_of_another_config_not_resumed(here: Run, tmp_path: Path):
    assert here()[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, err = here()
    assert code == 64
    is_one_line(err, "exists", "sslx resume ", "--name")
    code, err = here("--resume", "auto", "--encoder.channels", "8", "8", "8", "16")
    assert code == 64
    is_one_line(err, "another config", "--encoder.channels [8, 8, 8, 8] -> [8, 8, 8, 16]")
    code, err = here("--resume", "auto", "--optim.lr=0.2")
    assert code == 64
    is_one_line(err, "--optim.lr 0.6 -> 0.2")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert here("--resume", "auto", "--checkpoint.keep", "1")[0] == 0  # what may differ


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--source.name folder", 64, ["--source.root"]),
        ("--source.name folder --source.root {tmp}/no/such", 66, ["{tmp}/no/such", "nearest existing folder: {tmp})"]),
        ("--source.name folder --source.root {tmp}/empty", 66, ["no images below {tmp}/empty", "found no files"]),
        ("--source.name folder --source.root {tmp}/texts", 66, ["no images below", "not taken: .txt: 1 (a.txt)"]),
        ("--source.name cifar10 --source.root {tmp}", 66, ["cifar10 not found under {tmp}", "--source.root"]),
        ("--encoder.name resnet999", 64, ["'resnet999' is not a timm model", "did you mean resnet"]),
        ("--encoder.weights {tmp}/no.pt", 66, ["--encoder.weights {tmp}/no.pt does not exist"]),
        ("--batch-size 15 --num-micro-batches 2", 64, ["15 must be divisible", "--batch-size 14"]),
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


def test_a_batch_of_one_is_refused_before_a_run_folder_is_made(here: Run, tmp_path: Path):
    code, err = here("--batch-size", "1")
    assert code == 64
    is_one_line(err, "negatives", "2 samples", "got a batch of 1")
    assert not (tmp_path / "r").exists()


def test_a_loss_that_is_no_number_ends_the_run(here: Run, tmp_path: Path):
    code, err = here("--optim.name", "sgd", "--optim.lr", "1e30", "--optim.warmup", "0", "--steps", "9")
    assert code == 76
    is_one_line(err, "the loss is nan", "lower --optim.lr")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, "loss is nan" in status.reason) == ("failed", True)
    assert not (tmp_path / "r" / "checkpoints").exists()  # nothing of it is worth going on from


def test_unreadable_images_are_replaced_up_to_the_share_allowed(
    here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    root = images(tmp_path / "images", good=28, bad=4)
    folder = ["--source.name", "folder", "--source.root", root, "--data.backend", "torchvision", "--data.threads", "0"]
    code, err = here(*folder, "--steps", "4")
    assert code == 65
    is_one_line(err, "of 32 images are unreadable", "--data.max-bad", "/bad00")
    cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "s", *map(str, folder), "--data.max-bad", "0.2"])
    told = capfd.readouterr().out
    assert told.count("unreadable image") == 4  # 2 epochs of 2 steps: each of the four once
    status = records.read_status(tmp_path / "s")
    assert status is not None
    assert status.state == "done"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert here("--checkpoint.every", "1")[0] == 0
    newest = tmp_path / "r" / "checkpoints" / "step_2" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    code = cli.main(["pretrain", *TINY, "--runs", str(tmp_path), "--name", "r", "--resume", "auto"])
    said = capfd.readouterr().out
    assert code == 0
    assert "checkpoint step_2 is damaged (optimizer.pt: 1000 bytes instead of" in said
    assert "using step_1" in said
    assert "resumed" in said
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]
    for state in (tmp_path / "r").glob("checkpoints/*/method.pt"):
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
    trained = load(tmp_path / "r")
    encoder = trained.encoder
    assert (trained.size, trained.view.size) == (16, 96)
    assert encoder(torch.zeros(2, 3, 96, 96)).shape == (2, 8)


def test_a_log_that_cannot_be_written_is_one_line(here: Run, tmp_path: Path):
    (tmp_path / "r" / "metrics.jsonl").mkdir(parents=True)
    code, err = here()
    assert code == 74
    is_one_line(err, "cannot write", "metrics.jsonl")
    status = records.read_status(tmp_path / "r")
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
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("done", 2)
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--source.name folder --source.root {tmp}/texts", 66, ["no images below", "a.txt"]),
        ("--encoder.name resnet999", 64, ["not a timm model", "did you mean resnet"]),
        ("--name old --resume auto --optim.lr 0.2", 64, ["another config", "--optim.lr 0.6 -> 0.2"]),
    ],
)
def test_a_mistake_on_two_ranks_is_one_line_too(here: Run, tmp_path: Path, flags: str, code: int, words: list[str]):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    assert here("--name", "old")[0] == 0
    start = time.monotonic()
    came, _, err = outside(tmp_path, "--ranks", "2", *flags.format(tmp=tmp_path).split())
    assert came == code, err
    assert time.monotonic() - start < 200, "a collective's timeout is 600 s"
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
    flags = ["--ranks", "2", "--source.name", "folder", "--source.root", root, "--data.backend", "auto"]
    code, _, err = outside(tmp_path, *flags)
    assert code == 65
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2  # both ranks may meet some of their own
    for line in lines:
        assert line.startswith("error: ")
        assert "--data.max-bad" in line
        assert "/bad0" in line
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert status.state == "failed"
    assert "unreadable" in status.reason


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_out_of_gpu_memory_is_one_line(here: Run, tmp_path: Path):
    huge = "--device cuda --data.size 224 --encoder.name wide_resnet101_2 --encoder.layers --encoder.channels"
    code, err = here(*huge.split(), "--source.num-samples", "4096", "--batch-size", "4096", "--compile", "off")
    assert code == 64
    is_one_line(err, "out of GPU memory", "--batch-size", "--num-micro-batches")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert status.state == "failed"
