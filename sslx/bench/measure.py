"""Measuring: what machine this is and how steady, competitors taking turns, and one JSON line for each figure."""

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

from sslx.machine import cores, proc

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "lightly")
MACHINE = ("cpu", "cores", "gpu", "power_cap_w")
"""What two records must share before one may be compared with the other."""
CHANGED = ("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results")
WINDOWS = 11
"""Enough that the medians of two runs of the same differ by less than p20 to p80 in 19 of 20 (bench_harness.py)."""
NOISY = 0.05


def stamp() -> dict[str, Any]:
    """Hardware, versions and commit: what a figure is worthless without.  None for what a copy without git lacks."""
    commit = _git("rev-parse", "--short", "HEAD") or None
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": cores.allowed(),
        **_gpu(),
        "versions": versions,
        "commit": commit,
        "dirty": None if commit is None else bool(_git(*CHANGED)),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    lines = proc.read("cpuinfo").splitlines()
    if not lines:
        return platform.processor()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({' '.join(fast)})"


def _gpu() -> dict[str, Any]:
    """Its name and power cap in watts, None where there is none."""
    if not torch.cuda.is_available():
        return {"gpu": None, "power_cap_w": None}
    asked = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
        cap = float(lines[torch.cuda.current_device()])
    except (OSError, ValueError, IndexError):  # no nvidia-smi, or "[N/A]" in a container
        cap = None
    return {"gpu": torch.cuda.get_device_name(), "power_cap_w": cap}


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return found.stdout.strip()


def spread(values: list[float]) -> dict[str, float | int]:
    """n, median, and the 20th and 80th percentiles."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def comparable(records: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError where records were measured on different machines."""
    first: Mapping[str, Any] | None = None
    for record in records:
        first = first or record
        for key in MACHINE:
            if record.get(key) != first.get(key):
                raise ValueError(
                    f"figures of two machines cannot be compared: {key} is {first.get(key)!r} at {first.get('time')} "
                    f"and {record.get(key)!r} at {record.get('time')}; measure both on one"
                )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long the device takes for what ``run`` asks of it: by CUDA events on a GPU, else by the clock."""
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


def window(
    call: Callable[[], object],
    device: torch.device,
    at_least_s: float,
    before: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """A window for ``take_turns``: calls a second, over as many calls as last ``at_least_s``, two at least.

    Their number is found in the first window, by calls that are waited for one by one; after that the device's queue
    is filled without waiting.  ``before``: called off the clock, at the start of each window.
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
            spent = [seconds(call, device)]
            while sum(spent) < at_least_s:
                spent.append(seconds(call, device))
            calls = max(2, math.ceil(len(spent) * at_least_s / sum(spent)))  # some calls only take what is there
        return calls / seconds(many, device)

    return run


def product(device: torch.device, dtype: torch.dtype, side: int) -> tuple[Callable[[], object], float]:
    """(a product of two random square matrices, its floating-point operations)."""
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square products: what this machine can do at most, here and now."""
    call, operations = product(device, dtype, 8192 if device.type == "cuda" else 4096)
    rate = window(call, device, 0.5)
    return operations * max(rate() for _ in range(5))


def memory_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy of 256 MiB."""
    a = torch.randn(2**26, device=device)
    b = torch.empty_like(a)
    rate = window(lambda: b.copy_(a), device, 0.3)
    return 2 * a.nbytes * max(rate() for _ in range(5))


def noise(device: torch.device, windows: int = 21) -> float:
    """How far the speed of the same work varies here and now: (p80 - p20) / median over windows of 0.1 s."""
    call, _ = product(device, torch.float32, 4096 if device.type == "cuda" else 512)
    rate = window(call, device, 0.1)
    found = spread([rate() for _ in range(windows + 1)][1:])
    return (found["p80"] - found["p20"]) / found["median"]


def warn_of_noise(device: torch.device, say: Callable[[str], object]) -> float:
    """``noise``, with a line for the user where it is more than ``NOISY``."""
    found = noise(device)
    if found > NOISY:
        say(
            f"noisy machine: the same work's speed varies by {100 * found:.0f} % from tenth to tenth of a second "
            f"(load {os.getloadavg()[0]:.1f} on {cores.allowed()} cores): differences below that mean "
            "little; end what else runs"
        )
    return found


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed is resident still
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then the process's
        pass


def peak_bytes(device: torch.device) -> int:
    """The peak since ``reset_peak``: allocated on the GPU, or this process's resident memory."""
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
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Call each arm once a window, one after the other, so that the machine's moods hit all alike.

    Each call measures by itself and returns a figure; the first windows are a warm-up and not counted.
    limit_s: no window begins later, but for the first that counts.  failed: told of an arm that raises, which is then
    left out; without it the exception is raised.
    """
    started, found = time.monotonic(), dict[str, list[float]]()
    arms = dict(arms)
    for window in range(windows + warm_up):
        if window > warm_up and time.monotonic() - started > limit_s:
            break
        for name, arm in list(arms.items()):
            try:
                value = arm()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del arms[name]
                found.pop(name, None)
                continue
            if window >= warm_up:
                found.setdefault(name, []).append(value)
    return found


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**record, **stamp()}) + "\n")
