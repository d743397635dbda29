"""``sslx verify``: check that W processes, each with a part of the batch, train as one process with the whole batch.

It uses real processes (gloo on CPUs, NCCL if there are enough GPUs) and the loader, synchronized batch norm, DDP and
optimizer of ``sslx pretrain``.  Only the methods' layers are narrower.
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
from sslx.console.words import plural
from sslx.distributed import Ranks
from sslx.errors import ConfigError
from sslx.methods.config import MethodConfig
from sslx.train import launch
from sslx.train.build import build
from sslx.train.step import train_step

BATCH_SIZE = 24
RUNS = (("fp64", "sgd", 3), ("fp64", "lars", 3), ("fp32", "sgd", 1))
"""The (precision, optimizer, steps) of the runs that are compared."""
SIZE = {"fp64": "16", "fp32": "32"}
"""Side of the views in pixels.  Convolutions in fp64 are slow; with 16 pixels, batch norms have too few values for the
tolerance of fp32."""
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5}
MIN_NORM_FRACTION = {"fp64": 1e-4, "fp32": 1e-2}
"""A tensor's error is relative to its norm, or to this fraction of the norm of all tensors together if that is larger.
A gradient that is zero up to rounding, such as that of a bias before batch norm, has no meaningful relative error.
With the tolerance, 1e-14 of the norm of all is allowed, which is what rounding leaves behind a ViT and two norms."""
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
"""A small encoder of each kind that a method may be tested with (``methods.encoders``)."""
_FOLDER = "SSLX_VERIFY_FOLDER"
_MAX_WIDTH = 16

State = dict[str, list[dict[str, Tensor]]]
"""The tensors of each of ``PARTS`` by name: one dict per step, but only one, after the last step, for all except loss
and gradients."""
Key = tuple[str, str, str, str]
"""(method, encoder, precision, optimizer)."""


def main(argv: Sequence[str], options: VerifyConfig) -> int:
    """Run one process, then W, and compare; return 0 if all agree, else 1.  options: the parsed argv."""
    names = options.methods or methods.available()
    if distributed.launched_rank() is not None:
        return _run_rank(options, names)
    for world_size in options.ranks:
        if world_size < 2 or BATCH_SIZE % world_size:
            raise ConfigError(f"--ranks: expected 2 or more, and a divisor of {BATCH_SIZE}, got {world_size}")
    sys.stderr.write(f"training {', '.join(names)} on {', '.join(map(str, (1, *options.ranks)))} processes\n")
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, *options.ranks):
            start = time.perf_counter()
            out = Path(folder) / str(world_size)
            out.mkdir()
            os.environ[_FOLDER] = str(out)
            code = launch.start([*argv, "--device", _device(options)], world_size, "verify")
            if code:
                return code
            duration_s = time.perf_counter() - start
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[K")
            sys.stderr.write(f"{plural(world_size, 'process', 'processes')}: {duration_s:.0f} s\n")
        return _report(options, names, Path(folder))


def _device(options: VerifyConfig) -> str:
    gpus = torch.cuda.device_count() if options.device != "cpu" else 0
    if options.device == "cuda" and gpus < max(options.ranks):
        raise ConfigError(f"{max(options.ranks)} ranks need as many GPUs, got {gpus}: take --ranks or --device cpu")
    return "cuda" if gpus >= max(options.ranks) else "cpu"


def _run_rank(options: VerifyConfig, names: Sequence[str]) -> int:
    """Run one rank: train each method for a few steps and save the results in a file.

    A failure on one process is recorded, and its run is skipped on several; a failure on one of several ends them all.
    """
    ranks = distributed.init(options.device)
    folder = Path(os.environ[_FOLDER])
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message="TF32 acceleration"
    )  # the flags below cause it, though they do not change TF32
    results: dict[Key, State | str] = {}
    if ranks.world_size > 1:
        results = {
            key: state for key, state in torch.load(folder.parent / "1" / "0.pt").items() if isinstance(state, str)
        }
    # oneDNN chooses its algorithm by the batch size; another one's rounding in fp32 can change the sign at a ReLU.
    with torch.backends.mkldnn.flags(enabled=False):
        for (name, encoder), (precision, optimizer, steps) in itertools.product(_pairs(names), RUNS):
            key = name, encoder, precision, optimizer
            if key in results:
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
                    results[key] = train(settings, ranks, steps)
            except Exception as error:  # in a user's method: the others are still checked
                if launch.lost_peer(error):  # that rank has reported the reason
                    return cli.EXIT_CRASH
                traceback.print_exc()
                results[key] = message = traceback.format_exception_only(error)[0].splitlines()[0]
                if ranks.world_size > 1:
                    where = f"on rank {ranks.rank} of {ranks.world_size}, and not on one process"
                    return cli.complain(f"{name} on a {encoder} failed {where}: {message}", cli.EXIT_CRASH)
    torch.save(results, folder / f"{ranks.rank}.pt")
    distributed.shutdown()
    return 0


class _InFP64(TorchFunctionMode):
    """Keeps ``float()`` from converting fp64: timm calls it on position embeddings when it resizes them for a crop."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, encoder) for name in names for encoder in methods.encoders(name)]


