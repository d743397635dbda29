"""``sslx methods``, ``sslx sources`` and ``sslx recipes``: tables with what each is, its data, cost and score."""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sslx import methods
from sslx.config import flags, parser, presets
from sslx.console.words import wrapped
from sslx.data import sources


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods with their purpose, cost and paper."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """List the sources of images: what each is, its options."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes with their data, encoder, hardware and score."""


def methods_main(argv: Sequence[str]) -> int:
    """Print the table of methods and return 0."""
    columns = ("method", "what it does", "encoders", "cost of a step per image", "paper")
    table = _table("sslx methods", Methods, columns, argv)
    for name in methods.available():
        about = presets.about(name)
        table.add_row(
            name,
            about.get("what") or methods.summary(name),
            about.get("encoders", "any"),
            about.get("cost", "-"),
            about.get("paper") or _paper(methods.summary(name)),
        )
    _print(table)
    _print_last(
        "Train with one: sslx pretrain --method.name byol --source.root PHOTOS.  List its options: ... --help-all"
    )
    return 0


def sources_main(argv: Sequence[str]) -> int:
    """Print the table of sources and return 0."""
    table = _table("sslx sources", Sources, ("source", "what it reads", "options"), argv)
    for name in sources.available():
        own = [field.name.replace("_", "-") for field in fields(sources.options(name)) if field.name != "name"]
        table.add_row(name, sources.summary(name), " ".join(f"--source.{option}" for option in own) or "-")
    _print(table)
    _print_last("Read one: sslx pretrain --source.name stl10 --source.download.  A source of your own is a .py file")
    return 0


def recipes_main(argv: Sequence[str]) -> int:
    """Print the table of recipes and return 0."""
    columns = ("recipe", "data", "encoder", "for", "score")
    table = _table("sslx recipes", Recipes, columns, argv)
    for name, path in flags.recipes().items():
        tree, comments = flags.read(path), _comments(path)
        table.add_row(
            name,
            tree.get("source", {}).get("name", "digits"),
            _encoder(tree),
            comments.get("Hardware", "-").rstrip("."),
            _score(comments),
        )
    _print(table)
    _print_last("Train one: sslx pretrain simclr_digits.  Show its settings: sslx pretrain simclr_digits --help")
    return 0


def _table(prog: str, kind: type[object], columns: Sequence[str], argv: Sequence[str]) -> Table:
    """Return the empty table of a command that takes no arguments but --help."""
    parser.parse(kind, argv, prog)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])  # keeps a name whole, so that it can be copied
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_last(line: str) -> None:
    width = shutil.get_terminal_size().columns
    sys.stdout.write(f"\n{wrapped(line, width) if sys.stdout.isatty() else line}\n")


def _paper(text: str) -> str:
    match = re.search(r"arXiv (\d{4}\.\d{5})", text)
    return match[1] if match else "-"


def _comments(path: Path) -> dict[str, str]:
    """Return the facts in the comments at the head of a recipe, such as ``# Hardware: ...``, by name."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    pairs = re.findall(r"(Hardware|Score): (.*?)(?= Score:| Published| Not measured|$)", text)
    return {key: value.strip() for key, value in pairs}


def _encoder(tree: dict[str, Any]) -> str:
    encoder = tree.get("encoder", {})
    name = encoder.get("name", "resnet18")
    return f"{name}, smaller" if encoder.get("layers") else name


def _score(comments: dict[str, str]) -> str:
    scores = re.findall(r"(kNN|linear) (\d+(?:\.\d+)?)", comments.get("Score", ""))
    return ", ".join(f"{probe} {value} %" for probe, value in scores) or "not measured"
