"""``sslx verify``: W processes with a share of the batch each train as one process with all of it does, or not.

Real processes (gloo on CPUs, NCCL where there are enough GPUs), the real loader, sync batch norm, DDP and optimizer.
Methods are made narrow, everything else is what ``sslx pretrain`` runs.
"""

import dataclasses
import itertools
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sslx import cli, config, distributed, methods
from sslx.config import PretrainConfig, VerifyConfig
from sslx.distributed import Ranks
from sslx.errors import ConfigError
from sslx.methods.config import MethodConfig
from sslx.train import launch
from sslx.train.build import build
from sslx.train.step import train_step

BATCH_SIZE = 24
RUNS = (("fp64", "sgd", 3), ("fp64", "lars", 3), ("fp32", "sgd", 1))
"""(precision, optimizer, steps) of what is compared."""
SIZE = {"fp64": "16", "fp32": "32"}
"""Pixels: fp64's convolutions are slow, and of 16 fp32's batch norms have too few values for its tolerance."""
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
FLOOR = {"fp64": 1e-4, "fp32": 1e-2}
"""A tensor's error is relative to itself, or to this share of all tensors together where it is smaller: what is zero
but for rounding, as the gradient of a bias before a batch norm, is nothing to compare.  With the tolerance that is
1e-14 of all, what rounding leaves of such a gradient behind a ViT and two norms."""
PARTS = ("loss", "gradients", "batch norm", "other state", "parameters")
SETTINGS = [
    "--source.name", "synthetic", "--source.num-samples", "96", "--data.threads", "1",
    "--batch-norm", "sync", "--batch-size", str(BATCH_SIZE), "--augment.min-scale", "0.3", "--compile", "off",
    "--augment.flip", "0.5", "--augment.jitter", "0.8", "--augment.brightness", "0.8", "--augment.contrast", "0.8",
    "--augment.saturation", "0.8", "--augment.hue", "0.2", "--augment.gray", "0.2", "--augment.blur", "0.5",
    "--augment.solarize", "0", "--augment.interpolation", "bilinear",
    "--optim.lr", "0.1", "--optim.weight-decay", "1e-4", "--optim.lr-scaling", "none", "--optim.warmup", "0",
]  # fmt: skip
ENCODERS = {
    "resnet": ["--encoder.name", "resnet18", "--encoder.layers", *"1111", "--encoder.channels", "8", "8", "16", "16"],
    "vit": ["--encoder.name", "vit_tiny_patch16_224", "--encoder.patch", "4", "--encoder.layers", "2",
            "--encoder.channels", "64"],
}  # fmt: skip
"""Small encoders of each kind that a method may be for (``methods.encoders``)."""
_FOLDER = "SSLX_VERIFY_FOLDER"
_WIDEST = 16

State = dict[str, list[dict[str, Tensor]]]
"""Of each of ``PARTS`` what there is after each step, by name; of the last two after the last step only."""
Key = tuple[str, str, str, str]
"""(method, encoder, precision, optimizer)."""


def main(argv: Sequence[str], wanted: VerifyConfig) -> int:
    """Run one process, then W, and compare; 0 where all agree, 1 where not.  wanted: what argv says."""
    names = wanted.methods or methods.available()
    if distributed.launched_rank() is not None:
        return _work(wanted, names)
    for world_size in wanted.ranks:
        if world_size < 2 or BATCH_SIZE % world_size:
            raise ConfigError(f"--ranks must be 2 or more and divide {BATCH_SIZE}, got {world_size}")
    sys.stderr.write(f"training {', '.join(names)} on {', '.join(map(str, (1, *wanted.ranks)))} processes\n")
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, *wanted.ranks):
            started = time.perf_counter()
            out = Path(folder) / str(world_size)
            out.mkdir()
            os.environ[_FOLDER] = str(out)
            code = launch.start([*argv, "--device", _device(wanted)], world_size, "verify")
            if code:
                return code
            spent = time.perf_counter() - started
            sys.stderr.write(
                "\x1b[K" * sys.stderr.isatty() + f"{world_size} process{'es' * (world_size > 1)}: {spent:.0f} s\n"
            )
        return _report(wanted, names, Path(folder))


