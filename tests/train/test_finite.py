"""What is not finite is neither stepped nor saved: every method and optimizer, one rank and two, stop and skip."""

import copy
import itertools
import json
import math
import shutil
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kit import tiny
from kit.checkpoints import equal, same_training
from kit.full_batch import RunOnRanks
from kit.processes import Record, is_one_line, metrics, pretrain
from kit.runs import Run, status_of
from sslx import cli, distributed, optim, parallel
from sslx.config import load
from sslx.data.batch import Batch
from sslx.errors import NonFiniteError
from sslx.methods import simclr
from sslx.methods.base import Embedded, Method, Step
from sslx.runs import checkpoint, log
from sslx.runs.state import not_finite
from sslx.train import finite
from sslx.train import pretrain as loop
from sslx.train.signals import StopSignals
from sslx.train.step import cached_step, train_step

NOW = 0.3


def build(optimizer: Any) -> tuple[Method, torch.optim.Optimizer]:
    method = tiny.build(simclr.Config(hidden_dim=16, projection_dim=8))
    return method, optim.build(optim.Config(name=optimizer, weight_decay=0.1), method)


def batch(generator: torch.Generator, *, bad: bool = False) -> Batch:
    views = tuple(torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2))
    if bad:
        views[0][3, 0, 0, 0] = math.inf
    return Batch(views, torch.arange(8) % 4, torch.arange(8))


def state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"method": method.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def step(method: Method, optimizer: torch.optim.Optimizer, batches: list[Batch], clip: float = 0.0) -> bool:
    """As the loop takes it."""
    run = train_step if len(batches) == 1 else cached_step
    return bool(run(method, batches, optimizer, NOW, None, clip)["taken"])


