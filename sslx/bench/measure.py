"""Measurements: which machine this is and how steady it is, competitors in turns, and a JSON line for each figure."""

import ctypes
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sslx.machine import cores, hardware

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "lightly")
MACHINE = ("cpu", "cores", "gpu", "power_cap_w")
"""Fields that two records must share before their times may be compared."""
_DIFFERS_FROM_COMMIT = ("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results")
WINDOWS = 11
"""With this many, two medians of the same work differ by less than p20 to p80 in 19 of 20 runs (``run.py harness``)."""
NOISY = 0.05
"""Variation of the machine's speed above which the user is warned."""
Summary = dict[str, float | int]


def stamp() -> dict[str, Any]:
    """Time, hardware, versions and commit of a measurement.  Without git, the commit is None."""
    commit = _git("rev-parse", "--short", "HEAD") or None
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": hardware.cpu(),
        "cores": cores.allowed(),
        **_gpu(),
        "versions": versions,
        "commit": commit,
        "dirty": None if commit is None else bool(_git(*_DIFFERS_FROM_COMMIT)),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _gpu() -> dict[str, Any]:
    """Name and power cap in watts of the GPU, or None."""
    if not torch.cuda.is_available():
        return {"gpu": None, "power_cap_w": None}
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        cap = float(lines[torch.cuda.current_device()])
    except (OSError, ValueError, IndexError):  # no nvidia-smi, or "[N/A]" in a container
        cap = None
    return {"gpu": torch.cuda.get_device_name(), "power_cap_w": cap}


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:  # git is not installed
        return ""


def summarize(values: list[float]) -> Summary:
    """Return ``n``, ``median``, and the 20th and 80th percentiles, ``p20`` and ``p80``."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def text(summary: Mapping[str, float], digits: int = 0, scale: float = 1.0) -> str:
    """Return a summary times ``scale`` as text, such as "7.2 (7.1 to 7.5)"."""
    median, low, high = (f"{scale * summary[key]:,.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


def require_same_machine(records: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if records were measured on different machines."""
    first: Mapping[str, Any] | None = None
    for record in records:
        first = first or record
        for key in MACHINE:
            if record.get(key) != first.get(key):
                raise ValueError(
                    f"figures of two machines cannot be compared: {key} is {first.get(key)!r} at {first.get('time')} "
                    f"and {record.get(key)!r} at {record.get('time')}; measure both on one"
                )


def elapsed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device needs for ``run``: by CUDA events on a GPU, otherwise by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def rate_window(
    call: Callable[[], object],
    device: torch.device,
    at_least_s: float,
    before: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """Return a window for ``take_turns``, which measures calls per second.

    The first window chooses the number of calls, at least two, so that they last ``at_least_s``.  It waits for each of
    them; later windows fill the device's queue without waiting.  ``before`` runs at the start of each window, before
    the clock starts.
    """
    calls = 0

    def many() -> None:
        for _ in range(calls):
            call()

    def run() -> float:
        nonlocal calls
        before()
        if not calls:
            call()  # compiles, allocates
            times_s = [elapsed_s(call, device)]
            while sum(times_s) < at_least_s:
                times_s.append(elapsed_s(call, device))
            calls = max(2, math.ceil(len(times_s) * at_least_s / sum(times_s)))  # one call may use up what was prepared
        return calls / elapsed_s(many, device)

    return run


def matrix_product(device: torch.device, dtype: torch.dtype, side: int) -> tuple[Callable[[], object], float]:
    """Return a call that multiplies two random square matrices, and its number of floating-point operations."""
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of large square matrices: the most that this machine reaches at present."""
    call, operations = matrix_product(device, dtype, 8192 if device.type == "cuda" else 4096)
    rate = rate_window(call, device, 0.5)
    return operations * max(rate() for _ in range(5))


def memory_rate(device: torch.device) -> float:
    """Return the bytes per second that a copy of 256 MiB reads and writes."""
    a = torch.randn(2**26, device=device)
    b = torch.empty_like(a)
    rate = rate_window(lambda: b.copy_(a), device, 0.3)
    return 2 * a.nbytes * max(rate() for _ in range(5))


def noise(device: torch.device, windows: int = 21) -> float:
    """Return how much the speed of the same work varies now: (p80 - p20) / median over windows of 0.1 s."""
    call, _ = matrix_product(device, torch.float32, 4096 if device.type == "cuda" else 512)
    rate = rate_window(call, device, 0.1)
    rates = summarize([rate() for _ in range(windows + 1)][1:])
    return (rates["p80"] - rates["p20"]) / rates["median"]


def warn_of_noise(device: torch.device, say: Callable[[str], object]) -> float:
    """Return ``noise``, and say so if it is more than ``NOISY``."""
    variation = noise(device)
    if variation > NOISY:
        say(
            f"noisy machine: the speed of the same work varies by {100 * variation:.0f} % within seconds "
            f"(load {os.getloadavg()[0]:.1f} on {cores.allowed()} cores). Differences smaller than that mean little; "
            "stop other programs before you measure"
        )
    return variation


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory is still resident
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: then it is the peak since the process started
        pass


def peak_bytes(device: torch.device) -> int:
    """Peak since ``reset_peak`` of the memory allocated on the GPU, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_turns(
    arms: Mapping[str, Callable[[], float]],
    windows: int = WINDOWS,
    *,
    warm_up: int = 1,
    limit_s: float = math.inf,
    on_error: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Call each arm once per window, one after the other, so that changes of the machine's speed affect all alike.

    Each call measures and returns one figure.  The first ``warm_up`` windows do not count.  After ``limit_s`` no
    further window starts, except for the first one that counts.  An arm that raises is reported to ``on_error`` and
    left out from then on; without ``on_error`` the exception propagates.
    """
    started, figures = time.monotonic(), dict[str, list[float]]()
    arms = dict(arms)
    for window in range(windows + warm_up):
        if window > warm_up and time.monotonic() - started > limit_s:
            break
        for name, arm in list(arms.items()):
            try:
                value = arm()
            except Exception as error:
                if on_error is None:
                    raise
                on_error(name, error)
                del arms[name]
                figures.pop(name, None)
                continue
            if window >= warm_up:
                figures.setdefault(name, []).append(value)
    return figures


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record and its ``stamp`` to a results file, as one line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**record, **stamp()}) + "\n")