def _device(wanted: VerifyConfig) -> str:
    gpus = torch.cuda.device_count() if wanted.device != "cpu" else 0
    if wanted.device == "cuda" and gpus < max(wanted.ranks):
        raise ConfigError(f"{max(wanted.ranks)} ranks need as many GPUs, got {gpus}: take --ranks or --device cpu")
    return "cuda" if gpus >= max(wanted.ranks) else "cpu"


def _work(wanted: VerifyConfig, names: Sequence[str]) -> int:
    """Be one rank: train each method a few steps and leave what came out in a file.

    What fails on one process is put down, and left out on several; what fails on one of several ends them.
    """
    ranks = distributed.init(wanted.device)
    folder = Path(os.environ[_FOLDER])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TF32 acceleration")  # said by the flags below, which do not ask for it
    found: dict[Key, State | str] = {}
    if ranks.world_size > 1:
        found = {
            key: state for key, state in torch.load(folder.parent / "1" / "0.pt").items() if isinstance(state, str)
        }
    # oneDNN takes another algorithm for another batch size, whose fp32 rounding can push a ReLU over its kink.
    with torch.backends.mkldnn.flags(enabled=False):
        for (name, encoder), (precision, optimizer, steps) in itertools.product(_pairs(names), RUNS):
            key = name, encoder, precision, optimizer
            if key in found:
                continue
            if ranks.is_main and sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{name} on a {encoder}, {precision} {optimizer}\r")
            flags = [*SETTINGS, *ENCODERS[encoder], "--method.name", name]
            settings = config.load(
                [*flags, "--data.size", SIZE[precision], "--precision", precision, "--optim.name", optimizer]
            )
            settings = dataclasses.replace(settings, method=narrow(settings.method))
            try:
                with _InFP64():
                    found[key] = train(settings, ranks, steps)
            except Exception as error:  # of somebody's method: the others are still looked at
                if launch.lost_peer(error):  # which says why
                    return cli.EXIT_CRASH
                traceback.print_exc()
                found[key] = words = traceback.format_exception_only(error)[0].splitlines()[0]
                if ranks.world_size > 1:
                    where = f"on rank {ranks.rank} of {ranks.world_size}, and not on one process"
                    return cli.complain(f"{name} on a {encoder} failed {where}: {words}", cli.EXIT_CRASH)
    torch.save(found, folder / f"{ranks.rank}.pt")
    distributed.shutdown()
    return 0


class _InFP64(TorchFunctionMode):
    """``float()`` leaves fp64 alone: timm interpolates a ViT's position embeddings by it, for crops of another size."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, encoder) for name in names for encoder in methods.encoders(name)]


def narrow(method: MethodConfig) -> MethodConfig:
    """The method's config with every ``_dim`` field 16 at most, and a queue where it can have one."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    changes = {name: min(width, _WIDEST) for name, width in fields.items() if name.endswith("_dim")}
    changes |= {"queue_size": BATCH_SIZE} if fields.get("queue_size") == 0 else {}
    return dataclasses.replace(method, **changes)


def train(settings: PretrainConfig, ranks: Ranks, steps: int) -> State:
    """What ``sslx pretrain`` does in the first steps, and what comes of it."""
    parts = build(settings, ranks, lambda _: None)
    parts.plan.schedule.apply(parts.optimizer, 0.0)  # the peak: there is no warm-up
    trained = {name: p for name, p in parts.method.named_parameters() if p.requires_grad}
    found: State = {part: [] for part in PARTS}
    for step in range(steps):
        progress = (step + 0.5) / 10
        metrics = train_step(parts.model, [next(parts.loader)], parts.optimizer, progress, parts.plan.autocast)
        found["loss"].append({"loss": distributed.mean_over_ranks(metrics["loss"]).cpu()})
        found["gradients"].append({name: _kept(p.grad) for name, p in trained.items() if p.grad is not None})
    parts.loader.close()
    state = {name: _kept(value) for name, value in parts.method.state_dict().items() if value.is_floating_point()}
    running = {name for name in state if name.endswith(("running_mean", "running_var"))}
    found["parameters"].append({name: value for name, value in state.items() if name in trained})
    found["batch norm"].append({name: state[name] for name in running})
    found["other state"].append({n: v for n, v in state.items() if n not in trained and n not in running})
    return found