class Reads(TorchFunctionMode):
    """Counts what brings a tensor's values to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.__name__ in ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy")
        return func(*args, **(kwargs or {}))


def test_all_that_is_told_comes_from_the_device_at_once(tmp_path: Path) -> None:
    """Each read lets a GPU run dry."""
    meter, said = log.Meter(), list[str]()
    watch = finite.Watch(3, tmp_path, torch.device("cpu"), str)
    for number, loss in enumerate((1.0, math.inf, 3.0)):
        numbers = {"loss": torch.tensor(loss), "taken": torch.tensor(math.isfinite(loss))}
        meter.add(finite.counted(numbers))
        watch.add(number + 1, numbers, [Batch((), None, torch.arange(2))])
    loader = SimpleNamespace(bad={4: "cut", 7: "no image"})
    with Reads() as reads:
        told = loop.means(meter, loader, torch.device("cpu"), watch, said.append)  # pyright: ignore[reportArgumentType]
        assert reads.number == 2, "one for all, one for the samples of the step that was not taken"
    assert told == {"loss": 2.0, "unreadable_images": 2.0, "skipped_steps": 1.0}
    assert [line.partition(",")[0] for line in said] == ["the loss is inf at step 2"]
    with Reads() as reads:
        assert float(torch.ones(())) == 1
    assert reads.number == 1


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_step_that_is_not_finite_leaves_no_trace_in_any_optimizer(
    name: str, cached: bool, clip: float, generator: torch.Generator, no_host_sync: AbstractContextManager[object]
) -> None:
    seen, never = build(name), build(name)
    for number in range(3):
        shares = [batch(generator, bad=bad) for bad in ((False, True) if cached else (True,))]
        before = state(*seen)
        with no_host_sync:
            run = cached_step if cached else train_step
            found = run(seen[0], shares, seen[1], NOW, None, clip)
        assert not found["taken"]
        after = state(*seen)
        assert equal(after["method"], before["method"])
        assert number == 0 or equal(after, before)  # an optimizer makes its zeros in the first step
        good = [batch(generator) for _ in shares]
        assert step(*seen, good, clip)
        assert step(*never, good, clip)
        assert equal(state(*seen), state(*never))


def test_a_loss_that_is_not_finite_is_not_stepped_though_its_gradient_is(generator: torch.Generator) -> None:
    method, optimizer = build("sgd")
    forward = method.forward

    def endless(*given: Any) -> Step:
        step = forward(*given)
        return Step(step.loss + math.inf, step.metrics)

    method.forward = endless
    before = state(method, optimizer)
    assert not step(method, optimizer, [batch(generator)])
    assert equal(state(method, optimizer), before)


def test_an_optimizer_that_cannot_leave_a_step_out_is_refused(generator: torch.Generator) -> None:
    method, _ = build("sgd")
    plain = torch.optim.SGD(method.parameters(), 0.1, foreach=True)
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(AssertionError, match="ignores found_inf"):
        train_step(method, [batch(generator)], plain, NOW, None)
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())


def on_this_rank(kind: str, seed: int) -> tuple[bool, bool, bool]:
    """A bad step, then a good one, with DDP: (the first was taken, it left a trace, the second was taken)."""
    generator = torch.Generator().manual_seed(seed)
    method, optimizer = build("lars")
    model = parallel.wrap(method, device=torch.device("cpu"))
    here = distributed.rank() == 1
    good, bad = batch(generator), batch(generator, bad=here and kind == "views")
    before = copy.deepcopy(method.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        if kind == "gradient" and here:  # of a parameter, after the averaging
            agreed = finite.agreed
            patch.setattr(finite, "agreed", lambda loss, norm: agreed(loss, norm * math.inf))
        first = train_step(model, [bad], optimizer, NOW, None)["taken"]
    trace = not equal(method.state_dict(), before)
    again = cached_step(model, [good, good], optimizer, NOW, None)["taken"]
    return bool(first), trace, bool(again)


@pytest.mark.parametrize("kind", ["views", "gradient"])
def test_what_is_not_finite_on_one_rank_is_stepped_on_none(ranks: RunOnRanks, kind: str) -> None:
    assert ranks(2, on_this_rank, kind, 7) == [(False, False, True)] * 2


# ---------------------------------------------------------------- a run

TRAINING = (
    "--data.backend torchvision --data.threads 0 --steps 12 --checkpoint.every 4 --optim.weight-decay-end 0.5 "
    "--optim.clip 0.5 --optim.layer-decay 0.8"
).split()


@contextmanager
def fault(steps: range, rank: int = 0, kind: str = "gradient") -> Generator[None]:
    """An infinite gradient, or loss, of SimCLR's embeddings in some of a process's steps, counted from 1."""
    real, count = simclr.Method.loss, itertools.count(1)

    def loss(method: simclr.Method, embedded: Embedded) -> Step:
        hit = next(count) in steps and distributed.rank() == rank
        if hit and kind == "gradient":
            embedded.compared[0].register_hook(lambda gradient: gradient * math.inf)
        step = real(method, embedded)
        return Step(step.loss * math.nan, step.metrics) if hit and kind == "loss" else step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr.Method, "loss", loss)
        yield


def saved(folder: Path) -> list[str]:
    """Names of the checkpoints, all of which are finite."""
    paths = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    for path in paths:
        assert not not_finite(checkpoint.load(path)), path
    return [path.name for path in paths]


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fault, with schedules."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(pretrain(folder, *TRAINING)) == 0
    return folder / "r"


@pytest.mark.parametrize(
    ("step", "kind", "keep", "left"),
    [
        (8, "gradient", 3, ["step_4"]),  # the step before a save
        (8, "loss", 1, ["step_4"]),
        (12, "gradient", 3, ["step_4", "step_8"]),  # the last one
        (3, "gradient", 3, []),
    ],
)
def test_a_run_stops_before_it_saves_what_is_not_finite(
    here: Run, tmp_path: Path, step: int, kind: str, keep: int, left: list[str], record_property: Record
) -> None:
    with fault(range(step, step + 1), kind=kind):
        code, err = here(*TRAINING, "--checkpoint.keep", str(keep))
    assert code == 76
    what = "the loss is nan" if kind == "loss" else "the gradient is not finite"
    last = f"the last checkpoint, {left[-1].replace('_', ' ')}" if left else "there is no checkpoint"
    is_one_line(err, f"{what} at step {step} ", "--optim.lr", "--on-nonfinite skip", last, "nonfinite.jsonl")
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("failed", 76)
    assert left == (saved(tmp_path / "r") if left else [])
    (line,) = skipped(tmp_path / "r")
    assert (line["step"], line["rank"], len(line["samples"])) == (step, 0, 16)
    assert here(*TRAINING, "--checkpoint.keep", str(keep), "--resume", "auto") == (0, "")
    assert saved(tmp_path / "r")[-1] == "step_12"
    record_property("figure", f"{kind} of step {step}, keep {keep}: exit code 76, 0 bad checkpoints, {left} left")


@pytest.mark.soak
def test_a_run_skips_a_few_steps_where_asked_to(here: Run, tmp_path: Path, whole: Path) -> None:
    """And moves no schedule: the steps after them have the learning rate and the weight decay of a run without."""
    with fault(range(7, 9)):
        assert here(*TRAINING, "--on-nonfinite", "skip", "--skip-steps", "2") == (0, "")
    assert saved(tmp_path / "r") == ["step_4", "step_8", "step_12"]
    assert [line["step"] for line in skipped(tmp_path / "r")] == [7, 8]
    lines = metrics(tmp_path / "r")
    assert [(line["step"], line["lr"], line["weight_decay"]) for line in lines] == [
        (line["step"], line["lr"], line["weight_decay"]) for line in metrics(whole)
    ]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [7, 8]
    assert len({line["weight_decay"] for line in lines}) == 12
    assert lines[-1]["skipped_steps"] == 2
    assert math.isfinite(lines[-1]["loss"])


def is_a_run_without_a_fault(run: Path, whole: Path) -> None:
    """In its weights, the state of its optimizer and its log, to the last bit."""
    assert same_training(run, whole)
    what_counts = ("step", "loss", "grad_norm", "weight_decay")
    logs = [[[line[name] for name in what_counts] for line in metrics(folder)] for folder in (run, whole)]
    assert logs[0] == logs[1]


@pytest.mark.soak
def test_a_restart_in_the_middle_of_a_weight_decay_schedule_changes_nothing(
    here: Run, tmp_path: Path, whole: Path
) -> None:
    with fault(range(7, 8)):
        assert here(*TRAINING)[0] == 76
    assert saved(tmp_path / "r") == ["step_4"]
    assert here(*TRAINING, "--resume", "auto") == (0, "")
    assert len(checkpoint.load(whole)["optimizer"]["param_groups"]) > 2
    is_a_run_without_a_fault(tmp_path / "r", whole)


def test_after_too_many_in_a_row_it_goes_back_and_ends_as_if_nothing_had_been(
    here: Run, tmp_path: Path, whole: Path
) -> None:
    with fault(range(6, 9)):
        assert here(*TRAINING, "--on-nonfinite", "skip", "--skip-steps", "2") == (0, "")
    is_a_run_without_a_fault(tmp_path / "r", whole)


def test_it_goes_back_only_once_to_the_same_checkpoint(here: Run, tmp_path: Path) -> None:
    with fault(range(6, 99)):
        code, err = here(*TRAINING, "--on-nonfinite", "skip", "--skip-steps", "1")
    assert code == 76
    is_one_line(err, "the gradient is not finite at step 6, as in the 1 steps before", "the last checkpoint, step 4")
    assert saved(tmp_path / "r") == ["step_4"]
    assert [line["step"] for line in skipped(tmp_path / "r")] == [6, 7, 5, 6]


def test_weights_that_became_infinite_are_not_saved(here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they did: with one checkpoint to keep, the good one stays."""
    real, count = finite.step_if, 0

    def broken(taken: Tensor, optimizer: torch.optim.Optimizer) -> None:
        nonlocal count
        real(taken, optimizer)
        if (count := count + 1) == 12:
            optimizer.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(finite, "step_if", broken)
    code, err = here(*TRAINING, "--checkpoint.keep", "1")
    assert code == 76
    is_one_line(err, "what is to be saved at step 12 is not finite (method.encoder", "the last checkpoint, step 8")
    assert saved(tmp_path / "r") == ["step_8"]


