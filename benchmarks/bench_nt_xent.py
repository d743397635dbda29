"""NT-Xent forward and backward beside its peers, in turns: time, share of the machine's matrix rate, and memory.

    python benchmarks/bench_nt_xent.py                        (time at each batch size, then memory)
    python benchmarks/bench_nt_xent.py --batch-sizes 1024 --windows 9

Each arm is checked against fp64 before it is timed.  The rate counts 5·N²·D operations, N = 2B, whatever an arm does;
the matrix rate is that of 4096 × 4096 products in the same run.  Memory is the peak RSS of a fresh process over the
same process without the loss, each after a warm-up at a small batch.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx import measure
from sslx.losses import nt_xent

RESULTS = Path(__file__).parent / "results" / "nt_xent.jsonl"
Loss = Callable[[Tensor, Tensor], Tensor]
MEMORY_LIMITS = {4096: 64, 16384: 256}
"""MiB, by batch size."""


def dense(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """What people write: softmax cross-entropy over the N×N similarities."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def arms(temperature: float, compiled: bool) -> dict[str, Loss]:
    """The peers that are installed, each a function of (z1, z2)."""
    found: dict[str, Loss] = {
        "sslx": lambda z1, z2: nt_xent(z1, z2, temperature),
        "dense eager": lambda z1, z2: dense(z1, z2, temperature),
    }
    if compiled:
        fast = torch.compile(dense)
        found["dense torch.compile"] = lambda z1, z2: fast(z1, z2, temperature)
    try:
        lightly = import_module("lightly.loss").NTXentLoss(temperature=temperature)
        found["lightly NTXentLoss"] = lightly
    except ImportError:
        print("lightly is not installed (pip install -e .[bench]): left out")
    try:
        metric_learning = import_module("pytorch_metric_learning.losses").SupConLoss(temperature=temperature)
    except ImportError:
        print("pytorch-metric-learning is not installed (pip install -e .[bench]): left out")
    else:

        def sup_con(z1: Tensor, z2: Tensor) -> Tensor:
            label = torch.arange(len(z1), device=z1.device).repeat(2)
            return metric_learning(torch.cat([z1, z2]), label)

        found["pytorch-metric-learning SupConLoss"] = sup_con
    return found


