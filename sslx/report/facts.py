"""What a report says of a run, read from its folder.  Imports nothing heavy."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx import by_name
from sslx.errors import MissingInput
from sslx.machine import files
from sslx.runs import records

PICTURES = {
    "tsne.png": "Map of the features (t-SNE)",
    "umap.png": "Map of the features (UMAP)",
    "confusion.png": "Confusion matrix",
    "neighbors.png": "Nearest neighbors",
    "views.png": "Views that the method was trained on",
    "method.png": "The method's own picture",
}
"""Files that ``sslx plot`` writes into a run folder, in the order of the report, and their titles."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a run.

    curves: for each metric its steps (N,) and values (N,), without values that are not finite.
    settings: the saved config's options by their dotted names.  probe: the contents of ``probe.json``, or {}.
    seconds: the time from each start to its last logged step, all starts together.
    """

    folder: Path
    settings: Mapping[str, Any]
    status: records.Status | None
    starts: list[records.Start]
    curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
    probe: Mapping[str, Any]
    seconds: float

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        return by_name.label(str(self.settings.get("method.name", "?")))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((int(steps[-1]) for steps, _ in self.curves.values()), default=0)

    @property
    def num_samples(self) -> int:
        """The number of images that were seen, each as often as it was seen."""
        return self.step * int(self.settings.get("batch_size", 0))

    @property
    def pictures(self) -> dict[str, Path]:
        """The titles and paths of the pictures in the run folder."""
        files = {title: self.folder / file for file, title in PICTURES.items() if (self.folder / file).is_file()}
        if not (self.folder / "confusion.json").is_file():  # the picture is that of an earlier probe
            files.pop(PICTURES["confusion.png"], None)
        return files


def read(folder: Path) -> Facts:
    """Read a run folder.

    Raises MissingInput if it holds no run, ConfigError or DataError if a file in it is damaged.
    """
    from sslx.config import flags

    if not (folder / "config.json").is_file():
        raise MissingInput(f"expected the folder of a run, but {folder} has no config.json: use a folder under runs/")
    lines = list(records.read_metrics(folder / "metrics.jsonl"))
    starts = records.read_starts(folder)
    return Facts(
        folder=folder,
        settings=dict(flags.leaves(flags.read(folder / "config.json"))),
        status=records.read_status(folder),
        starts=starts,
        curves=_curves(lines),
        probe=_probe(folder / "probe.json"),
        seconds=_seconds(lines, [start.time for start in starts]),
    )


def _curves(
    lines: list[dict[str, float]],
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Return the curve of each metric.  If a restart repeated a step, its last line counts."""
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and math.isfinite(value):
                points.setdefault(name, {})[line["step"]] = value
    return {
        name: (np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)]))
        for name, by_step in points.items()
    }


def _seconds(lines: list[dict[str, float]], starts: list[float]) -> float:
    """Return the time from each start to the last line before the next one; without starts, that between all lines."""
    times = sorted(line["time"] for line in lines if math.isfinite(line.get("time", math.nan)))
    if not times:
        return 0.0
    bounds = [*(starts or times[:1]), math.inf]
    total = 0.0
    for start, end in itertools.pairwise(bounds):
        inside = [time for time in times if start <= time < end]
        total += inside[-1] - start if inside else 0.0
    return total


def _probe(path: Path) -> dict[str, Any]:
    try:
        return dict(files.parse_json(files.read_bytes(path)))
    except (OSError, ValueError, json.JSONDecodeError):
        return {}
