"""Loader throughput: DALI, torchvision v2 and lightly make SimCLR's two views of the same files, in turns.

    python benchmarks/run.py loader --root DIR --size 224      (ImageNet recipe)
    python benchmarks/run.py loader --root DIR --size 32       (CIFAR recipe: no blur, half the jitter)

Each peer runs at its fastest setting: torchvision v2 and lightly use one worker process per core and run on PIL images
and on tensors, of which the faster counts.  All of them return two float32 views per sample.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import images
import torch
from harness import Session, benchmark, option
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from sslx import data
from sslx.bench import measure
from sslx.data import sources
from sslx.data.sources import SourceConfig, folder
from sslx.data.views import IMAGENET_MEAN, IMAGENET_STD, Augment, ViewSpec
from sslx.distributed import Ranks
from sslx.machine import cores

CIFAR = Augment(min_scale=0.2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)


class Files(Dataset[Any]):
    """Image files through a transform, decoded by torchvision (``tensors``) or by PIL."""

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
    """Two views by the same transform."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.transform(image), self.transform(image)


def torchvision_recipe(size: int, augment: Augment) -> Twice:
    """SimCLR's recipe in torchvision v2, as in its documentation."""
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
    """The same on PIL images, which are faster to resize and jitter when they are small."""
    compose = torchvision_recipe(size, augment).transform
    assert isinstance(compose, v2.Compose)
    first, *rest = compose.transforms
    return Twice(v2.Compose([*rest[:-2], first, *rest[-2:]]))


def lightly_recipe(size: int, augment: Augment) -> Callable[[Any], Any]:
    """lightly's own SimCLRTransform with the same strengths."""
    warnings.filterwarnings("ignore", "The function `to_tensor")  # every worker repeats it
    simclr = import_module("lightly.transforms.simclr_transform")  # the type checker runs without the extra [bench]
    return simclr.SimCLRTransform(
        input_size=size,
        cj_strength=augment.brightness / 0.8,
        min_scale=augment.min_scale,
        gaussian_blur=augment.blur,
    )


def timed(make: Callable[[], Iterator[Any]], batch_size: int, seconds: float) -> Callable[[], float]:
    """A window that measures samples/s over at least ``seconds``, with an iterator of its own.

    The iterator is deleted before the next arm's turn, because live workers would keep filling their queues on the
    cores that the next arm needs.  Batches prefetched during the start are used up before the clock starts.
    """

    def window() -> float:
        batches = make()
        for _ in range(5):
            next(batches)
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            samples += batch_size
        rate = samples / (time.perf_counter() - start)
        del batches
        gc.collect()
        return rate

    return window


def peers(
    paths: list[str], size: int, augment: Augment, batch_size: int, workers: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """For each peer and setting, a function that starts an iterator of batches."""

    def loader(transform: Callable[[Any], Any], tensors: bool) -> Callable[[], Iterator[Any]]:
        repeat = max(1, 256 * batch_size // len(paths))
        dataset = Files(paths, transform, tensors, repeat)
        batches: DataLoader[Any] = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)
        return lambda: iter(batches)

    return {
        "torchvision v2 on tensors": loader(torchvision_recipe(size, augment), True),
        "torchvision v2 on PIL": loader(torchvision_on_pil(size, augment), False),
        "lightly on PIL": loader(lightly_recipe(size, augment), False),
        "lightly on tensors": loader(lightly_recipe(size, augment), True),
    }


def dali(root: Path, size: int, augment: Augment, batch_size: int, threads: int) -> Iterator[Any]:
    """The loader of sslx."""
    return of_source(folder.Config(root=root), "dali", size, augment, batch_size, threads)


def of_source(
    config: SourceConfig, backend: Any, size: int, augment: Augment, batch_size: int, threads: int
) -> Iterator[Any]:
    """The loader of sslx with two views of each image of a source."""
    return data.training(
        data.Config(size=size, backend=backend, threads=threads),
        sources.build(config, "pretrain"),
        [ViewSpec(size=size, augment=augment)] * 2,
        batch_size=batch_size,
        seed=0,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=torch.float32,
    )


@benchmark(
    option("--root", type=Path, required=True, help="folder of images"),
    option("--size", type=int, default=224, help="side of the views, in pixels"),
    option("--batch-size", type=int, default=0, help="default: 256 up to 64 px, otherwise 64"),
    windows=5,
    seconds=8.0,
)
def run(session: Session) -> None:
    options = session.options
    torch.set_num_threads(1)
    augment = CIFAR if options.size <= 64 else Augment()
    batch_size = options.batch_size or (256 if options.size <= 64 else 64)
    num_cores = cores.allowed()
    makers = {"sslx DALI": lambda: dali(options.root, options.size, augment, batch_size, num_cores)}
    makers |= peers(images.paths(options.root), options.size, augment, batch_size, num_cores)
    arms = {name: timed(make, batch_size, options.seconds) for name, make in makers.items()}
    rates = {name: measure.summarize(values) for name, values in measure.take_turns(arms, options.windows).items()}
    for name, summary in rates.items():
        print(f"{name:28} {measure.text(summary, 1)} samples/s")
    ratios = {
        peer: rates["sslx DALI"]["median"]
        / max(summary["median"] for name, summary in rates.items() if name.startswith(peer))
        for peer in ("torchvision v2", "lightly")
    }
    print(", ".join(f"{ratio:.2f} x {peer}" for peer, ratio in ratios.items()))
    session.record(size=options.size, batch_size=batch_size, images=options.root.name, samples_per_s=rates,
                   ratio_to_fastest=ratios)  # fmt: skip
