"""NT-Xent forward and backward beside its peers, in turns: time, share of the machine's matrix rate, and memory.

    python benchmarks/run.py nt_xent                        (time at each batch size, then memory)
    python benchmarks/run.py nt_xent --batch-sizes 1024 --windows 9

On a GPU in bf16, each arm also as a CUDA graph ("replayed"); without a GPU in fp32.  Before an arm is timed, it is
compared with fp64 on the same input.  Whatever an arm does, the rate counts 5·N²·D operations, N = 2B, over the
rate of products of large square matrices in the same window.  On a CPU, memory is the peak RSS of a process of its own
over that of the same process without the loss, each after a warm-up at a small batch; on a GPU it is the peak of
allocated memory over that before the call.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from harness import RUNNER, Record, Session, benchmark, option
from nt_xent_peers import Loss, arms
from torch import Tensor
from torch.nn import functional as F

from sslx.bench import measure
from sslx.machine import cores

MEMORY_LIMITS = {4096: 64, 16384: 256}
"""Limits of the memory on a CPU in MiB, by batch size."""


def embeddings(batch_size: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) of two views, about as similar as those of a network in training."""
    generator = torch.Generator().manual_seed(batch_size)
    z = torch.randn(batch_size, dim, generator=generator)
    z1, z2 = (z + 0.7 * torch.randn(batch_size, dim, generator=generator) for _ in range(2))
    return z1.to(device, dtype).requires_grad_(), z2.to(device, dtype).requires_grad_()


def forward_backward(loss: Loss, z1: Tensor, z2: Tensor) -> Tensor:
    """The loss, after its forward and backward pass."""
    z1.grad = z2.grad = None
    value = loss(z1, z2)
    value.backward()
    return value.detach()


def exact(z1: Tensor, z2: Tensor, temperature: float) -> tuple[float, Tensor]:
    """The loss and the gradient of z1 in fp64, from the definition, in blocks of rows."""
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
    """Relative errors of the loss and of the gradient of z1."""
    value = float(forward_backward(loss, z1, z2))
    assert z1.grad is not None
    return abs(value / truth[0] - 1), float((z1.grad.double() - truth[1]).norm() / truth[1].norm())


def timed(call: Callable[[], object], device: torch.device, seconds: float) -> Callable[[], float]:
    """A window of calls per second, after one call that allocates again what the last arm has freed."""
    return measure.rate_window(call, device, seconds, before=call)


