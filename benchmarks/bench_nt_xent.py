"""NT-Xent forward and backward beside its peers, in turns: time, share of the machine's matrix rate, and memory.

    python benchmarks/bench_nt_xent.py                        (time at each batch size, then memory)
    python benchmarks/bench_nt_xent.py --batch-sizes 1024 --windows 9

On a GPU where there is one, in bf16, each arm by itself and ("replayed") as a CUDA graph; else on the CPU in fp32.
Each arm is checked against fp64 on the same input before it is timed.  The rate counts 5·N²·D operations, N = 2B,
whatever an arm does, over that of products of large square matrices just before, window by window.  Memory on a CPU is
the peak RSS of a fresh process over the same process without the loss, each after a warm-up at a small batch; on a GPU
what is allocated at the peak over what is before.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nt_xent_peers import Loss, arms
from torch import Tensor
from torch.nn import functional as F

from sslx.bench import measure
from sslx.machine import cores

RESULTS = Path(__file__).parent / "results" / "nt_xent.jsonl"
MEMORY_LIMITS = {4096: 64, 16384: 256}
"""MiB on a CPU, by batch size."""


def embeddings(batch_size: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views' embeddings, as far apart as those of a network in training."""
    generator = torch.Generator().manual_seed(batch_size)
    z = torch.randn(batch_size, dim, generator=generator)
    z1, z2 = (z + 0.7 * torch.randn(batch_size, dim, generator=generator) for _ in range(2))
    return z1.to(device, dtype).requires_grad_(), z2.to(device, dtype).requires_grad_()


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
        index = torch.arange(first, min(first + 512, num), device=z.device)
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


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> Callable[[], float]:
    """A window: calls a second, after a call that pays for what the last arm freed."""
    return measure.rate_window(call, device, seconds, before=call)


def replay(loss: Loss, z1: Tensor, z2: Tensor) -> Callable[[], object]:
    """The loss and its backward as a CUDA graph; raises what the capture raises."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(loss, z1, z2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(loss, z1, z2)
    return graph.replay


def peak_mib(arm: str, batch_size: int, dim: int, temperature: float) -> float:
    """Peak RSS of a process that runs the arm ("" for none), by this script."""
    argv = [sys.executable, __file__, "--peak-of", arm, "--batch-sizes", str(batch_size)]
    argv += ["--dim", str(dim), "--temperature", str(temperature)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(arm: str, batch_size: int, dim: int, temperature: float) -> None:
    """What ``peak_mib``'s process does."""
    cpu = torch.device("cpu")
    loss = arms(temperature, cpu, False)[arm or "sslx"]
    for _ in range(3):
        run(loss, *embeddings(64, dim, cpu, torch.float32))
    z1, z2 = embeddings(batch_size, dim, cpu, torch.float32)
    z1.grad, z2.grad = torch.ones_like(z1), torch.ones_like(z2)
    measure.reset_peak(cpu)  # of imports, which would hide all that follows
    if arm:
        for _ in range(2):
            run(loss, z1, z2)
    print(measure.peak_bytes(cpu) / 2**20)