def run(folder: str, rank: int, kind: str, keep: str, flags: list[str]) -> tuple[str, int]:
    """(error, last step) on this rank of a run that meets a fault in step 8."""
    settings = load(pretrain(Path(folder), *TRAINING, "--checkpoint.keep", keep, *flags)[1:])
    position = loop.Position()
    with fault(range(8, 9), rank, kind):
        try:
            loop.pretrain(settings, distributed.init("cpu"), StopSignals(), position)
        except NonFiniteError as error:
            return str(error), position.step
    return "", position.step


@pytest.mark.parametrize(("rank", "kind", "keep"), [(1, "gradient", "3"), (0, "loss", "1"), (1, "loss", "3")])
def test_two_ranks_stop_together(
    ranks: RunOnRanks, tmp_path: Path, rank: int, kind: str, keep: str, record_property: Record
) -> None:
    (error, step), other = ranks(2, run, str(tmp_path), rank, kind, keep, [])
    assert other == (error, step)
    assert f"the loss is nan on rank {rank} at step 8 (" in error or kind == "gradient"
    assert (step, saved(tmp_path / "r")) == (8, ["step_4"])
    first, second = skipped(tmp_path / "r")
    assert (first["rank"], second["rank"]) == (0, 1)
    assert not set(first["samples"]) & set(second["samples"])
    record_property("figure", f"{kind} on rank {rank}, step 8: both ranks stop there, 0 bad checkpoints, step 4 left")


@pytest.mark.soak
def test_two_ranks_skip_together(ranks: RunOnRanks, tmp_path: Path) -> None:
    flags = ["--on-nonfinite", "skip"]
    assert ranks(2, run, str(tmp_path), 1, "gradient", "9", flags) == [("", 12)] * 2
    assert saved(tmp_path / "r") == ["step_4", "step_8", "step_12"]


# ---------------------------------------------------------------- what is loaded


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(here: Run, tmp_path: Path, whole: Path) -> None:
    """As an older sslx left them."""
    shutil.copytree(whole, tmp_path / "r")
    bad = checkpoint.load(tmp_path / "r")
    bad["method"]["projector.0.weight"][0, 0] = math.nan
    checkpoint.save(tmp_path / "r", 12, bad, keep=3)
    assert here(*TRAINING, "--resume", "auto") == (0, "")
    assert not not_finite(checkpoint.load(tmp_path / "r" / "checkpoints" / "step_12"))


def test_initial_weights_that_are_not_finite_are_refused_as_such(here: Run, tmp_path: Path, whole: Path) -> None:
    weights = checkpoint.load(whole)["method"]
    trunk = {k.removeprefix("encoder.trunk."): v for k, v in weights.items() if k.startswith("encoder.trunk.")}
    trunk["conv1.weight"][0] = math.nan
    torch.save(trunk, tmp_path / "weights.pt")
    code, err = here(*TRAINING, "--encoder.weights", tmp_path / "weights.pt")
    assert code == 65
    is_one_line(err, "weights.pt contains values that are not finite in 1 tensor", "use other weights")
    assert not (tmp_path / "r").exists()