def embeddings(batch_size: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two views' embeddings, as far apart as those of a network in training."""
    generator = torch.Generator().manual_seed(batch_size)
    z = torch.randn(batch_size, dim, generator=generator)
    z1, z2 = (z + 0.7 * torch.randn(batch_size, dim, generator=generator) for _ in range(2))
    return z1.to(device).requires_grad_(), z2.to(device).requires_grad_()


def run(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    """Forward and backward."""
    z1.grad = z2.grad = None
    value = loss(z1, z2)
    value.backward()
    return value.detach()


def exact(z1: Tensor, z2: Tensor, temperature: float) -> tuple[float, Tensor]:
    """(loss, gradient of z1) in fp64, by the definition, in blocks of rows."""
    z = F.normalize(torch.cat([z1, z2]).detach().double(), dim=1).requires_grad_()
    num, total = len(z), 0.0
    for first in range(0, num, 512):
        index = torch.arange(first, min(first + 512, num))
        logits = z[index] @ z.T / temperature
        own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index[:, None], True)
        value = F.cross_entropy(logits.masked_fill(own, -torch.inf), (index + num // 2) % num, reduction="sum") / num
        value.backward()
        total += float(value.detach())
    assert z.grad is not None
    raw = z1.detach().double().requires_grad_()
    F.normalize(raw, dim=1).backward(z.grad[: len(z1)])
    assert raw.grad is not None
    return total, raw.grad


def error(loss: Loss, z1: Tensor, z2: Tensor, truth: tuple[float, Tensor]) -> tuple[float, float]:
    """(relative error of the loss, of the gradient)."""
    value = float(run(loss, z1, z2))
    assert z1.grad is not None
    return abs(value / truth[0] - 1), float((z1.grad.double() - truth[1]).norm() / truth[1].norm())


def timed(loss: Loss, z1: Tensor, z2: Tensor, seconds: float) -> Callable[[], float]:
    """A window: milliseconds a call over at least ``seconds``, after a call that pays for what the last arm freed."""

    def window() -> float:
        run(loss, z1, z2)
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not calls:
            run(loss, z1, z2)
            calls += 1
        return (time.perf_counter() - start) / calls * 1e3

    return window


def matrix_rate() -> float:
    """GFLOP/s of fp32 4096 × 4096 products, the size at which these cores are fastest, after an untimed one."""
    a, b, out = (torch.randn(4096, 4096) for _ in range(3))
    torch.mm(a, b, out=out)
    start = time.perf_counter()
    for _ in range(2):
        torch.mm(a, b, out=out)
    return 2 * 2 * 4096**3 / (time.perf_counter() - start) / 1e9


def peak_mib(arm: str, batch_size: int, dim: int, temperature: float) -> float:
    """Peak RSS of a process that runs the arm ("" for none), by this script."""
    argv = [sys.executable, __file__, "--peak-of", arm, "--batch-sizes", str(batch_size)]
    argv += ["--dim", str(dim), "--temperature", str(temperature)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(arm: str, batch_size: int, dim: int, temperature: float) -> None:
    """What ``peak_mib``'s process does."""
    cpu = torch.device("cpu")
    loss = arms(temperature, False)[arm or "sslx"]
    for _ in range(3):
        run(loss, *embeddings(64, dim, cpu))
    z1, z2 = embeddings(batch_size, dim, cpu)
    z1.grad, z2.grad = torch.ones_like(z1), torch.ones_like(z2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, would hide all that follows
    if arm:
        for _ in range(2):
            run(loss, z1, z2)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--memory-at", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--no-compile", action="store_true", help="leave dense torch.compile out")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        print_peak(args.peak_of, args.batch_sizes[0], args.dim, args.temperature)
        return
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    common: dict[str, Any] = {"benchmark": "nt_xent", "dim": args.dim, "temperature": args.temperature}
    common |= {"dtype": "float32", "device": "cpu", "threads": cores}
    for batch_size in args.batch_sizes:
        z1, z2 = embeddings(batch_size, args.dim, torch.device("cpu"))
        truth = exact(z1, z2, args.temperature)
        compared = arms(args.temperature, not args.no_compile)
        errors = {name: error(loss, z1, z2, truth) for name, loss in compared.items()}
        windows = {name: timed(loss, z1, z2, args.seconds) for name, loss in compared.items()}
        found = measure.take_turns({**windows, "matrix rate": matrix_rate}, args.windows)
        rate = measure.spread(found.pop("matrix rate"))
        count = 5 * (2 * batch_size) ** 2 * args.dim / 1e6
        print(f"\nB = {batch_size}, D = {args.dim}: ms forward and backward (matrix rate {rate['median']:.0f} GFLOP/s)")
        for name, values in found.items():
            ms = measure.spread(values)
            share = count / ms["median"] / rate["median"]
            loss_error, gradient_error = errors[name]
            print(
                f"{name:35} {ms['median']:9.2f} ({ms['p20']:.2f} to {ms['p80']:.2f})  {100 * share:3.0f} % of the rate"
                f", error of the loss {loss_error:.0e}, of the gradient {gradient_error:.0e}"
            )
            record = {"batch_size": batch_size, "arm": name, "ms": ms, "matrix_gflops": rate, "share_of_rate": share}
            record |= {"loss_error": loss_error, "gradient_error": gradient_error}
            if not args.no_record:
                measure.append(RESULTS, {**common, **record})
    for batch_size in args.memory_at:
        base = peak_mib("", batch_size, args.dim, args.temperature)
        mib = peak_mib("sslx", batch_size, args.dim, args.temperature) - base
        limit = MEMORY_LIMITS.get(batch_size)
        print(
            f"B = {batch_size}: {mib:.0f} MiB over a process without the loss" + (f" (limit {limit})" if limit else "")
        )
        if not args.no_record:
            measure.append(RESULTS, {**common, "batch_size": batch_size, "arm": "sslx", "peak_mib": round(mib, 1)})


if __name__ == "__main__":
    main()
