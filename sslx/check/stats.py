"""``sslx data stats``: the number, sizes, channels and depth of images, and each channel's mean and deviation."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.check import findings, report
from sslx.config.check import StatsConfig
from sslx.console.progress import reporting
from sslx.console.words import plural
from sslx.data import sources, statistics
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import Source
from sslx.errors import DataError
from sslx.machine import cores

_CHUNK = 256
Measured = tuple[tuple[int, int], npt.NDArray[np.float64]]
"""The height and width of an image, and its ``statistics.moments``."""


def main(config: StatsConfig) -> int:
    """Measure the images, print the numbers, write the file that the config names, and return the exit code."""
    source = sources.build(config.source, "pretrain", config.data, say=report.say)
    for line in (source.describe(), *source.notes):
        report.say(line)
    images = _measured(source)
    if not images:
        raise DataError(f"none of the images of {source.name} can be read: sslx data check says why")
    sides = np.array([side for side, _ in images])
    mean, std = statistics.mean_and_std(np.sum([moments for _, moments in images], axis=0), len(images))
    unreadable, channels = len(source) - len(images), source.facts.channels
    quantiles = {name: findings.quantiles(sides[:, i]) for i, name in ((1, "width"), (0, "height"))}
    report.say(report.sizes(quantiles))
    report.say(channels.in_words)
    if unreadable:
        report.say(f"{plural(unreadable, 'image')} cannot be read: sslx data check says why")
    for number, values in enumerate(zip(mean.tolist(), std.tolist(), strict=True), 1):
        report.say("channel {}: mean {:.4g}, standard deviation {:.4g}, of values from 0 to 1".format(number, *values))
    report.say(statistics.flags(statistics.rounded(mean, std)))
    if config.output:
        facts: dict[str, Any] = {
            "source": source.name,
            "num_images": len(source),
            "num_unreadable": unreadable,
            **{name: dict(zip(("min", "median", "max"), values, strict=True)) for name, values in quantiles.items()},
            "channels": channels.num,
            "is_rgb": channels.is_rgb,
            "dtype": channels.dtype,
            "range": [channels.black, channels.full_scale],
            "mean": mean.tolist(),
            "std": std.tolist(),
        }
        report.write(config.output, json.dumps(facts, indent=1) + "\n")
    return 0


def _measured(source: Source) -> list[Measured]:
    """Return what was measured of all images that can be read."""
    found = list[Measured | None]()

    def measure(index: int) -> Measured | None:
        try:
            image = statistics.pixels(source, index)
        except Unreadable:
            return None
        return (image.shape[0], image.shape[1]), statistics.moments(image, source.facts.channels)

    with reporting(True, "images") as progress, ThreadPoolExecutor(cores.allowed(), "stats") as pool:
        for start in range(0, len(source), _CHUNK):  # bounded, so that an error or Ctrl-C ends it soon
            found += pool.map(measure, range(start, min(start + _CHUNK, len(source))))
            progress(len(found), len(source))
    return [one for one in found if one is not None]
