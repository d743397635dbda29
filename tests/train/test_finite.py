"""What is not finite is neither stepped nor saved: every method and optimizer, one rank and two, stop and skip."""

import copy
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kit.processes import TINY, Record, is_one_line, metrics
from sslx import distributed, encoders, optim, parallel, rng
from sslx.config import load
from sslx.data.batch import Batch
from sslx.errors import NonFiniteError
from sslx.methods import simclr
from sslx.methods.base import Embedded, Method, Step
from sslx.runs import checkpoint, log, records
from sslx.runs.state import not_finite
from sslx.train import finite
from sslx.train.pretrain import Position, means, pretrain
from sslx.train.signals import StopSignals
from sslx.train.step import cached_step, train_step

Run = Callable[..., tuple[int, str]]
FLAGS = [
    "--source.name", "digits", "--data.size", "16", "--batch-size", "8",
    "--encoder.layers", "1", "1", "1", "1", "--encoder.channels", "8", "8", "8", "8",
]  # fmt: skip
NOW = 0.3


def build(optimizer: str) -> tuple[Method, torch.optim.Optimizer]:
    settings = load([*FLAGS, "--optim.name", optimizer, "--optim.weight-decay", "0.1"])
    rng.seed_torch(0)
    heads = simclr.Config(hidden_dim=16, projection_dim=8)
    method = heads.build(encoders.build(settings.encoder, 16))
    return method, optim.build(settings.optim, method)


def batch(generator: torch.Generator, *, bad: bool = False) -> Batch:
    views = tuple(torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2))
    if bad:
        views[0][3, 0, 0, 0] = math.inf
    return Batch(views, torch.arange(8) % 4, torch.arange(8))


def state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"method": method.state_dict(), "optimizer": optimizer.state_dict()["state"]})


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


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
        told = means(meter, loader, torch.device("cpu"), watch, said.append)  # pyright: ignore[reportArgumentType]
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
    good = batch(generator)
    shares = [good, batch(generator, bad=here and kind == "views")]
    if kind == "gradient" and here:  # of a parameter, after the averaging
        real = finite.agreed
        finite.agreed = lambda loss, norm: real(loss, norm * math.inf)
    try:
        before = copy.deepcopy(method.state_dict())
        first = train_step(model, shares[1:], optimizer, NOW, None)["taken"]
        trace = not equal(method.state_dict(), before)
    finally:
        if kind == "gradient" and here:
            finite.agreed = real
    again = cached_step(model, [good, good], optimizer, NOW, None)["taken"]
    return bool(first), trace, bool(again)


@pytest.mark.parametrize("kind", ["views", "gradient"])
def test_what_is_not_finite_on_one_rank_is_stepped_on_none(ranks, kind: str) -> None:
    assert ranks(2, on_this_rank, kind, 7) == [(False, False, True)] * 2


# ---------------------------------------------------------------- a run

TRAINING = "--data.backend torchvision --data.threads 0 --steps 12 --checkpoint.every 4 --log.every 20".split()


class Fault:
    """An infinite gradient, or loss, of SimCLR's embeddings in some of a process's steps, counted from 1."""

    def __init__(self, steps: range, rank: int = 0, kind: str = "gradient") -> None:
        self.steps, self.rank, self.kind, self.count = steps, rank, kind, 0
        self.real = simclr.Method.loss

    def __enter__(self) -> None:
        def loss(method: simclr.Method, embedded: Embedded) -> Step:
            self.count += 1
            hit = self.count in self.steps and distributed.rank() == self.rank
            if hit and self.kind == "gradient":
                embedded.compared[0].register_hook(lambda gradient: gradient * math.inf)
            step = self.real(method, embedded)
            return Step(step.loss * math.nan, step.metrics) if hit and self.kind == "loss" else step

        simclr.Method.loss = loss

    def __exit__(self, *_: object) -> None:
        simclr.Method.loss = self.real


def saved(folder: Path) -> list[str]:
    """Names of the checkpoints, all of which are finite."""
    paths = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    for path in paths:
        assert not not_finite(checkpoint.load(path)), path
    return [path.name for path in paths]


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


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
    with Fault(range(step, step + 1), kind=kind):
        code, err = here(*TRAINING, "--checkpoint.keep", str(keep))
    assert code == 76
    what = "the loss is nan" if kind == "loss" else "the gradient is not finite"
    last = f"the last checkpoint, {left[-1].replace('_', ' ')}" if left else "there is no checkpoint"
    is_one_line(err, f"{what} at step {step} ", "--optim.lr", "--on-nonfinite skip", last, "nonfinite.jsonl")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.code) == ("failed", 76)
    assert left == (saved(tmp_path / "r") if left else [])
    (line,) = skipped(tmp_path / "r")
    assert (line["step"], line["rank"], len(line["samples"])) == (step, 0, 16)
    assert here(*TRAINING, "--checkpoint.keep", str(keep), "--resume", "auto") == (0, "")
    assert saved(tmp_path / "r")[-1] == "step_12"
    record_property("figure", f"{kind} of step {step}, keep {keep}: exit code 76, 0 bad checkpoints, {left} left")


def test_a_run_skips_a_few_steps_where_asked_to(here: Run, tmp_path: Path) -> None:
    with Fault(range(7, 9)):
        assert here(*TRAINING, "--on-nonfinite", "skip", "--skip-steps", "2") == (0, "")
    assert saved(tmp_path / "r") == ["step_4", "step_8", "step_12"]
    assert [line["step"] for line in skipped(tmp_path / "r")] == [7, 8]
    last = metrics(tmp_path / "r")[-1]
    assert last["skipped_steps"] == 2
    assert math.isfinite(last["loss"])