def narrow(method: MethodConfig) -> MethodConfig:
    """Return the method's config with every ``_dim`` field at most 16, and with a queue if the method supports one."""
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    changes = {name: min(width, _MAX_WIDTH) for name, width in fields.items() if name.endswith("_dim")}
    if fields.get("queue_size") == 0:
        changes["queue_size"] = BATCH_SIZE
    return dataclasses.replace(method, **changes)


def train(settings: PretrainConfig, ranks: Ranks, steps: int) -> State:
    """Take the first steps of ``sslx pretrain`` and return the tensors after them."""
    parts = build(settings, ranks, lambda _: None)
    parts.plan.schedule.apply(parts.optimizer, 0.0)  # at the peak, because there is no warmup
    trained = {name: p for name, p in parts.method.named_parameters() if p.requires_grad}
    results: State = {part: [] for part in PARTS}
    for step in range(steps):
        progress = (step + 0.5) / 10
        metrics = train_step(parts.model, [next(parts.loader)], parts.optimizer, progress, parts.plan.autocast)
        results["loss"].append({"loss": distributed.mean_over_ranks(metrics["loss"]).cpu()})
        results["gradients"].append({name: _cpu_copy(p.grad) for name, p in trained.items() if p.grad is not None})
    parts.loader.close()
    state = {name: _cpu_copy(value) for name, value in parts.method.state_dict().items() if value.is_floating_point()}
    running = {name for name in state if name.endswith(("running_mean", "running_var"))}
    results["parameters"].append({name: value for name, value in state.items() if name in trained})
    results["batch norm"].append({name: state[name] for name in running})
    results["other state"].append({n: v for n, v in state.items() if n not in trained and n not in running})
    return results


def _cpu_copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def worst(
    states: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]], min_fraction: float
) -> tuple[float, str]:
    """Return the largest error of a tensor at any step, and the tensor's name.

    The error of a is |a - b| / max(|b|, min_fraction * |all b|), where b is its value in ``truth``; nan is the largest.
    """
    largest, where = 0.0, ""
    if len(states) != len(truth):
        return float("nan"), "number of steps"
    for a, b in zip(states, truth, strict=True):
        if a.keys() != b.keys():
            return float("nan"), min(a.keys() ^ b.keys())
        min_norm = min_fraction * sum(float(value.double().norm()) ** 2 for value in b.values()) ** 0.5
        for name, value in b.items():
            norm = max(float(value.double().norm()), min_norm)
            distance = float((a[name].double() - value.double()).norm())
            error = distance / norm if norm else distance
            if math.isnan(error):
                return error, name
            if error > largest:
                largest, where = error, name
    return largest, where


def _report(options: VerifyConfig, names: Sequence[str], folder: Path) -> int:
    """Print the table of errors and a line for each run that differs; return the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="largest error of several processes against one", title_justify="left")
    parts = PARTS if console.width >= 110 else ("loss", "grads", "norms", "state", "weights")
    table.padding = (0, 1) if console.width >= 110 else (0, 0)
    for column in ("method", "encoder", "ranks", "in", *parts, ""):
        table.add_column(column, justify="left" if column in ("method", "encoder", "in", "") else "right")
    truth: dict[Key, State | str] = torch.load(folder / "1" / "0.pt")
    problems: list[str] = []
    states = {w: [torch.load(folder / str(w) / f"{rank}.pt") for rank in range(w)] for w in options.ranks}
    for name, encoder in _pairs(names):
        for world_size, of_ranks in states.items():
            for key in [key for key in truth if key[:2] == (name, encoder)]:
                row, problem = _row([state[key] for state in of_ranks], truth[key], key[2])
                run = f"{key[2]} {key[3]}"
                if problem:
                    problems.append(f"{name} on a {encoder}, {world_size} ranks, {run}: {problem}")
                table.add_row(name, encoder, str(world_size), run, *row, "wrong" if problem else "ok")
    console.print(table)
    for problem in problems:
        sys.stdout.write(problem + "\n")
    limits = ", ".join(f"{limit:g} in {precision}" for precision, limit in TOLERANCE.items())
    sys.stdout.write(f"{'NOT equivalent' if problems else 'equivalent'} (tolerance {limits}; fp32: one step)\n")
    return 1 if problems else 0


def _row(states: Sequence[State | str], truth: State | str, precision: str) -> tuple[list[str], str]:
    """Return a cell for each of PARTS with the largest error of all ranks, and what differs, in words, or ""."""
    tolerance, min_fraction = TOLERANCE[precision], MIN_NORM_FRACTION[precision]
    failed = next((state for state in (truth, *states) if isinstance(state, str)), None)
    if failed is not None:
        return ["-"] * len(PARTS), failed
    assert not isinstance(truth, str)
    cells: list[str] = []
    differences: list[str] = []
    for part in PARTS:
        errors = [worst(state[part], truth[part], min_fraction) for state in states if not isinstance(state, str)]
        error, name = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        cells.append(f"{error:.0e}" if any(truth[part]) else "-")
        if not error <= tolerance:
            differences.append(f"{part} {error:.1e} ({name})")
    return cells, ", ".join(differences)
