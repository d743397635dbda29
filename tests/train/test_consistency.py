"""Ranks that were started differently, and a rank whose weights drift away, are named; all ends in one line."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from kit import tiny
from kit.full_batch import RunOnRanks
from kit.processes import IN_A_STEP, Record, is_one_line, pretrain, started_by_hand
from kit.runs import status_of
from kit.sources import folder
from sslx import data, distributed
from sslx.config import load
from sslx.data import Config, sources
from sslx.data.views import eval_view
from sslx.distributed import Ranks
from sslx.errors import ConfigError, RanksError
from sslx.runs import checkpoint
from sslx.train import consistency, verify
from sslx.train import pretrain as loop
from sslx.train.signals import StopSignals

PEERS = consistency.Peers(("a", "b", "a"), True)


def is_one_line_of_all(ranks: list[tuple[int, str]], code: int, *words: str) -> None:
    """All ranks ended with this exit code, and one of them said so, without a traceback."""
    assert {came for came, _ in ranks} == {code}, ranks
    lines = [line for _, said in ranks for line in said.splitlines(keepends=True)]
    is_one_line("".join(line for line in lines if line.startswith(("error", "Trace"))), *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 1", ["--seed is 0 on rank 0 (", ") and 1 on rank 1 ("]),
        ("--optim.lr 0.5", ["--optim.lr is 0.01 on rank 0", "0.5 on rank 1"]),
        ("--checkpoint.every 7", ["--checkpoint.every is 1000 on rank 0", "7 on rank 1"]),
        ("--log.every 3", ["--log.every is 1 on rank 0", "3 on rank 1"]),
        ("--encoder.channels 8 8 8 16", ["--encoder.channels is [8, 8, 8, 8] on rank 0"]),
        ("--method.name byol", ["--method.name", '"byol" on rank 1']),
    ],
)
def test_a_rank_with_another_setting_is_refused(
    tmp_path: Path, flags: str, words: list[str], record_property: Record
) -> None:
    start = time.monotonic()
    ranks = started_by_hand(2, *pretrain(tmp_path, "--optim.lr", "0.01"), of_rank_1=flags.split())
    seconds = time.monotonic() - start
    is_one_line_of_all(ranks, 64, "the ranks of this run differ: ", *words, "start all ranks by the same command")
    assert seconds < 100, "a collective's timeout is 600 s"
    assert not (tmp_path / "r").exists()
    record_property("figure", f"{flags}: exit codes 64 after {seconds:.0f} s")


@pytest.mark.slow
def test_a_rank_with_other_code_is_refused(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from sslx import cli
        from sslx.train import consistency
        if os.environ["RANK"] == "1":
            consistency.source_digest = lambda: "0123456789ab"
        sys.exit(cli.main(sys.argv[1:]))
    """
    ranks = started_by_hand(2, *pretrain(tmp_path), code=code)
    is_one_line_of_all(ranks, 64, "sslx is ", " 0123456789ab on rank 1", "the same installation")


IN_RANK_1S_STEP_15 = IN_A_STEP.format(harm="if number == 15 and os.environ['RANK'] == '1': {}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_weight_that_drifts_away_is_noticed_at_the_next_save(
    tmp_path: Path, world_size: int, record_property: Record
) -> None:
    flags = "--steps 60 --checkpoint.every 10 --batch-size 18 --optim.lr 0.01".split()
    code = IN_RANK_1S_STEP_15.format("next(model.module.parameters()).data[0, 0, 0, 0] += 1e-3")
    ranks = started_by_hand(world_size, *pretrain(tmp_path, *flags), code=code)
    words = ["encoder.", "conv1.weight of rank 1 (", "is no longer that of the other ranks at step 20", "is not saved"]
    is_one_line_of_all(ranks, 70, *words, "--resume auto")
    assert checkpoint.load(tmp_path / "r")["step"] == 10
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("failed", 70)
    record_property(
        "figure", f"{world_size} ranks: changed in step 15, noticed at step 20, the save of step 10 is left"
    )