SCHEDULES = "--optim.weight-decay-end 0.5 --optim.clip 0.5 --optim.layer-decay 0.8 --log.every 1".split()


def test_a_step_that_is_skipped_moves_no_schedule(here: Run, tmp_path: Path) -> None:
    """The steps after it have the learning rate and the weight decay that they have without it."""
    assert here(*TRAINING, *SCHEDULES, "--name", "whole") == (0, "")
    with Fault(range(7, 9)):
        assert here(*TRAINING, *SCHEDULES, "--on-nonfinite", "skip") == (0, "")
    whole, skips = ({line["step"]: line for line in metrics(tmp_path / name)} for name in ("whole", "r"))
    assert whole.keys() == skips.keys() == set(range(1, 13))
    for number, line in skips.items():
        assert (line["lr"], line["weight_decay"]) == (whole[number]["lr"], whole[number]["weight_decay"])
        assert (line["grad_norm"] is None) == (number in (7, 8))
    assert len({line["weight_decay"] for line in skips.values()}) == 12


def test_a_restart_in_the_middle_of_a_weight_decay_schedule_changes_nothing(here: Run, tmp_path: Path) -> None:
    assert here(*TRAINING, *SCHEDULES, "--name", "whole") == (0, "")
    with Fault(range(7, 8)):
        assert here(*TRAINING, *SCHEDULES)[0] == 76
    assert saved(tmp_path / "r") == ["step_4"]
    assert here(*TRAINING, *SCHEDULES, "--resume", "auto") == (0, "")
    whole, resumed = (checkpoint.load(tmp_path / name) for name in ("whole", "r"))
    assert len(whole["optimizer"]["param_groups"]) > 2
    for part in ("method", "optimizer", "loader"):
        assert equal(resumed[part], whole[part]), part
    lines = [
        [(line["step"], line["loss"], line["grad_norm"], line["weight_decay"]) for line in metrics(tmp_path / name)]
        for name in ("whole", "r")
    ]
    assert lines[0] == lines[1]


def test_after_too_many_in_a_row_it_goes_back_and_ends_as_if_nothing_had_been(here: Run, tmp_path: Path) -> None:
    assert here(*TRAINING, "--name", "whole") == (0, "")
    with Fault(range(6, 9)):
        assert here(*TRAINING, "--on-nonfinite", "skip", "--skip-steps", "2") == (0, "")
    whole, back = (checkpoint.load(tmp_path / name) for name in ("whole", "r"))
    for part in ("method", "optimizer", "loader"):
        assert equal(back[part], whole[part]), part
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path / "r")][-1] == (
        [(line["step"], line["loss"]) for line in metrics(tmp_path / "whole")][-1]
    )


def test_it_goes_back_only_once_to_the_same_checkpoint(here: Run, tmp_path: Path) -> None:
    with Fault(range(6, 99)):
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
    settings = load([*TINY, *TRAINING, "--runs", folder, "--name", "r", "--checkpoint.keep", keep, *flags])
    position = Position()
    with Fault(range(8, 9), rank, kind):
        try:
            pretrain(settings, distributed.init("cpu"), StopSignals(), position)
        except NonFiniteError as error:
            return str(error), position.step
    return "", position.step


@pytest.mark.parametrize(("rank", "kind", "keep"), [(1, "gradient", "3"), (0, "loss", "1"), (1, "loss", "3")])
def test_two_ranks_stop_together(
    ranks, tmp_path: Path, rank: int, kind: str, keep: str, record_property: Record
) -> None:
    (error, step), other = ranks(2, run, str(tmp_path), rank, kind, keep, [])
    assert other == (error, step)
    assert f"the loss is nan on rank {rank} at step 8 (" in error or kind == "gradient"
    assert (step, saved(tmp_path / "r")) == (8, ["step_4"])
    first, second = skipped(tmp_path / "r")
    assert (first["rank"], second["rank"]) == (0, 1)
    assert not set(first["samples"]) & set(second["samples"])
    record_property("figure", f"{kind} on rank {rank}, step 8: both ranks stop there, 0 bad checkpoints, step 4 left")


def test_two_ranks_skip_together(ranks, tmp_path: Path) -> None:
    flags = ["--on-nonfinite", "skip"]
    assert ranks(2, run, str(tmp_path), 1, "gradient", "9", flags) == [("", 12)] * 2
    assert saved(tmp_path / "r") == ["step_4", "step_8", "step_12"]


# ---------------------------------------------------------------- what is loaded


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(here: Run, tmp_path: Path) -> None:
    """As an older sslx left them."""
    assert here(*TRAINING) == (0, "")
    bad = checkpoint.load(tmp_path / "r")
    bad["method"]["projector.0.weight"][0, 0] = math.nan
    checkpoint.save(tmp_path / "r", 12, bad, keep=3)
    assert here(*TRAINING, "--resume", "auto") == (0, "")
    assert not not_finite(checkpoint.load(tmp_path / "r" / "checkpoints" / "step_12"))


def test_initial_weights_that_are_not_finite_are_refused_as_such(here: Run, tmp_path: Path) -> None:
    assert here(*TRAINING, "--name", "first") == (0, "")
    weights = checkpoint.load(tmp_path / "first")["method"]
    trunk = {k.removeprefix("encoder.trunk."): v for k, v in weights.items() if k.startswith("encoder.trunk.")}
    trunk["conv1.weight"][0] = math.nan
    torch.save(trunk, tmp_path / "weights.pt")
    code, err = here(*TRAINING, "--encoder.weights", tmp_path / "weights.pt")
    assert code == 65
    is_one_line(err, "weights.pt contains values that are not finite in 1 tensor", "use other weights")
    assert not (tmp_path / "r").exists()
