"""The same SimCLR job by sslx, by lightly's parts and by a plain torchvision script, each in a process of its own.

    python benchmarks/peers.py lightly --root DIR --encoder resnet18 --tuned --workers 2 --seconds 10

trains, and prints a JSON line with the samples/s over ``--seconds`` after a warm-up.  With ``--save-at 300 600 --out
DIR`` it trains on and saves its encoder after 300 and 600 s.  ``run.py peers`` and ``run.py time_to_accuracy`` call it.

lightly: as in its documentation's example (torch's DataLoader, SimCLRTransform, SimCLRProjectionHead, NTXentLoss, SGD);
--tuned adds what sslx sets in torch: channels-last, torch.compile, and bf16 if the CPU is fast in it (AMX).  Only sslx
keeps freed memory (``sslx.machine.memory``).
plain: a script like those of tutorials, a loop over torchvision's transforms with an N x N cross-entropy, corrected so
that a sample is not its own negative.
"""

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import images
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sslx import config, distributed, encoders, rng
from sslx.bench.advice import Workload
from sslx.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslx.machine import compiler
from sslx.train.build import fast_bf16

BATCH_SIZE, SIZE, TEMPERATURE = 128, 32, 0.2
LR, WEIGHT_DECAY = 0.06, 5e-4
WARM_UP, WARM_UP_S = 6, 6.0  # more steps than a loader prefetches; fewer if they take longer than the seconds
PRECISION = "bfloat16" if fast_bf16(torch.device("cpu")) else "float32"
"""The default precision of sslx on this CPU, which the tuned peers use as well."""
SHAPES = {
    "resnet18": ([2, 2, 2, 2], [64, 128, 256, 512]),
    "small resnet": ([1, 1, 1, 1], [32, 64, 128, 256]),
}
FLAGS = (
    f"--batch-size {BATCH_SIZE} --compile on --data.size {SIZE} --optim.name sgd "
    f"--optim.weight-decay {WEIGHT_DECAY} "
    f"--method.temperature {TEMPERATURE} --method.hidden-dim 512 --method.projection-dim 128 --augment.min-scale 0.2 "
    "--augment.brightness 0.4 --augment.contrast 0.4 --augment.saturation 0.4 --augment.hue 0.1 --augment.blur 0"
).split()
"""The job as options of sslx."""


class Images(Dataset[Any]):
    """Two views of each image file."""

    def __init__(self, root: Path, transform: Callable[[Any], Any]) -> None:
        self.paths = images.paths(root)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


class SmallCNN(nn.Module):
    """Three convolutions, as in many tutorials: (B, 3, 32, 32) -> (B, 128)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.dim = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def encoder_of(name: str) -> Any:
    """The encoder that all peers train."""
    rng.seed_torch(0)
    if name == "cnn":
        return SmallCNN()
    layers, channels = SHAPES[name]
    return encoders.build(encoders.Config(name="resnet18", layers=tuple(layers), channels=tuple(channels)), SIZE)


def lightly(args: argparse.Namespace) -> Iterator[tuple[nn.Module, int]]:
    """lightly's parts in the loop of its example; yields the encoder and the number of samples after each step."""
    warnings.filterwarnings("ignore", "The function `to_tensor")  # every worker repeats it
    transforms_module, heads, losses = (
        import_module(f"lightly.{name}") for name in ("transforms.simclr_transform", "models.modules.heads", "loss")
    )
    transform = transforms_module.SimCLRTransform(input_size=SIZE, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0)
    encoder = encoder_of(args.encoder)
    head = heads.SimCLRProjectionHead(encoder.dim, 512, 128)
    return training(args, transform, encoder, head, losses.NTXentLoss(temperature=TEMPERATURE), args.tuned)


def plain(args: argparse.Namespace) -> Iterator[tuple[nn.Module, int]]:
    """torchvision's transforms, and the loss as its formula has it."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),  # the same as in the probes
        ]
    )

    def twice(image: Any) -> tuple[Any, Any]:
        return transform(image), transform(image)

    def nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        positive = torch.arange(len(z)).roll(len(z1))
        return F.cross_entropy(logits, positive)

    encoder = encoder_of(args.encoder)
    width = encoder.dim
    head = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 128))
    return training(args, twice, encoder, head, nt_xent, args.tuned)


def training(
    args: argparse.Namespace,
    transform: Callable[[Any], Any],
    encoder: Any,
    head: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    tuned: bool,
) -> Iterator[tuple[nn.Module, int]]:
    """The training loop of both peers."""
    model = nn.Sequential(encoder, head)
    if tuned:
        compiler.configure_for_cpu()
        model.compile()
    layout = (
        torch.channels_last if tuned else torch.contiguous_format
    )  # the encoders of sslx are built in channels_last
    for weight in model.parameters():
        weight.data = weight.data.contiguous(memory_format=layout) if weight.dim() == 4 else weight.data
    optimizer: torch.optim.Optimizer
    if args.peer == "plain":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)
    loader: DataLoader[Any] = DataLoader(
        Images(args.root, transform),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    half = tuned and PRECISION == "bfloat16"
    samples = 0
    while True:
        for views in loader:
            x1, x2 = (view.contiguous(memory_format=torch.channels_last) if tuned else view for view in views)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                z1, z2 = model(x1), model(x2)
            value = loss(z1.float(), z2.float())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            samples += len(x1)
            yield encoder, samples


def sslx(args: argparse.Namespace) -> Iterator[tuple[nn.Module, int]]:
    """The training of ``sslx pretrain`` with these flags, without its logging."""
    layers, channels = ([str(number) for number in numbers] for numbers in SHAPES[args.encoder])
    flags = [*FLAGS, *images.flags("folder", args.root), "--encoder.layers", *layers, "--encoder.channels", *channels]
    workload = Workload(config.load([*flags, "--data.threads", str(args.workers)]), distributed.init("cpu"))
    replace(workload.parts.plan.schedule, peak_lr=LR, warmup=0.0).apply(workload.parts.optimizer, 0.0)
    samples = 0
    while True:
        workload.train()
        samples += BATCH_SIZE
        yield workload.parts.method.encoder, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["sslx", "lightly", "plain"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--encoder", choices=[*SHAPES, "cnn"], default="resnet18")
    parser.add_argument("--tuned", action="store_true", help="channels-last, compiled, and bf16 if that is faster")
    parser.add_argument("--workers", type=int, default=2, help="loader processes; threads for sslx")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement")
    parser.add_argument(
        "--save-at", type=float, nargs="*", default=[], help="seconds after the start at which the encoder is saved"
    )
    parser.add_argument("--since", type=float, help="start of the clock as Unix time (default: after the imports)")
    parser.add_argument("--out", type=Path, help="folder of the saved encoders")
    args = parser.parse_args()
    started = args.since or time.time()
    steps = {"sslx": sslx, "lightly": lightly, "plain": plain}[args.peer](args)
    samples = 0
    if args.save_at:
        for mark in args.save_at:
            encoder, samples = next((e, s) for e, s in steps if time.time() - started >= mark)
            torch.save(encoder.state_dict(), args.out / f"{args.peer}_{mark:.0f}.pt")
            print(json.dumps({"at_s": time.time() - started, "samples": samples}), flush=True)
        return
    next(steps)  # may compile
    begun = time.perf_counter()
    for number in range(WARM_UP - 1):
        _, samples = next(steps)
        if number and time.perf_counter() - begun > WARM_UP_S:
            break
    start, before = time.perf_counter(), samples
    while time.perf_counter() - start < args.seconds:
        _, samples = next(steps)
    print(json.dumps({"samples_per_s": (samples - before) / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
