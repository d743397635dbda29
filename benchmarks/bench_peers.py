"""The same SimCLR job by sslx, lightly and a plain torchvision script: samples/s and memory, in turns.

    python benchmarks/bench_peers.py --root DIR             (CIFAR-10 as images in folders; 30 minutes)
    python benchmarks/bench_peers.py --root DIR --encoders "small resnet" --windows 3

Data, encoder, batch, augmentation and loss are the same (``peers.py``).  Every window is a process of its own, so that
nobody inherits memory or threads, only what was compiled before; the clock runs after the warm-up.  lightly runs as its
example does (fp32), and tuned by hand as sslx is: channels-last, compiled, bf16 where it is faster (AMX), one and two
loader processes, of which the faster counts; only sslx keeps freed memory (``sslx.machine.memory``).  Memory is the
most that the living processes of a job have had together, each at its peak, shared pages counted once; without the
first window, in which g++ may be among them, for one arm and not for another.  plain: see ``peers.py``, three
convolutions.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch

from sslx.bench import measure
from sslx.data import sources

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
ARMS = {
    "sslx": ["sslx", "--workers", "2"],
    "lightly, as its example": ["lightly", "--workers", "2"],
    "lightly, tuned, 1 worker": ["lightly", "--tuned", "--workers", "1"],
    "lightly, tuned, 2 workers": ["lightly", "--tuned", "--workers", "2"],
}
LIMITS = {"resnet18": {"default": 2.5, "tuned": 1.0}, "small resnet": {"tuned": 1.3}}
"""What sslx's samples/s over lightly's must reach."""
PLAIN = {"plain script, 3-layer CNN": ["plain", "--workers", "2", "--encoder", "cnn"]}
"""Beside the small ResNet: the script that tutorials start from, with its own encoder."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--images", default="CIFAR-10 (JPEG q75)", help="what the images are, for the record")
    parser.add_argument("--encoders", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    passed, noise = True, measure.warn_of_noise(torch.device("cpu"), print)
    for path in sources.build(sources.Config(source="folder", root=args.root), "pretrain").paths or ():
        Path(path).read_bytes()  # into the page cache: who comes first would read from the disk
    for encoder in args.encoders:
        wanted = {name: [*argv, "--encoder", encoder] for name, argv in ARMS.items()}
        wanted |= PLAIN if encoder == "small resnet" else {}
        peaks = {name: list[int]() for name in wanted}
        flags = ["--root", str(args.root), "--seconds", str(args.seconds)]
        arms = {name: arm([*argv, *flags], peaks[name]) for name, argv in wanted.items()}
        values = measure.take_turns(arms, args.windows, warm_up=0)  # every window is a process of its own
        rates = {name: measure.summarize(found) for name, found in values.items()}
        record: dict[str, Any] = {"benchmark": "peers", "encoder": encoder, "size_px": 32, "images": args.images}
        peak_bytes = {name: max(found[1:] or found) for name, found in peaks.items()}
        record |= {"samples_per_s": rates, "peak_bytes": peak_bytes}
        record |= {"ratio": ratios(values), "batch_size": peers.BATCH_SIZE, "tuned_precision": peers.PRECISION}
        record |= {"window_s": args.seconds, "commands": wanted, "noise": noise}
        print(f"\n{encoder}, 32 px, samples/s of n = {args.windows} processes, in turns")
        for name, found in rates.items():
            print(
                f"  {name:26} {found['median']:8,.0f}  ({found['p20']:,.0f} to {found['p80']:,.0f})"
                f"  {record['peak_bytes'][name] / 2**30:.2f} GiB"
            )
        for against, ratio in record["ratio"].items():
            limit = LIMITS[encoder].get(against)
            print(f"  sslx / lightly {against}: {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
                  + (f", at least {limit}" if limit else ""))  # fmt: skip
            passed &= limit is None or ratio["median"] >= limit
        passed &= record["peak_bytes"]["sslx"] <= min(record["peak_bytes"][n] for n in ARMS if n != "sslx")
        if not args.no_record:
            measure.append(args.results, record)
    return 0 if passed else 1


def ratios(values: dict[str, list[float]]) -> dict[str, dict[str, float | int]]:
    """sslx's samples/s over lightly's, window by window: beside its example, and beside the best of its settings."""
    best = [max(row) for row in zip(*(found for name, found in values.items() if "tuned" in name), strict=True)]
    others = {"default": values["lightly, as its example"], "tuned": best}
    return {
        name: measure.summarize([a / b for a, b in zip(values["sslx"], other, strict=True)])
        for name, other in others.items()
    }


def arm(argv: list[str], peaks: list[int]) -> Callable[[], float]:
    """A window: the samples/s that a process of ``peers.py`` prints; the peak of its memory goes to ``peaks``."""

    def window() -> float:
        command = [sys.executable, str(Path(__file__).with_name("peers.py")), *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        done, peak = threading.Event(), [0]

        def watch() -> None:
            while not done.wait(0.5):
                peak[0] = max(peak[0], tree_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            out, _ = process.communicate()
        finally:
            process.kill()  # nothing where it has ended
            done.set()
            watcher.join()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        if not peak[0]:
            raise SystemExit("its memory could not be read: /proc/PID/smaps_rollup")
        peaks.append(peak[0])
        return float(json.loads(out.splitlines()[-1])["samples_per_s"])

    return window


def tree_bytes(pid: int) -> int:
    """Peak memory so far of a process and its children; 0 of what is gone.

    The kernel keeps each one's peak of resident memory; from it goes what others share with the process now.
    """
    try:
        text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (OSError, ProcessLookupError):
        return 0
    kib = {key: int(value) for key, value in re.findall(r"^(VmHWM|Rss|Pss):\s+(\d+) kB$", text, re.MULTILINE)}
    own = 1024 * (kib["VmHWM"] - kib["Rss"] + kib["Pss"]) if len(kib) == 3 else 0  # 0: it ends just now
    return own + sum(tree_bytes(int(child)) for child in children)


if __name__ == "__main__":
    sys.exit(main())