def replay(loss: Loss, z1: Tensor, z2: Tensor) -> Callable[[], object]:
    """A CUDA graph of the loss and its backward pass."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(loss, z1, z2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_backward(loss, z1, z2)
    return graph.replay


def peak_mib(arm: str, batch_size: int, dim: int, temperature: float) -> float:
    """Peak RSS in MiB of a process of its own that runs the arm, or only prepares to ("")."""
    argv = [sys.executable, str(RUNNER), "nt_xent", "--peak-of", arm, "--batch-sizes", str(batch_size)]
    argv += ["--dim", str(dim), "--temperature", str(temperature)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(arm: str, batch_size: int, dim: int, temperature: float) -> None:
    """The process of ``peak_mib``."""
    cpu = torch.device("cpu")
    loss = arms(temperature, cpu, False)[arm or "sslx"]
    for _ in range(3):
        forward_backward(loss, *embeddings(64, dim, cpu, torch.float32))
    z1, z2 = embeddings(batch_size, dim, cpu, torch.float32)
    z1.grad, z2.grad = torch.ones_like(z1), torch.ones_like(z2)
    measure.reset_peak(cpu)  # otherwise the peak of the imports hides the rest
    if arm:
        for _ in range(2):
            forward_backward(loss, z1, z2)
    print(measure.peak_bytes(cpu) / 2**20)


def gpu_peak_mib(loss: Loss, z1: Tensor, z2: Tensor) -> float:
    """Peak of the memory that a call allocates on the GPU, in MiB."""
    forward_backward(loss, z1, z2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(loss, z1, z2)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def failure_of(arm: str, batch_size: int, failure: Exception) -> Record:
    """Print and return the record of an arm that could not run."""
    text = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    print(f"{arm}: failed at B = {batch_size} ({text})")
    return {"batch_size": batch_size, "arm": arm, "error": text}


def compare(batch_size: int, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Record]:
    """Print and return a record for each arm."""
    z1, z2 = embeddings(batch_size, options.dim, device, dtype)
    truth = exact(z1, z2, options.temperature)
    product, operations = measure.matrix_product(device, dtype, 8192 if device.type == "cuda" else 4096)
    windows = {"matrix rate": timed(product, device, min(options.seconds, 1.0))}
    errors, peaks, records = dict[str, tuple[float, float]](), dict[str, float](), list[Record]()

    def on_error(name: str, failure: Exception) -> None:
        records.append(failure_of(name, batch_size, failure))

    for name, loss in arms(options.temperature, device, not options.no_compile).items():
        try:
            errors[name] = error(loss, z1, z2, truth)
            if device.type == "cuda":
                peaks[name] = gpu_peak_mib(loss, z1, z2)
        except Exception as failure:  # the failure of one arm, of any kind, must not cost the others their figures
            on_error(name, failure)
            continue
        windows[name] = timed(lambda loss=loss: forward_backward(loss, z1, z2), device, options.seconds)
        if device.type == "cuda":
            try:
                windows[f"{name}, replayed"] = timed(replay(loss, z1, z2), device, options.seconds)
            except Exception as failure:
                on_error(f"{name}, replayed", failure)
    rates = measure.take_turns(windows, options.windows, limit_s=options.limit_s, on_error=on_error)
    matrix_gflops = [operations * calls_per_s / 1e9 for calls_per_s in rates.pop("matrix rate")]
    count = 5 * (2 * batch_size) ** 2 * options.dim / 1e9
    print(
        f"\nB = {batch_size}, D = {options.dim}, {dtype}: ms forward and backward, n = {len(matrix_gflops)}", end="; "
    )
    print(f"matrix products at {measure.summarize(matrix_gflops)['median']:.0f} GFLOP/s")
    for name, values in rates.items():
        ms = measure.summarize([1e3 / calls_per_s for calls_per_s in values])
        share = measure.summarize([count * calls / rate for calls, rate in zip(values, matrix_gflops, strict=True)])
        plain = name.removesuffix(", replayed")
        loss_error, gradient_error = errors[plain]
        print(
            f"{name:35} {measure.text(ms, 3)} ms, {measure.text(share, scale=100)} % of the rate, error of the loss "
            f"{loss_error:.0e}, of the gradient {gradient_error:.0e}"
        )
        record = {"batch_size": batch_size, "arm": name, "ms": ms, "matrix_gflops": measure.summarize(matrix_gflops)}
        record |= {"share_of_rate": share, "loss_error": loss_error, "gradient_error": gradient_error}
        records.append(record if plain not in peaks else record | {"peak_mib": round(peaks[plain], 1)})
    return records


GPU = torch.cuda.is_available()


@benchmark(
    option("--batch-sizes", type=int, nargs="+", default=[512, 2048, 4096, 16384, 65536] if GPU else [512, 4096]),
    option("--device", default="cuda" if GPU else "cpu", choices=["cpu", "cuda"]),
    option("--memory-at", type=int, nargs="*", default=[4096, 16384], help="batch sizes of the memory on a CPU"),
    option("--dim", type=int, default=128),
    option("--temperature", type=float, default=0.1),
    option("--limit-s", type=float, default=float("inf"), help="longest time per batch size; then fewer windows"),
    option("--no-compile", action="store_true", help="leave out the arms that are compiled"),
    option("--peak-of", help=argparse.SUPPRESS),
    windows=5,
    seconds=2.0,
)
def run(session: Session) -> None:
    options = session.options
    if options.peak_of is not None:
        print_peak(options.peak_of, options.batch_sizes[0], options.dim, options.temperature)
        return
    num_cores, device = cores.allowed(), torch.device(options.device)
    torch.set_num_threads(num_cores)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common: Record = {"dim": options.dim, "temperature": options.temperature}
    common |= {"dtype": str(dtype).removeprefix("torch."), "device": options.device, "threads": num_cores}
    for batch_size in options.batch_sizes:
        for record in compare(batch_size, options, device, dtype):
            session.record(**common, **record)
    for batch_size in options.memory_at if device.type == "cpu" else ():
        mib = [peak_mib(arm, batch_size, options.dim, options.temperature) for arm in ("", "sslx")]
        limit = f" (limit {MEMORY_LIMITS[batch_size]})" if batch_size in MEMORY_LIMITS else ""
        print(f"B = {batch_size}: {mib[1] - mib[0]:.0f} MiB more than a process without the loss{limit}")
        session.record(**common, batch_size=batch_size, arm="sslx", peak_mib=round(mib[1] - mib[0], 1))
