"""Is ``embed`` as fast as the forward pass of its encoder alone, from image files and from arrays in memory?

    python benchmarks/run.py embed                                  (ResNet-18, 224 px)
    python benchmarks/run.py embed --size 16 --stem small --num-images 4000
    python benchmarks/run.py embed --root PHOTOS

The arms take turns: ``embed`` of files, ``embed`` of the same images as arrays, and the encoder on views that are
prepared in memory, in batches of the same size.  Without --root, the files are crops of the two photos that come with
scikit-learn, a seventh larger than the view.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import images
import numpy as np
import torch
from bench_photos import crop_bundled_photos
from harness import Session, benchmark, option
from PIL import Image

from sslx import encoders, rng
from sslx.bench import measure
from sslx.data.views import eval_view
from sslx.machine import devices
from sslx.trained import Trained

GOAL = 0.95
"""The share of the encoder's own speed that ``embed`` is meant to reach."""


def untrained(name: str, stem: Literal["imagenet", "small"], size: int, device: torch.device) -> Trained:
    """Return a checkpoint that was never saved: an encoder with random weights."""
    with rng.initial_weights(0):
        encoder = encoders.build(encoders.Config(name=name, stem=stem), size)
    return Trained(
        folder=Path(), checkpoint=Path(), step=0, size=size, view=eval_view(size), recipe=encoder.recipe,
        exported="encoder", device=device, config_text="", weights=encoder.state_dict(),
    )  # fmt: skip


def timed(call: Callable[[], object], num_images: int) -> Callable[[], float]:
    """Return a function that calls once and returns the images per second."""

    def rate() -> float:
        start = time.perf_counter()
        call()
        return num_images / (time.perf_counter() - start)

    return rate


@benchmark(
    option("--root", type=Path, help="folder of images"),
    option("--images", default="crops of scikit-learn's two photos", help="name of the images, for the record"),
    option("--encoder", default="resnet18", help="name of a timm model"),
    option("--stem", default="imagenet", choices=("imagenet", "small"), help="stem of a ResNet"),
    option("--size", type=int, default=224, help="side of the views in pixels"),
    option("--num-images", type=int, default=512, help="images in each window"),
    option("--batch-size", type=int, default=64, help="images that are computed at once"),
    windows=7,
)
def run(session: Session) -> None:
    options, device = session.options, devices.of_rank("auto", 0)
    noise = measure.warn_of_noise(device, print)
    trained = untrained(options.encoder, options.stem, options.size, device)
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder)
        if not options.root:
            crop_bundled_photos(root, options.num_images, min(options.size * 8 // 7, 400))
        paths = images.paths(root)[: options.num_images]
        arrays = [np.array(Image.open(path).convert("RGB")) for path in paths]
        views = torch.stack([trained.transform(array) for array in arrays])
        views = views.contiguous(memory_format=torch.channels_last).to(device)
        batches, autocast = views.split(options.batch_size), devices.autocast(device)

        @torch.no_grad()
        def forward() -> list[torch.Tensor]:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                return [trained.encoder(batch).float().cpu() for batch in batches]

        def embed(pictures: list[str] | list[np.ndarray]) -> Callable[[], object]:
            return lambda: trained.embed(pictures, batch_size=options.batch_size, progress=False)

        arms = {"encoder alone": forward, "embed, files": embed(paths), "embed, arrays": embed(arrays)}
        rates = measure.take_turns({name: timed(call, len(paths)) for name, call in arms.items()}, options.windows)
    shares = {
        name: measure.summarize([value / alone for value, alone in zip(values, rates["encoder alone"], strict=True)])
        for name, values in rates.items()
    }
    for name, values in rates.items():
        speed, share = measure.text(measure.summarize(values), 1), measure.text(shares[name], 1, 100)
        print(f"{name:14} {speed} images/s, {share} % of the encoder alone (goal: {100 * GOAL:.0f} %)")
    session.record(
        images=options.images, encoder=options.encoder, stem=options.stem, size_px=options.size, noise=noise,
        num_images=len(paths), batch_size=options.batch_size, share=shares,
        images_per_s={name: measure.summarize(values) for name, values in rates.items()},
    )  # fmt: skip
