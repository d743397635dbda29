"""Loader throughput: DALI, torchvision v2 and lightly make SimCLR's two views of the same files, in turns.

    python benchmarks/bench_loader.py --root DIR --size 224      (ImageNet recipe)
    python benchmarks/bench_loader.py --root DIR --size 32       (CIFAR recipe: no blur, half the jitter)

Each peer runs at its fastest setting: torchvision v2 and lightly in as many worker processes as there are cores,
each tried on PIL images and on tensors, the faster one kept.  Output for all: two float32 views a sample.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from sslx import data
from sslx.bench import measure
from sslx.data import sources
from sslx.data.views import IMAGENET_MEAN, IMAGENET_STD, Augment, ViewSpec
from sslx.machine import cores

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"
CIFAR = Augment(min_scale=0.2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)


class Files(Dataset[Any]):
    """Files through a transform; ``tensors`` decodes with torchvision, otherwise PIL does."""

    def __init__(self, paths: list[str], transform: Callable[[Any], Any], tensors: bool, repeat: int) -> None:
        self.paths, self.transform, self.tensors, self.repeat = paths, transform, tensors, repeat

    def __len__(self) -> int:
        return len(self.paths) * self.repeat

    def __getitem__(self, index: int) -> Any:
        path = self.paths[index % len(self.paths)]
        if self.tensors:
            return self.transform(decode_image(path, mode=ImageReadMode.RGB))
        return self.transform(Image.open(path).convert("RGB"))


class Twice:
    """Two views by one transform."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.transform(image), self.transform(image)


def torchvision_recipe(size: int, augment: Augment) -> Twice:
    """SimCLR's recipe by torchvision v2, as its documentation writes it."""
    a = augment
    jitter = v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
    window = size // 20 * 2 + 1
    steps: list[Any] = [
        v2.ToImage(),
        v2.RandomResizedCrop(size, scale=(a.min_scale, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([jitter], a.jitter),
        v2.RandomGrayscale(a.gray),
        *([v2.RandomApply([v2.GaussianBlur(window, (0.1, 2.0))], a.blur)] if a.blur else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return Twice(v2.Compose(steps))


def torchvision_on_pil(size: int, augment: Augment) -> Twice:
    """The same on PIL images, which resize and jitter faster when small."""
    compose = torchvision_recipe(size, augment).transform
    assert isinstance(compose, v2.Compose)
    first, *rest = compose.transforms
    return Twice(v2.Compose([*rest[:-2], first, *rest[-2:]]))


def lightly_recipe(size: int, augment: Augment) -> Callable[[Any], Any]:
    """lightly's own SimCLRTransform at the same strengths."""
    warnings.filterwarnings("ignore", "The function `to_tensor")  # torchvision says so in every worker
    simclr = import_module("lightly.transforms.simclr_transform")  # in the bench extra, which type checks do without
    return simclr.SimCLRTransform(
        input_size=size,
        cj_strength=augment.brightness / 0.8,
        min_scale=augment.min_scale,
        gaussian_blur=augment.blur,
    )


def timed(make: Callable[[], Iterator[Any]], batch_size: int, seconds: float) -> Callable[[], float]:
    """A window: samples/s over at least ``seconds``, by an iterator of its own.

    It is gone before the next arm's turn: workers left alive would go on filling their queues on the cores that
    the next one is measured on.  What was prefetched during the start is used up before the clock runs.
    """

    def window() -> float:
        batches = make()
        for _ in range(5):
            next(batches)
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            samples += batch_size
        found = samples / (time.perf_counter() - start)
        del batches
        gc.collect()
        return found

    return window


def peers(
    paths: list[str], size: int, augment: Augment, batch_size: int, workers: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """What makes the batch iterators of every peer in every setting."""

    def loader(transform: Callable[[Any], Any], tensors: bool) -> Callable[[], Iterator[Any]]:
        repeat = max(1, 256 * batch_size // len(paths))
        dataset = Files(paths, transform, tensors, repeat)
        made: DataLoader[Any] = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)
        return lambda: iter(made)

    return {
        "torchvision v2 on tensors": loader(torchvision_recipe(size, augment), True),
        "torchvision v2 on PIL": loader(torchvision_on_pil(size, augment), False),
        "lightly on PIL": loader(lightly_recipe(size, augment), False),
        "lightly on tensors": loader(lightly_recipe(size, augment), True),
    }


def ours(root: Path, size: int, augment: Augment, batch_size: int, backend: str, threads: int) -> Iterator[Any]:
    """sslx's own loader."""
    settings = data.Config(source="folder", root=root, size=size, backend=backend, threads=threads)  # pyright: ignore[reportArgumentType]
    return data.training(
        settings,
        sources.build(settings, "pretrain"),
        [ViewSpec(size=size, augment=augment)] * 2,
        batch_size=batch_size,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of images")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=0, help="default: 256 at 32 px, 64 at 224")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    augment = CIFAR if args.size <= 64 else Augment()
    batch_size = args.batch_size or (256 if args.size <= 64 else 64)
    num_cores = cores.allowed()
    settings = data.Config(source="folder", root=args.root)
    paths = list(sources.build(settings, "pretrain").paths or ())
    makers = {"sslx DALI": lambda: ours(args.root, args.size, augment, batch_size, "dali", num_cores)}
    makers |= peers(paths, args.size, augment, batch_size, num_cores)
    arms = {name: timed(make, batch_size, args.seconds) for name, make in makers.items()}
    found = {name: measure.summarize(values) for name, values in measure.take_turns(arms, args.windows).items()}
    best = {
        kind: max(figures["median"] for name, figures in found.items() if name.startswith(kind))
        for kind in ("torchvision v2", "lightly")
    }
    dali = found["sslx DALI"]["median"]
    for name, figures in found.items():
        print(f"{name:28} {figures['median']:8.1f} samples/s   ({figures['p20']:.1f} to {figures['p80']:.1f})")
    ratios = {kind: dali / value for kind, value in best.items()}
    print(", ".join(f"{ratio:.2f} x {kind}" for kind, ratio in ratios.items()))
    if not args.no_record:
        record = {
            "benchmark": "loader",
            "size": args.size,
            "batch_size": batch_size,
            "images": args.root.name,
        }
        measure.append(args.results, {**record, "samples_per_s": found, "ratio_to_fastest": ratios})


if __name__ == "__main__":
    main()
