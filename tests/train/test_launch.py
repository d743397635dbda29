"""``sslx pretrain`` from outside: exit codes, the one line of an error, and what a run leaves behind."""

import shutil
import socket
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kit.processes import is_one_line, metrics, outside, started_by_hand
from kit.runs import Run, status_of, steps_of
from kit.sources import noise
from sslx.machine import cores
from sslx.runs import checkpoint, records
from sslx.trained import load


def images(folder: Path, good: int, bad: int) -> list[str]:
    """The flags of a folder with readable and unreadable images."""
    noise(folder, good, 24)
    for i in range(bad):
        (folder / f"bad{i:03}.png").write_bytes(b"no image")
    return ["--source.name", "folder", "--source.root", str(folder)]


# ---------------------------------------------------------------- one rank, what it leaves


def test_a_run_leaves_its_files(here: Run, tmp_path: Path):
    assert here() == (0, "")
    status = status_of(tmp_path)
    assert (status.state, status.step, status.reason) == ("done", 2, "")
    assert steps_of(tmp_path) == [1, 2]
    assert {"loss", "lr", "epoch", "samples_per_s", "data_wait"} <= metrics(tmp_path / "r")[0].keys()
    assert checkpoint.load(tmp_path / "r")["step"] == 2
    files = "checkpoints config.json metrics.jsonl run_id starts.jsonl status.json".split()
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == files


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
        ("--batch-size 1", 64, ["negatives", "2 samples", "got a batch of 1"]),
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


def test_unreadable_images_are_replaced_up_to_the_share_allowed(here: Run, tmp_path: Path):
    folder = [*images(tmp_path / "images", good=28, bad=4), "--data.backend", "torchvision", "--data.threads", "0"]
    code, err = here(*folder, "--steps", "4")
    assert code == 65
    is_one_line(err, "of 32 images are unreadable", "--data.max-bad", "/bad00")
    shutil.rmtree(tmp_path / "r")
    assert here(*folder, "--data.max-bad", "0.2")[0] == 0
    assert here.out.count("unreadable image") == 4  # 2 epochs of 2 steps: each of the four once
    assert status_of(tmp_path).state == "done"


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
    assert status_of(tmp_path).state == "failed"


# ---------------------------------------------------------------- two ranks


@pytest.mark.slow
def test_two_ranks_say_everything_once(tmp_path: Path):
    code, out, err = outside(tmp_path, "--ranks", "2", "--data.backend", "auto")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(set(lines)) == len(lines)
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/2", "2/2"]
    assert "2 x cpu" in out
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("done", 2)
    assert steps_of(tmp_path) == [1, 2]
    (start,) = records.read_starts(tmp_path / "r")
    assert start.command.startswith("sslx pretrain --source.name synthetic ")
    assert start.command.endswith(" --ranks 2 --data.backend auto")
    assert (start.step, start.cores, start.hosts) == (0, cores.allowed(), [socket.gethostname()] * 2)
    assert start.versions["torch"] == metadata.version("torch")


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
def test_a_wrong_flag_on_two_ranks_is_explained_once():
    (code, said), other = started_by_hand(2, "pretrain", "--stesp", "3")
    assert code == 64
    assert "--steps" in said
    assert other == (64, "")


@pytest.mark.slow
def test_the_rank_that_meets_unreadable_images_names_them_and_all_end(tmp_path: Path):
    flags = images(tmp_path / "images", good=20, bad=20)
    code, _, err = outside(tmp_path, "--ranks", "2", *flags, "--data.backend", "auto")
    assert code == 65
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2  # both ranks may meet some of their own
    for line in lines:
        assert line.startswith("error: ")
        assert "--data.max-bad" in line
        assert "/bad0" in line
    assert (status_of(tmp_path).state, "unreadable" in status_of(tmp_path).reason) == ("failed", True)


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
def test_out_of_gpu_memory_is_one_line(here: Run, tmp_path: Path):
    huge = "--device cuda --data.size 224 --encoder.name wide_resnet101_2 --encoder.layers --encoder.channels"
    code, err = here(*huge.split(), "--source.num-samples", "4096", "--batch-size", "4096", "--compile", "off")
    assert code == 64
    is_one_line(err, "out of GPU memory", "--batch-size", "--num-micro-batches")
    assert status_of(tmp_path).state == "failed"
