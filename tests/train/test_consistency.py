"""Ranks that were started differently, and a rank whose weights drift away, are named; all ends in one line."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from kit.processes import TINY, Record, is_one_line
from sslx import data, distributed, methods
from sslx.config import load
from sslx.data import Config, sources
from sslx.data.sources import folder
from sslx.data.views import eval_view
from sslx.distributed import Ranks
from sslx.errors import ConfigError, RanksError
from sslx.runs import checkpoint, records
from sslx.train import consistency, verify
from sslx.train.pretrain import Position, pretrain

PEERS = consistency.Peers(("a", "b", "a"), True)
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}

# ``sslx pretrain`` whose rank 1 does something of its own in step 15, before the step.
HARMED = """
import sys, torch, os
from sslx import cli, distributed
from sslx.train import pretrain as loop
calls, train_step = 0, loop.train_step
def harmed(model, batches, optimizer, progress, autocast, clip):
    global calls
    calls += 1
    if calls == 15 and os.environ["RANK"] == "1":
        with torch.no_grad():
            {harm}
    return train_step(model, batches, optimizer, progress, autocast, clip)
loop.train_step = harmed
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def started_by_hand(
    folder: Path, flags: dict[int, list[str]], code: str = "", world_size: int = 2, port: int = 0
) -> tuple[list[int], list[str], float]:
    """(exit codes, stderrs, seconds) of ranks that are started one by one, each with flags of its own."""
    head = [sys.executable, "-c", code] if code else [sys.executable, "-m", "sslx", "pretrain"]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or 20_000 + os.getpid() % 9_000)}
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [*head, *TINY, "--runs", str(folder), "--name", "r", "--optim.lr", "0.01", *flags.get(rank, [])],
            env=ALONE | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said, time.monotonic() - start


def error_lines(said: list[str]) -> str:
    return "".join(
        line for text in said for line in text.splitlines(keepends=True) if line.startswith(("error", "Trace"))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], ["--seed is 0 on rank 0 (", ") and 1 on rank 1 ("]),
        (["--optim.lr", "0.5"], ["--optim.lr is 0.01 on rank 0", "0.5 on rank 1"]),
        (["--checkpoint.every", "7"], ["--checkpoint.every is 1000 on rank 0", "7 on rank 1"]),
        (["--log.every", "3"], ["--log.every is 1 on rank 0", "3 on rank 1"]),
        (["--encoder.channels", "8", "8", "8", "16"], ["--encoder.channels is [8, 8, 8, 8] on rank 0"]),
        (["--method.name", "byol"], ["--method.name", '"byol" on rank 1']),
    ],
)
def test_a_rank_with_another_setting_is_refused(
    tmp_path: Path, flags: list[str], words: list[str], record_property: Record
) -> None:
    codes, said, seconds = started_by_hand(tmp_path, {1: flags})
    assert codes == [64, 64], said
    is_one_line(error_lines(said), "the ranks of this run differ: ", *words, "start all ranks by the same command")
    assert seconds < 100, "a collective's timeout is 600 s"
    assert not (tmp_path / "r").exists()
    record_property("figure", f"{flags[0]}: exit codes {codes} after {seconds:.0f} s")


