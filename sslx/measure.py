"""Measuring: what machine this is, competitors taking turns, and one JSON line for each figure."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "timm", "lightly")


def stamp() -> dict[str, Any]:
    """Hardware, versions and commit: what a figure is worthless without."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({' '.join(fast)})"


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
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


def take_turns(arms: Mapping[str, Callable[[], float]], windows: int) -> dict[str, list[float]]:
    """Call each arm once a window, one after the other, so that the machine's moods hit all alike.

    Each call measures by itself and returns a figure; the first window is a warm-up and not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for window in range(windows + 1):
        for name, arm in arms.items():
            value = arm()
            if window:
                found[name].append(value)
    return found


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**record, **stamp()}) + "\n")