@pytest.mark.slow
def test_a_rank_in_another_collective_is_named_within_a_minute_or_two(tmp_path: Path, record_property: Record) -> None:
    code = IN_RANK_1S_STEP_15.format("torch.distributed.all_reduce(torch.ones(3))")
    start = time.monotonic()
    ranks = started_by_hand(2, *pretrain(tmp_path, "--steps", "60", "--optim.lr", "0.01"), code=code)
    seconds = time.monotonic() - start
    is_one_line_of_all(ranks, 70, "step 15 cannot end: rank 1 on ", " waits at ", "so all wait for one another")
    assert 60 < seconds < 180, "a collective's timeout is 600 s"
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("failed", 70)
    record_property("figure", f"exit codes 70 after {seconds:.0f} s")


# ---------------------------------------------------------------- on ranks that stay up


def differing(facts: list[dict[str, str]]) -> str:
    try:
        consistency.check(facts[distributed.rank()], "mend it")
    except ConfigError as error:
        return str(error)
    return ""


def test_what_differs_is_said_on_all_ranks(ranks: RunOnRanks) -> None:
    assert ranks(3, differing, [{"a": "1", "b": "2"}] * 3) == ["", "", ""]
    said = ranks(3, differing, [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}])
    assert len(set(said)) == 1
    host = os.uname().nodename
    what = f"b is 2 on rank 0 ({host}) and 3 on rank 1 ({host}) and nothing on rank 2 ({host})"
    assert said[0] == f"the ranks of this run differ: {what}: mend it"
    many = [{f"f{i}": str(rank) for i in range(9)} for rank in range(2)]
    assert "; and 6 more: mend it" in ranks(2, differing, many)[0]


def parts_differ(roots: list[Path], widths: list[int]) -> str:
    """What the ranks are told whose images lie there and whose models have so many outputs."""
    config, alone = Config(backend="torchvision", threads=0), Ranks(device=torch.device("cpu"))
    images, view, dtype = sources.build(folder(roots[distributed.rank()]), "pretrain"), eval_view(8), torch.float32
    loader = data.training(config, images, [view], batch_size=4, seed=0, ranks=alone, dtype=dtype)
    try:
        consistency.check_parts(loader, nn.Linear(2, widths[distributed.rank()]), torch.float32)
    except ConfigError as error:
        return str(error)
    return ""


def test_other_images_or_parameters_are_refused(ranks: RunOnRanks, tmp_path: Path) -> None:
    here, moved, more, renamed, changed = (tmp_path / name for name in ("here", "moved", "more", "renamed", "changed"))
    for place in (here / "a", here / "b"):
        place.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 9), (20 * i, 30, 40)).save(place / f"{i}.png")
    for place in (moved, more, renamed, changed):
        shutil.copytree(here, place)
    assert ranks(2, parts_differ, [here, moved], [3, 3]) == ["", ""], "roots may differ"
    shutil.copy(more / "a" / "0.png", more / "a" / "4.png")
    (renamed / "a" / "0.png").rename(renamed / "a" / "00.png")
    shutil.copy(changed / "a" / "0.png", changed / "a" / "2.png")
    for there, widths, words in (
        (here, [3, 4], "parameter weight is (3, 2) torch.float32 on rank 0"),
        (more, [3, 3], "the number of images is 8 on rank 0"),
        (renamed, [3, 3], "the images (digest) is "),
        (changed, [3, 3], "the contents of some images (digest) is "),
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
def test_drift_is_named(ranks: RunOnRanks, harm: str, name: str) -> None:
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


def test_nan_is_nan_and_zero_is_zero(ranks: RunOnRanks) -> None:
    assert ranks(2, nan_of_another_sign) == ["", ""]


def trained(folder: str, name: str, encoder: str, batch_norm: str) -> int:
    torch.set_num_threads(1)
    flags = [*verify.SETTINGS, *verify.ENCODERS[encoder], "--method.name", name, "--batch-norm", batch_norm]
    flags += ["--data.size", verify.SIZE["fp32"], "--precision", "fp32", "--steps", "4", "--checkpoint.every", "2"]
    settings = load([*flags, "--online.every", "0", "--runs", folder, "--name", name])
    settings = dataclasses.replace(settings, method=verify.narrow(settings.method))
    position = loop.Position()
    loop.pretrain(settings, distributed.init("cpu"), StopSignals(), position)
    return position.saved


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["local", "sync"])
@pytest.mark.parametrize(("method", "encoder"), tiny.CASES)
def test_no_method_drifts_by_itself(
    ranks: RunOnRanks, tmp_path: Path, method: str, encoder: str, batch_norm: str
) -> None:
    assert ranks(3, trained, str(tmp_path), method, encoder, batch_norm) == [4, 4, 4]
