"""``sslx doctor``: show what this machine has and what it lacks."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslx.config import parser
from sslx.console.words import one_line, shown
from sslx.machine import compiler, cores, limits, versions


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what this machine has, and what it lacks for which purpose."""


def driver_cuda() -> int | None:
    """Return the newest CUDA major version that the installed driver supports, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def findings() -> list[tuple[str, str]]:
    """Return (name, finding) for each thing that sslx uses."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    free, disk = limits.free_memory_bytes(), shutil.disk_usage(".").free
    rows += [("cpu", f"{cores.allowed()} cores"), ("memory", f"{free / 2**30:.1f} GiB free")]
    rows += [("disk", f"{disk / 2**30:.1f} GiB free in this folder")]
    for name in versions.TESTED:
        try:
            rows.append((name, versions.describe(name, metadata.version(name))))
        except metadata.PackageNotFoundError:
            rows.append((name, f"not installed: pip install {name}"))
    import torch

    cuda = driver_cuda()
    if cuda is None:
        rows.append(("gpu", "no NVIDIA driver: everything runs on the CPU, over gloo"))
    elif cuda < 13:
        rows.append(
            (
                "gpu",
                f"the driver runs CUDA {cuda}: pip install nvidia-dali-cuda120 and torch torchvision "
                "--index-url https://download.pytorch.org/whl/cu126 instead of the CUDA 13 wheels",
            )
        )
    else:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("gpu", ", ".join(names) or f"driver for CUDA {cuda}, but torch sees no GPU"))
    rows.append(("compiler", _compilers()))
    rows.append(("slurm", _slurm()))
    rows.append(("verdict", _verdict(cuda, torch.cuda.is_available())))
    return rows


def _compilers() -> str:
    """Name the compiler that torch.compile calls on a CPU, and what each missing piece prevents."""
    from sslx.losses import toolchain

    costs: list[str] = []
    if not (cpp := compiler.find_cpp()):
        costs.append(f"{compiler.INSTALL}: without it, no torch.compile on the CPU")
    if missing := toolchain.missing():
        costs.append(f"{toolchain.INSTALL}: without {missing}, no torch.compile and no fused loss on a GPU")
    return "; ".join([cpp or "no C++ compiler", *costs])


def _slurm() -> str:
    if not (path := shutil.which("sbatch")):
        return "not installed: jobs run on this machine"
    try:
        done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{path}, but Slurm does not answer"
    return path if done.returncode == 0 else f"{path}, but Slurm does not answer: {one_line(done.stderr)}"


def _verdict(cuda: int | None, has_gpu: bool) -> str:
    """Say in one sentence what this machine is ready for."""
    if missing := [name for name in ("torch", "torchvision", "timm") if find_spec(name) is None]:
        return f"not ready: pip install {' '.join(missing)}"
    if has_gpu:
        return "ready to train on GPUs"
    if cuda is None:
        return "ready to train on the CPU"
    return "ready to train on the CPU, but not on its GPU: see the line about the GPU"


def main(argv: Sequence[str]) -> int:
    """Print the findings and return 0, because a machine may lack something on purpose."""
    parser.parse(Config, argv, "sslx doctor")
    table = Table(show_header=False, box=None, pad_edge=False)
    for row in findings():
        table.add_row(*(Text(shown(cell)) for cell in row))
    Console().print(table, highlight=False)
    return 0