def _kept(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def worst(
    found: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], floor: float
) -> tuple[float, str]:
    """(the largest |a - b| / max(|b|, floor · |all b|) of any tensor at any step, its name); nan is the largest."""
    largest, where = 0.0, ""
    if len(found) != len(truth):
        return float("nan"), "number of steps"
    for a, b in zip(found, truth, strict=True):
        if a.keys() != b.keys():
            return float("nan"), min(a.keys() ^ b.keys())
        least = floor * sum(float(value.double().norm()) ** 2 for value in b.values()) ** 0.5
        for name, value in b.items():
            size = max(float(value.double().norm()), least)
            apart = float((a[name].double() - value.double()).norm())
            error = apart / size if size else apart
            if math.isnan(error):
                return error, name
            if error > largest:
                largest, where = error, name
    return largest, where


def _report(wanted: VerifyConfig, names: Sequence[str], folder: Path) -> int:
    """The table, and what is behind each cell that is not right."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="largest error of several processes against one", title_justify="left")
    parts = PARTS if console.width >= 110 else ("loss", "grads", "norms", "state", "weights")
    table.padding = (0, 1) if console.width >= 110 else (0, 0)
    for column in ("method", "encoder", "ranks", "in", *parts, ""):
        table.add_column(column, justify="left" if column in ("method", "encoder", "in", "") else "right")
    truth: dict[Key, State | str] = torch.load(folder / "1" / "0.pt")
    complaints: list[str] = []
    found = {w: [torch.load(folder / str(w) / f"{rank}.pt") for rank in range(w)] for w in wanted.ranks}
    for name, encoder in _pairs(names):
        for world_size, each in found.items():
            for key in [key for key in truth if key[:2] == (name, encoder)]:
                row, problem = _row([states[key] for states in each], truth[key], key[2])
                run = f"{key[2]} {key[3]}"
                complaints += [f"{name} on a {encoder}, {world_size} ranks, {run}: {problem}"] if problem else []
                table.add_row(name, encoder, str(world_size), run, *row, "wrong" if problem else "ok")
    console.print(table)
    for complaint in complaints:
        sys.stdout.write(complaint + "\n")
    limits = ", ".join(f"{limit:g} in {precision}" for precision, limit in TOLERANCE.items())
    sys.stdout.write(f"{'NOT equivalent' if complaints else 'equivalent'} (tolerance {limits}; fp32: one step)\n")
    return 1 if complaints else 0


def _row(each: Sequence[State | str], truth: State | str, precision: str) -> tuple[list[str], str]:
    """(a cell for each of PARTS, what is wrong) of all ranks' states."""
    tolerance, floor = TOLERANCE[precision], FLOOR[precision]
    failed = next((state for state in (truth, *each) if isinstance(state, str)), None)
    if failed is not None:
        return ["-"] * len(PARTS), failed
    assert not isinstance(truth, str)
    cells: list[str] = []
    wrong: list[str] = []
    for part in PARTS:
        there = any(truth[part])
        errors = [worst(state[part], truth[part], floor) for state in each if not isinstance(state, str)]
        error, name = max(errors, key=lambda found: math.inf if math.isnan(found[0]) else found[0])
        cells.append(f"{error:.0e}" if there else "-")
        if not error <= tolerance:
            wrong.append(f"{part} {error:.1e} ({name})")
    return cells, ", ".join(wrong)
