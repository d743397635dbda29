"""What it costs that a step and a checkpoint are checked for finite numbers, beside the step and the save themselves.

    python benchmarks/bench_finite.py

A ResNet-18 at 32 px by default; other flags are those of ``sslx pretrain``.  In turns, in one process: the step as
``sslx pretrain`` takes it; what of it is the check (norms of the gradients, agreement, a copy of the buffers and their
return, the masked metrics, the verdict read by the host); the update by the optimizer; a save; what of it is the check.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslx import config, distributed, optim
from sslx.bench import measure
from sslx.runs import checkpoint
from sslx.runs.state import not_finite
from sslx.train import finite
from sslx.train.build import build
from sslx.train.step import train_step

RESULTS = Path(__file__).parent / "results" / "finite.jsonl"
DEFAULTS = (
    "--data.source digits --data.size 32 --data.backend synthetic --encoder.name resnet18 --batch-size 128 "
    "--optim.name sgd --precision fp32"
).split()


class Operators(TorchDispatchMode):
    """Counts what is called: on a GPU a kernel or a few each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args, flags = parser.parse_known_args()
    settings = config.load([*DEFAULTS, *flags])
    ranks = distributed.init(settings.device)
    parts = build(settings, ranks, lambda _: None)
    replace(parts.schedule, peak_lr=0.0).apply(parts.optimizer, 0.0)
    progress = torch.full((), 0.5, device=ranks.device)
    batches = [next(parts.loader)]
    metrics = train_step(parts.model, batches, parts.optimizer, progress, parts.autocast)
    gradients = [p.grad for p in parts.method.parameters() if p.grad is not None]

    def check() -> None:
        before = finite.Buffers(parts.method)
        taken = finite.agreed(metrics["loss"], optim.global_norm(gradients))
        before.put_back(unless=taken)
        finite.standing(progress, taken)
        finite.counted(metrics)
        flags = torch.stack([metrics["taken"].double(), metrics["loss"].double()])
        if ranks.device.type == "cpu":  # a GPU's are read where the host waits for it anyway
            flags.tolist()

    def state() -> dict[str, object]:
        return {"method": parts.method.state_dict(), "optimizer": parts.optimizer.state_dict()}

    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {
            "step": lambda: train_step(parts.model, batches, parts.optimizer, progress, parts.autocast),
            "check of a step": check,
            "update": parts.optimizer.step,
            "save": lambda: checkpoint.save(Path(folder), 1, state(), 1),
            "check of a save": lambda: not_finite(state()),
        }
        arms = {name: measure.rate_window(call, ranks.device, args.seconds) for name, call in calls.items()}
        rates = measure.take_turns(arms, args.windows)
    with Operators() as operators:
        check()
    seconds = {name: measure.summarize([1 / rate for rate in values]) for name, values in rates.items()}
    shares = {
        part: measure.summarize([a / b for a, b in zip(rates[whole], rates[part], strict=True)])
        for part, whole in (("check of a step", "step"), ("update", "step"), ("check of a save", "save"))
    }
    for name, found in seconds.items():
        share = f"  {100 * shares[name]['median']:.2f} %" if name in shares else ""
        print(
            f"{name:16} {1e3 * found['median']:9.2f} ms ({1e3 * found['p20']:.2f} to {1e3 * found['p80']:.2f}){share}"
        )
    print(f"{operators.count} operators in the check of a step")
    record = {"benchmark": "finite", "encoder": settings.encoder.name, "batch_size": settings.batch_size}
    record |= {"size_px": batches[0].views[0].shape[-1], "optimizer": settings.optim.name, "seconds": seconds}
    record |= {"device": ranks.device.type, "threads": torch.get_num_threads(), "operators": operators.count}
    measure.append(args.results, {**record, "shares": shares})
    parts.loader.close()
    distributed.shutdown()


if __name__ == "__main__":
    main()
