"""Cost of checking a step and a checkpoint for numbers that are not finite, beside the step and the save themselves.

    python benchmarks/run.py finite

The default is a ResNet-18 at 32 px; other options are those of ``sslx pretrain``.  In turns, in one process: the step
of ``sslx pretrain``; the check in it (norms of the gradients, agreement of the ranks, a copy of the buffers and their
return, the masked metrics, the verdict that the host reads); the optimizer's update; a save; the check in it.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import images
import torch
from harness import Session, benchmark
from torch.utils._python_dispatch import TorchDispatchMode

from sslx import config, distributed, optim
from sslx.bench import measure
from sslx.runs import checkpoint
from sslx.runs.state import not_finite
from sslx.train import finite
from sslx.train.build import build
from sslx.train.step import train_step

DEFAULTS = [
    *images.flags("digits"),
    *"--data.size 32 --data.backend synthetic --encoder.name resnet18 --batch-size 128".split(),
    *"--optim.name sgd --precision fp32".split(),
]


class Operators(TorchDispatchMode):
    """Counts operators, each of which launches one kernel or a few on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@benchmark(windows=measure.WINDOWS, seconds=1.0, passes_flags=True)
def run(session: Session) -> None:
    settings = config.load([*DEFAULTS, *session.flags])
    ranks = distributed.init(settings.device)
    parts = build(settings, ranks, lambda _: None)
    replace(parts.plan.schedule, peak_lr=0.0).apply(parts.optimizer, 0.0)
    batches = [next(parts.loader)]
    metrics = train_step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast)
    gradients = [p.grad for p in parts.method.parameters() if p.grad is not None]

    def check() -> None:
        before = finite.Buffers(parts.method)
        taken = finite.agreed(metrics["loss"], optim.global_norm(gradients))
        before.put_back(unless=taken)
        parts.method.progress.masked_fill_(~taken, 1.0)
        finite.counted(metrics)
        flags = torch.stack([metrics["taken"].double(), metrics["loss"].double()])
        if ranks.device.type == "cpu":  # the host reads those of a GPU where it waits anyway
            flags.tolist()

    def state() -> dict[str, object]:
        return {"method": parts.method.state_dict(), "optimizer": parts.optimizer.state_dict()}

    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {
            "step": lambda: train_step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast),
            "check of a step": check,
            "update": parts.optimizer.step,
            "save": lambda: checkpoint.save(Path(folder), 1, state(), 1),
            "check of a save": lambda: not_finite(state()),
        }
        arms = {name: measure.rate_window(call, ranks.device, session.options.seconds) for name, call in calls.items()}
        rates = measure.take_turns(arms, session.options.windows)
    with Operators() as operators:
        check()
    seconds = {name: measure.summarize([1 / rate for rate in values]) for name, values in rates.items()}
    shares = {
        part: measure.summarize([a / b for a, b in zip(rates[whole], rates[part], strict=True)])
        for part, whole in (("check of a step", "step"), ("update", "step"), ("check of a save", "save"))
    }
    for name, summary in seconds.items():
        share = f"  {100 * shares[name]['median']:.2f} %" if name in shares else ""
        print(f"{name:16} {measure.text(summary, 2, scale=1e3)} ms{share}")
    print(f"{operators.count} operators in the check of a step")
    session.record(encoder=settings.encoder.name, batch_size=settings.batch_size, seconds=seconds, shares=shares,
                   size_px=batches[0].views[0].shape[-1], optimizer=settings.optim.name, device=ranks.device.type,
                   threads=torch.get_num_threads(), operators=operators.count)  # fmt: skip
    parts.loader.close()
    distributed.shutdown()