def gpu_peak_mib(loss: Loss, z1: Tensor, z2: Tensor) -> float:
    """What a call allocates on the GPU at its peak."""
    run(loss, z1, z2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(loss, z1, z2)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def failure_of(arm: str, batch_size: int, failure: Exception) -> dict[str, Any]:
    """The line of an arm that could not run, printed too."""
    text = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    print(f"{arm}: failed at B = {batch_size} ({text})")
    return {"batch_size": batch_size, "arm": arm, "error": text}


def compare(
    batch_size: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A line for each arm, printed too."""
    z1, z2 = embeddings(batch_size, args.dim, device, dtype)
    truth = exact(z1, z2, args.temperature)
    product, operations = measure.matrix_product(device, dtype, 8192 if device.type == "cuda" else 4096)
    windows = {"matrix rate": timed(product, device, min(args.seconds, 1.0))}
    errors, peaks = {}, {}
    failed: list[dict[str, Any]] = []
    for name, loss in arms(args.temperature, device, not args.no_compile).items():
        try:
            errors[name] = error(loss, z1, z2, truth)
            peaks[name] = gpu_peak_mib(loss, z1, z2) if device.type == "cuda" else None
        except Exception as failure:  # one arm's, of whatever kind, must not cost the others their lines
            failed.append(failure_of(name, batch_size, failure))
            continue
        windows[name] = timed(lambda loss=loss: run(loss, z1, z2), device, args.seconds)
        if device.type == "cuda":
            try:
                windows[f"{name}, replayed"] = timed(replay(loss, z1, z2), device, args.seconds)
            except Exception as failure:
                failed.append(failure_of(f"{name}, replayed", batch_size, failure))
    found = measure.take_turns(
        windows,
        args.windows,
        limit_s=args.limit_s,
        failed=lambda name, failure: failed.append(failure_of(name, batch_size, failure)),
    )
    rates = [operations * calls_per_s / 1e9 for calls_per_s in found.pop("matrix rate")]
    count = 5 * (2 * batch_size) ** 2 * args.dim / 1e9
    print(f"\nB = {batch_size}, D = {args.dim}, {dtype}: ms forward and backward, n = {len(rates)}", end="; ")
    print(f"matrix products at {measure.summarize(rates)['median']:.0f} GFLOP/s")
    lines = failed
    for name, values in found.items():
        ms = measure.summarize([1e3 / calls_per_s for calls_per_s in values])
        share = measure.summarize([count * calls / rate for calls, rate in zip(values, rates, strict=True)])
        plain = name.removesuffix(", replayed")
        loss_error, gradient_error = errors[plain]
        print(
            f"{name:35} {ms['median']:9.3f} ({ms['p20']:.3f} to {ms['p80']:.3f})  {100 * share['median']:3.0f} % "
            f"({100 * share['p20']:.0f} to {100 * share['p80']:.0f}) of the rate"
            f", error of the loss {loss_error:.0e}, of the gradient {gradient_error:.0e}"
        )
        line = {"batch_size": batch_size, "arm": name, "ms": ms, "matrix_gflops": measure.summarize(rates)}
        line |= {"share_of_rate": share, "loss_error": loss_error, "gradient_error": gradient_error}
        lines.append(line if peaks[plain] is None else line | {"peak_mib": round(peaks[plain], 1)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    sizes = [512, 2048, 4096, 16384, 65536] if gpu else [512, 4096]
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory-at", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="of a batch size; then fewer windows")
    parser.add_argument("--no-compile", action="store_true", help="leave dense torch.compile out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        print_peak(args.peak_of, args.batch_sizes[0], args.dim, args.temperature)
        return
    num_cores = cores.allowed()
    torch.set_num_threads(num_cores)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common: dict[str, Any] = {"benchmark": "nt_xent", "dim": args.dim, "temperature": args.temperature}
    common |= {"dtype": str(dtype).removeprefix("torch."), "device": args.device, "threads": num_cores}
    for batch_size in args.batch_sizes:
        for line in compare(batch_size, args, device, dtype):
            if not args.no_record:
                measure.append(args.results, {**common, **line})
    if device.type == "cuda":
        return
    for batch_size in args.memory_at:
        base = peak_mib("", batch_size, args.dim, args.temperature)
        mib = peak_mib("sslx", batch_size, args.dim, args.temperature) - base
        limit = MEMORY_LIMITS.get(batch_size)
        print(
            f"B = {batch_size}: {mib:.0f} MiB over a process without the loss" + (f" (limit {limit})" if limit else "")
        )
        if not args.no_record:
            measure.append(args.results, {**common, "batch_size": batch_size, "arm": "sslx", "peak_mib": round(mib, 1)})


if __name__ == "__main__":
    main()
