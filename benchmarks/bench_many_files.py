"""A million files: the first and the second start of a folder and of a list, and the memory that their paths take.

    python benchmarks/run.py many_files

The files are hard links to a few small images, in folders of 1,000 or all in one, below a temporary folder that is
deleted afterwards.  Each start is a process of its own, timed from after its imports until the images, their labels and
their identity are known.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import Session, benchmark, option
from PIL import Image

NUM_LINKS = 30_000  # to one file, of which some file systems allow no more than 65,000
LIMIT_S, LIMIT_MB = 3.0, 200.0
"""Of a second start: seconds more than with 1,000 files, and megabytes for a million paths."""
START = """
import json, sys, time
from pathlib import Path
import sslx.data.loader  # and with it torch
from sslx.data.sources import build, folder, list
from sslx.machine import proc

def megabytes(field):
    lines = proc.read("self/status").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))

kind, root = sys.argv[1:]
config = list.Config(root=Path(root, "list.txt")) if kind == "list" else folder.Config(root=Path(root, "images"))
before = megabytes("VmRSS")
start, start_cpu = time.perf_counter(), time.process_time()
source = build(config, "pretrain")
digest = source.identity()["digest"]
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
sizes = {"mb": megabytes("VmRSS") - before, "peak_mb": megabytes("VmHWM") - before}
print(json.dumps({"s": seconds, "cpu_s": cpu_seconds, **sizes, "images": len(source), "digest": digest}))
"""


def made(place: Path, number: int, is_flat: bool) -> None:
    """Make so many files, and a list of them."""
    pixels = np.random.default_rng().integers(0, 256, (-(-number // NUM_LINKS), 8, 8, 3), dtype=np.uint8)
    names: list[str] = []
    for i in range(number):
        file = place / f"{i // NUM_LINKS}.png"
        if i % NUM_LINKS == 0:
            Image.fromarray(pixels[i // NUM_LINKS]).save(file)
        name = f"{i:07}.png" if is_flat else f"n{i // 1000:08}/n{i // 1000:08}_{i % 1000:05}.png"
        if i % 1000 == 0:
            (place / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, place / "images" / name)
        names.append(f"images/{name}\n")
    (place / "list.txt").write_text("".join(names))


def start(kind: str, place: Path) -> dict[str, Any]:
    """Start once in another process; return its seconds, megabytes and images."""
    environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
    command = [sys.executable, "-c", START, kind, str(place)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def both_starts(kind: str, place: Path, windows: int) -> dict[str, Any]:
    """The first start, and the median of the next ones."""
    first = start(kind, place)
    more = sorted((start(kind, place) for _ in range(windows)), key=lambda one: one["s"])
    second = more[len(more) // 2]
    assert all((one["images"], one["digest"]) == (first["images"], first["digest"]) for one in more)
    return {
        "images": first["images"], "first_s": first["s"], "first_cpu_s": first["cpu_s"], "second_s": second["s"],
        "second_cpu_s": second["cpu_s"], "second_s_range": [more[0]["s"], more[-1]["s"]],
        "first_peak_mb": first["peak_mb"], "mb": second["mb"], "peak_mb": second["peak_mb"],
    }  # fmt: skip


def measured(number: int, is_flat: bool, kinds: Sequence[str], windows: int) -> dict[str, dict[str, Any]]:
    """Both starts of each kind with so many files."""
    with tempfile.TemporaryDirectory(prefix="sslx-many-") as folder:
        place = Path(folder)
        made(place, number, is_flat)
        time.sleep(2.5)  # a folder that changed less than two seconds ago is listed again
        return {kind: both_starts(kind, place, windows) for kind in kinds}


@benchmark(
    option("--files", type=int, nargs=2, default=(1000, 1_000_000), help="numbers of files to compare"),
    option("--kinds", nargs="+", default=["folders", "list", "flat"], choices=("folders", "list", "flat")),
    windows=5,
)
def run(session: Session) -> bool:
    few, many = session.options.files
    is_met = True
    for kinds in (["folders", "list"], ["flat"]):
        chosen = [kind for kind in kinds if kind in session.options.kinds]
        counts = (few, many) if chosen else ()
        starts = {number: measured(number, kinds == ["flat"], chosen, session.options.windows) for number in counts}
        for kind in chosen:
            less, more = starts[few][kind], starts[many][kind]
            more_s = more["second_s"] - less["second_s"]
            mb = (more["mb"] - less["mb"]) * 1e6 / (many - few)
            print(
                f"{kind}: first start {more['first_s']:.2f} s, second {more['second_s']:.2f} s "
                f"({more['second_cpu_s']:.2f} s of CPU), {more_s:.2f} s more than of {few:,} files; {mb:.0f} MB for a "
                "million paths"
            )
            session.record(kind=kind, files=[few, many], starts={few: less, many: more}, second_start_more_s=more_s,
                           mb_per_million=mb, windows=session.options.windows,
                           limits={"s": LIMIT_S, "mb": LIMIT_MB})  # fmt: skip
            is_met &= mb < LIMIT_MB and (more_s < LIMIT_S or kind == "list")  # whose rows are read at each start
    return is_met
