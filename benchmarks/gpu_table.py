"""The table of what ``gpu_suite.py`` has measured: a row per part, how it ended, and its figures beside their goals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]
GOALS = {"step_32px": "25,000 samples/s", "step_224px": "3,000 samples/s", "nt_xent": "31 ms at B = 65,536"}


def table(parts: list[str], out: Path) -> str:
    """The table of these parts, from the files in the folder."""
    drawn = Table("part", "state", "figures", "goal", title=_machine(parts, out), title_justify="left")
    for name in parts:
        drawn.add_row(
            *map(Text, (name, _state(out / f"{name}.json"), "\n".join(_figures(name, out)), GOALS.get(name, "")))
        )
    console = Console(width=120, record=False, file=None, no_color=True)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip()


def _machine(parts: list[str], out: Path) -> Text:
    """The machine on which the newest part ran."""
    ended = [json.loads(path.read_text()) for name in parts if (path := out / f"{name}.json").exists()]
    if not ended:
        return Text("no part has run")
    newest = max(ended, key=lambda each: each["time"])
    return Text(f"{newest['gpu'] or newest['cpu']}, torch {newest['versions'].get('torch')}, commit {newest['commit']}")


def _state(path: Path) -> str:
    if not path.exists():
        return "has not run"
    ended = json.loads(path.read_text())
    how = {0: "done", 75: "continues", 124: "out of time"}.get(ended["code"], f"failed ({ended['code']})")
    return f"{how}, {ended['seconds']:.0f} s"


def _figures(name: str, out: Path) -> list[str]:
    """A line for each figure of a part; without figures, the last line that it printed."""
    path, log = out / f"{name}.jsonl", out / f"{name}.log"
    if path.exists():
        return [line for record in map(json.loads, path.read_text().splitlines()) for line in _of(record)]
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return [line.strip("= ") for line in lines if line.strip("= ")][-1:]


def _of(record: Record) -> list[str]:
    return _LINES[record["benchmark"]](record)


def _nt_xent(record: Record) -> list[str]:
    if "ms" not in record:
        return [f"B = {record['batch_size']:,}, {record['arm']}: {record['peak_mib']} MiB"]
    return [f"B = {record['batch_size']:,}, {record['arm']}: {record['ms']['median']:.3f} ms"]


def _step(record: Record) -> list[str]:
    lines = [f"{arm}: {rates['median']:,.0f} samples/s" for arm, rates in record["samples_per_s"].items()]
    if "step alone" in record["mfu"]:
        lines.append(f"MFU {100 * record['mfu']['step alone']:.0f} %, peak {record['peak_bytes'] / 2**30:.1f} GiB")
    return lines


def _scaling(record: Record) -> list[str]:
    rate = record["batch_size"] / record["step_s"]["median"]
    return [f"{record['world_size']} ranks, {record['kind']}: {rate:,.0f} samples/s"]


def _accuracy(record: Record) -> list[str]:
    score = next(score for score in record["scores"] if score["name"] == "pretrained encoder")
    return [f"kNN {100 * score['knn']:.1f} %, linear {100 * score['linear']:.1f} %, {record['train_s']:.0f} s"]


_LINES: dict[str, Callable[[Record], list[str]]] = {
    "nt_xent": _nt_xent,
    "step": _step,
    "scaling": _scaling,
    "accuracy": _accuracy,
}