@pytest.mark.slow
def test_a_rank_with_other_code_is_refused(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from sslx import cli
        from sslx.train import consistency
        if os.environ["RANK"] == "1":
            consistency.source_digest = lambda: "0123456789ab"
        sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
    """
    codes, said, _ = started_by_hand(tmp_path, {}, code)
    assert codes == [64, 64], said
    is_one_line(error_lines(said), "sslx is ", " 0123456789ab on rank 1", "the same installation")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_weight_that_drifts_away_is_noticed_at_the_next_save(
    tmp_path: Path, world_size: int, record_property: Record
) -> None:
    flags = {r: ["--steps", "60", "--checkpoint.every", "10", "--batch-size", "18"] for r in range(world_size)}
    harm = "next(model.module.parameters())[0, 0, 0, 0] += 1e-3"
    codes, said, _ = started_by_hand(tmp_path, flags, HARMED.format(harm=harm), world_size)
    assert codes == [70] * world_size, said
    words = ["encoder.", "conv1.weight of rank 1 (", "is no longer that of the other ranks at step 20", "is not saved"]
    is_one_line(error_lines(said), *words, "--resume auto")
    assert checkpoint.load(tmp_path / "r")["step"] == 10
    record_property(
        "figure", f"{world_size} ranks: changed in step 15, noticed at step 20, the save of step 10 is left"
    )
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.code) == ("failed", 70)


@pytest.mark.slow
def test_a_rank_in_another_collective_is_named_within_a_minute_or_two(tmp_path: Path, record_property: Record) -> None:
    flags = {rank: ["--steps", "60", "--checkpoint.every", "10"] for rank in range(2)}
    harm = "torch.distributed.all_reduce(torch.ones(3))"
    codes, said, seconds = started_by_hand(tmp_path, flags, HARMED.format(harm=harm))
    assert codes == [70, 70], said
    is_one_line(error_lines(said), "step 15 cannot end: rank 1 on ", " waits at ", "so all wait for one another")
    assert 60 < seconds < 180, "a collective's timeout is 600 s"
    record_property("figure", f"exit codes {codes} after {seconds:.0f} s")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.code) == ("failed", 70)


# ---------------------------------------------------------------- on ranks that stay up


def differing(facts: list[dict[str, str]]) -> str:
    try:
        consistency.check(facts[distributed.rank()], "mend it")
    except ConfigError as error:
        return str(error)
    return ""


def test_what_differs_is_said_on_all_ranks(ranks: Any) -> None:
    assert ranks(3, differing, [{"a": "1", "b": "2"}] * 3) == ["", "", ""]
    said = ranks(3, differing, [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}])
    assert len(set(said)) == 1
    host = os.uname().nodename
    what = f"b is 2 on rank 0 ({host}) and 3 on rank 1 ({host}) and nothing on rank 2 ({host})"
    assert said[0] == f"the ranks of this run differ: {what}: mend it"
    many = [{f"f{i}": str(rank) for i in range(9)} for rank in range(2)]
    assert "; and 6 more: mend it" in ranks(2, differing, many)[0]


def parts_differ(roots: list[str], widths: list[int]) -> str:
    """What the ranks are told whose images lie there and whose models have so many outputs."""
    config = Config(backend="torchvision", threads=0)
    images = sources.build(folder.Config(root=Path(roots[distributed.rank()])), "pretrain")
    loader = data.training(
        config,
        images,
        [eval_view(8)],
        batch_size=4,
        seed=0,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=torch.float32,
    )
    try:
        consistency.check_parts(loader, nn.Linear(2, widths[distributed.rank()]), torch.float32)
    except ConfigError as error:
        return str(error)
    return ""


def images(folder: Path, count: int = 9) -> Path:
    for i in range(count):
        place = folder / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (20 * i, 30, 40)).save(place)
    return folder


def test_other_images_or_parameters_are_refused(ranks: Any, tmp_path: Path) -> None:
    here = str(images(tmp_path / "here"))
    moved = str(images(tmp_path / "another" / "place"))
    assert ranks(2, parts_differ, [here, moved], [3, 3]) == ["", ""], "roots may differ"
    more = str(images(tmp_path / "more", 10))
    renamed = images(tmp_path / "renamed")
    (renamed / "a" / "0.png").rename(renamed / "a" / "00.png")
    changed = images(tmp_path / "changed")
    shutil.copy(changed / "a" / "0.png", changed / "a" / "2.png")
    for there, widths, words in (
        (here, [3, 4], "parameter weight is (3, 2) torch.float32 on rank 0"),
        (more, [3, 3], "the number of images is 9 on rank 0"),
        (str(renamed), [3, 3], "the images (digest) is "),
        (str(changed), [3, 3], "the contents of some images (digest) is "),
    ):
        for said in ranks(2, parts_differ, [here, there], widths):
            assert said.startswith(f"the ranks of this run differ: {words}")


def drift(harm: str, alike: bool) -> str:
    """What is said of a model whose state one rank has changed so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4), nn.Linear(5, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model[2](torch.ones(5)).sum().backward()
    optimizer.step()
    model[1].running_mean.fill_(distributed.rank())  # each rank's own
    if distributed.rank() == 1:
        with torch.no_grad():
            exec(harm, {"model": model, "optimizer": optimizer, "torch": torch})
    said: list[str] = []
    try:
        consistency.check_weights(model, optimizer, 7, consistency.Peers(PEERS.hosts, alike), said.append)
    except RanksError as error:
        said.append(f"error: {error}")
    return "".join(said)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        ("", ""),
        ("model[0].weight[0, 0, 0, 1] += 1e-7", "0.weight"),
        ("model[0].weight.neg_()", "0.weight"),
        ("model[2].bias[4] = torch.nan", "2.bias"),
        ("model[1].num_batches_tracked += 1", "1.num_batches_tracked"),
        ("optimizer.state[model[2].weight]['exp_avg'][0, 0] *= 2", "2.weight's exp_avg"),
        ("optimizer.state[model[2].weight]['step'] += 1", "2.weight's step"),
        ("model[2].double(); optimizer.state.clear()", "2.weight"),
    ],
)
def test_drift_is_named(ranks: Any, harm: str, name: str) -> None:
    for world_size in (2, 3):
        for said in ranks(world_size, drift, harm, True):
            assert said.startswith(f"error: {name} of rank 1 (b) is no longer that of") if name else said == ""
    for said in ranks(2, drift, harm, False):
        assert said.startswith(f"{name} of rank 1 (b) is no longer, to the last bit") if name else said == ""


