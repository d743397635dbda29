"""``sslx data check``: looks at all images of a source and says what is wrong with them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslx.check import findings, images
from sslx.check.findings import Finding
from sslx.check.images import Looks
from sslx.config.check import CheckConfig
from sslx.console.progress import reporting
from sslx.console.words import plural, shown
from sslx.data import sources
from sslx.data.sources import Source
from sslx.errors import DataError, MissingInput, StorageError
from sslx.machine import cores, files


def main(config: CheckConfig) -> int:
    """Look at the images, print what was found, write the files that the config names, and return the exit code."""
    source = sources.build(config.source, "pretrain", config.data, say=say)
    say(source.describe())
    for line in source.notes:
        say(line)
    test = _test_split(config, source)
    looks = _look(source, "images")
    looks_of_test = None if test is None else (test, _look(test, "test images"))
    found = findings.of_images(source, looks, looks_of_test)
    for line in _statistics(looks):
        say(line)
    excluded = sorted({index for finding in found for index in finding.excluded})
    if found:
        Console().print(_table(source, found))
    else:
        say("nothing was found to be wrong")
    if config.output:
        write(config.output, json.dumps(_as_json(source, looks, found), indent=1) + "\n")
    if config.list:
        write(config.list, "".join(f"{source.path(index)}\n" for index in excluded))
        say(f"to train without them: sslx pretrain ... --data.exclude {shown(config.list)}")
    elif excluded:
        are = "is" if len(excluded) == 1 else "are"
        say(f"{plural(len(excluded), 'image')} {are} better left out: --list FILE writes their paths")
    return 0


def _test_split(config: CheckConfig, source: Source) -> Source | None:
    try:
        test = sources.build(config.source, "test", config.data, say=say, training=source)
    except (MissingInput, DataError):
        return None
    say(f"test split: {test.describe()}")
    return test


def _look(source: Source, what: str) -> Looks:
    with reporting(True, what) as progress:
        return images.look(source, cores.allowed(), progress)


def _statistics(looks: Looks) -> list[str]:
    readable = looks.readable
    if not len(readable):
        return []
    sides = {"width": looks.width, "height": looks.height}
    quantiles = {name: findings.quantiles(values[readable]) for name, values in sides.items()}
    counted = ", ".join(f"{kind} {count:,}" for kind, count in findings.kinds(looks).items())
    numbers = (f"{' '.join(f'{value:.3f}' for value in values)}" for values in (looks.mean, looks.std))
    of = "red, green, blue" if len(looks.mean) == 3 else "the channels"
    return [
        sizes(quantiles),
        counted,
        "mean {}, standard deviation {} of {}".format(*numbers, of),
        f"decodes {len(readable) / max(looks.seconds, 1e-9):,.0f} images/s on one core",
    ]


def sizes(quantiles: Mapping[str, tuple[int, int, int]]) -> str:
    """Return a line on the smallest, the median and the largest of some sides in pixels, by their names."""
    words = "{} {:,} to {:,} pixels, median {:,}"
    return "; ".join(words.format(name, low, high, median) for name, (low, median, high) in quantiles.items())


def _table(source: Source, found: list[Finding]) -> Table:
    table = Table("images", "found", "for example", box=None, pad_edge=False, header_style="bold")
    table.columns[0].justify = "right"
    for finding in found:
        reason = f" ({finding.reasons[0]})" if finding.reasons else ""
        example = Text(f"{source.where(finding.indices[0])}{reason}")
        words = Text.assemble(f"{finding.name}\n", (finding.advice, "dim"))
        table.add_row(f"{len(finding.indices):,}", words, example)
    return table


def _as_json(source: Source, looks: Looks, found: list[Finding]) -> dict[str, Any]:
    readable = looks.readable
    sides = {
        name: dict(zip(("min", "median", "max"), findings.quantiles(values[readable]), strict=True))
        for name, values in (("width", looks.width), ("height", looks.height))
        if len(readable)
    }
    return {
        "source": source.name,
        "num_images": len(source),
        "kinds": findings.kinds(looks),
        **sides,
        "mean": looks.mean.tolist(),
        "std": looks.std.tolist(),
        "images_per_s_and_core": len(readable) / looks.seconds if looks.seconds else None,
        "findings": [
            {
                "name": finding.name,
                "advice": finding.advice,
                "images": [source.path(index) for index in finding.indices],
                "excluded": [source.path(index) for index in finding.excluded],
                "reasons": list(finding.reasons),
            }
            for finding in found
        ],
        "classes": None
        if source.facts.labels is None or source.facts.classes is None
        else dict(
            zip(
                source.facts.classes,
                np.bincount(source.facts.labels, minlength=len(source.facts.classes)).tolist(),
                strict=True,
            )
        ),
    }


def write(path: Path, text: str) -> None:
    """Write a file and say so; raise StorageError, in one line, if that is impossible."""
    try:
        files.replace(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: name another file") from error
    say(f"wrote {shown(path)}")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")
