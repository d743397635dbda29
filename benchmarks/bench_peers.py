"""The same SimCLR job by sslx, by lightly and by a plain torchvision script: samples/s and memory, in turns.

    python benchmarks/run.py peers --root DIR                                       (30 minutes)
    python benchmarks/run.py peers --root DIR --encoders "small resnet" --windows 3

Data, encoder, batch size, augmentation and loss are the same (``peers.py``).  Every window is a process of its own, so
that only what was compiled before carries over; the clock starts after a warm-up.  lightly runs as in its example
(fp32), and tuned by hand as sslx is: channels-last, compiled, bf16 where that is faster (AMX), with one and with two
loader processes, of which the faster counts.  Only sslx keeps freed memory (``sslx.machine.memory``).  Memory is the
largest sum over the living processes of a job of their peaks, with shared pages counted once.  The first window does
not count for it, because a C++ compiler may run in it, for one arm and not for another.
"""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import images
import peers
import torch
from harness import Session, benchmark, option

from sslx.bench import measure

ARMS = {
    "sslx": ["sslx", "--workers", "2"],
    "lightly, as its example": ["lightly", "--workers", "2"],
    "lightly, tuned, 1 worker": ["lightly", "--tuned", "--workers", "1"],
    "lightly, tuned, 2 workers": ["lightly", "--tuned", "--workers", "2"],
}
LIMITS = {"resnet18": {"default": 2.5, "tuned": 1.0}, "small resnet": {"tuned": 1.3}}
"""Least ratio of the samples/s of sslx and of lightly."""
PLAIN = {"plain script, 3-layer CNN": ["plain", "--workers", "2", "--encoder", "cnn"]}
"""Beside the small ResNet: a script like those of tutorials, with an encoder of its own."""


@benchmark(
    images.CIFAR10,
    images.LABEL,
    option("--encoders", nargs="+", default=list(LIMITS), choices=list(LIMITS)),
    windows=5,
    seconds=10.0,
)
def run(session: Session) -> bool:
    options = session.options
    passed, noise = True, measure.warn_of_noise(torch.device("cpu"), print)
    for path in images.paths(options.root):
        Path(path).read_bytes()  # into the page cache: otherwise the first arm would read from the disk
    for encoder in options.encoders:
        commands = {name: [*argv, "--encoder", encoder] for name, argv in ARMS.items()}
        commands |= PLAIN if encoder == "small resnet" else {}
        peaks = {name: list[int]() for name in commands}
        flags = ["--root", str(options.root), "--seconds", str(options.seconds)]
        arms = {name: arm([*argv, *flags], peaks[name]) for name, argv in commands.items()}
        values = measure.take_turns(arms, options.windows, warm_up=0)  # every window is a process of its own
        rates = {name: measure.summarize(samples) for name, samples in values.items()}
        peak_bytes = {name: max(each[1:] or each) for name, each in peaks.items()}
        print(f"\n{encoder}, 32 px, samples/s of n = {options.windows} processes, in turns")
        for name, summary in rates.items():
            print(f"  {name:26} {measure.text(summary)}  {peak_bytes[name] / 2**30:.2f} GiB")
        for against, ratio in ratios(values).items():
            limit = LIMITS[encoder].get(against, 0.0)
            goal = f" (at least {limit:g})" if limit else ""
            print(f"  sslx / lightly {against}: {measure.text(ratio, 2)}{goal}")
            passed = passed and ratio["median"] >= limit
        passed = passed and peak_bytes["sslx"] <= min(peak_bytes[name] for name in ARMS if name != "sslx")
        session.record(encoder=encoder, size_px=peers.SIZE, images=options.images, samples_per_s=rates,
                       peak_bytes=peak_bytes, ratio=ratios(values), batch_size=peers.BATCH_SIZE, noise=noise,
                       tuned_precision=peers.PRECISION, window_s=options.seconds, commands=commands)  # fmt: skip
    return passed


def ratios(values: dict[str, list[float]]) -> dict[str, measure.Summary]:
    """Samples/s of sslx over those of lightly, turn by turn: its example ("default"), and the best tuned setting."""
    best = [max(row) for row in zip(*(rates for name, rates in values.items() if "tuned" in name), strict=True)]
    others = {"default": values["lightly, as its example"], "tuned": best}
    return {
        name: measure.summarize([a / b for a, b in zip(values["sslx"], other, strict=True)])
        for name, other in others.items()
    }


def arm(argv: list[str], peaks: list[int]) -> Callable[[], float]:
    """A window that returns the samples/s of a process of ``peers.py``, and appends its peak memory to ``peaks``."""

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
            process.kill()  # does nothing if it has ended
            done.set()
            watcher.join()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        if not peak[0]:
            raise SystemExit("the memory of a process could not be read from /proc/PID/smaps_rollup")
        peaks.append(peak[0])
        return float(json.loads(out.splitlines()[-1])["samples_per_s"])

    return window


def tree_bytes(pid: int) -> int:
    """Peak memory so far of a process and its children, in bytes; 0 if it has ended.

    The kernel keeps the peak of resident memory of each process; memory that it shares with others now is subtracted.
    """
    try:
        text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (OSError, ProcessLookupError):
        return 0
    kib = {key: int(value) for key, value in re.findall(r"^(VmHWM|Rss|Pss):\s+(\d+) kB$", text, re.MULTILINE)}
    own = 1024 * (kib["VmHWM"] - kib["Rss"] + kib["Pss"]) if len(kib) == 3 else 0  # it is ending
    return own + sum(tree_bytes(int(child)) for child in children)