def nan_of_another_sign() -> str:
    model = nn.Linear(2, 2)
    bits = torch.tensor([0x7FC00000, -0x400000, 0, -(2**31)] if distributed.rank() else [-0x400000, 0x7FC00000, 0, 0])
    model.weight.data = bits.to(torch.int32).view(torch.float32).reshape(2, 2)
    model.bias.data.zero_()
    said: list[str] = []
    consistency.check_weights(model, torch.optim.SGD(model.parameters()), 7, PEERS, said.append)
    return "".join(said)


def test_nan_is_nan_and_zero_is_zero(ranks: Any) -> None:
    assert ranks(2, nan_of_another_sign) == ["", ""]


class _Never:
    received = 0

    def acknowledge(self, agreed: int) -> int:
        return agreed


def trained(folder: str, name: str, encoder: str, batch_norm: str) -> int:
    torch.set_num_threads(1)
    flags = [*verify.SETTINGS, *verify.ENCODERS[encoder], "--method.name", name, "--batch-norm", batch_norm]
    flags += ["--data.size", verify.SIZE["fp32"], "--precision", "fp32", "--steps", "4", "--checkpoint.every", "2"]
    settings = load([*flags, "--online.every", "0", "--runs", folder, "--name", name])
    settings = dataclasses.replace(settings, method=verify.narrow(settings.method))
    position = Position()
    pretrain(settings, distributed.init("cpu"), _Never(), position)  # pyright: ignore[reportArgumentType]
    return position.saved


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["local", "sync"])
@pytest.mark.parametrize(("method", "encoder"), [(m, e) for m in methods.available() for e in methods.encoders(m)])
def test_no_method_drifts_by_itself(ranks: Any, tmp_path: Path, method: str, encoder: str, batch_norm: str) -> None:
    assert ranks(3, trained, str(tmp_path), method, encoder, batch_norm) == [4, 4, 4]
