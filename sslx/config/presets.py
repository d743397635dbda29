"""What is taken where neither a recipe nor a flag says: chosen by method, encoder, batch, source and images.

Each method has a file ``recipes/defaults/NAME.toml`` with tables by situation, each with its reason (``why``) and the
published source: ``all``; ``small`` and ``large`` batches; ``cpu``, small ones without a GPU, so short runs; ``vit``,
any transformer; ``tiny`` images.  Later ones win.  A method without such a file gets plain defaults.
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sslx.config import flags
from sslx.data.sources.config import SourceConfig

Config = TypeVar("Config", bound=Any)
SMALL_BATCH = 1024
"""Below it are batches that papers' LARS settings are not for."""
FEW_STEPS, FEW_EPOCHS = 500, 10
"""With fewer a run is too short to expect much of it."""
SMALL_SIDE = 64
"""Pixels: views up to here are small."""
_SITUATIONS = ("all", "small", "large", "cpu", "vit", "tiny")
"""Tables of a base file, beside ``about``, what a list of methods says of it."""
_CONVOLUTIONAL = ("res", "reg", "efficientnet", "mobilenet", "densenet", "vgg", "dla", "hrnet", "inception", "xception")
"""Parts of names of timm's models that train by SGD; the others are transformers and what trains as they do."""
_PLAIN: dict[str, dict[str, Any]] = {
    "small": {"why": "batches below 1,024: SGD", "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4}},
    "large": {"why": "batches of 1,024 and more: LARS", "optim": {"name": "lars", "lr": 0.3, "weight_decay": 1e-6}},
    "vit": {"why": "transformers: AdamW", "optim": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.05}},
}
ON_CPU = {"batch_size": 64, "epochs": 30}
SIDE_ON_CPU = 96
"""Pixels of the views of larger images where there is no GPU."""


@dataclass(frozen=True)
class Choice:
    """Values of options by dotted name, and why."""

    why: str
    values: dict[str, Any]


@cache
def _tables(method: str) -> dict[str, dict[str, Any]]:
    path = Path(__file__).parents[1] / "recipes" / "defaults" / f"{method}.toml"
    if not path.exists():
        return _PLAIN
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert tables.keys() <= {"about", *_SITUATIONS}, f"{path} has other tables than about and {_SITUATIONS}"
    return tables


def about(method: str) -> dict[str, str]:
    """What a list of methods says of it: what, encoders, cost (for each image of a step), paper."""
    return dict(_tables(method).get("about", {}))


def is_transformer(encoder: str) -> bool:
    """Whether a timm model of this name trains by AdamW: all but the classic convolutional ones."""
    name = encoder.lower()
    return not any(part in name.partition(".")[0] for part in _CONVOLUTIONAL) or "vit" in name


def encoder(method: str) -> str | None:
    """The encoder that a method brings; None: any."""
    return _tables(method).get("all", {}).get("encoder", {}).get("name")


def names(method: str, source: SourceConfig) -> set[str]:
    """All options that may be chosen for a method and a source, by dotted name."""
    tables = [table for key, table in _tables(method).items() if key in _SITUATIONS]
    inside = {name for table in tables for name, _ in flags.leaves(table)} - {"why"}
    return inside | {*ON_CPU, "data.size", "optim.warmup", "encoder.patch", *source.suited}


def choices(
    method: str, encoder: str, batch_size: int, epochs: int, source: SourceConfig, *, gpu: bool, side: int | None = None
) -> list[Choice]:
    """What suits the situation; of a name in several of them the last one holds.

    gpu: whether there is one to train on.  side: of the training views, in pixels; None where it is not known yet:
    photographs.
    """
    tables = _tables(method)
    is_vit, is_tiny = is_transformer(encoder), side is not None and side <= SMALL_SIDE
    is_small = batch_size < SMALL_BATCH
    is_short = is_small and not gpu
    there = ["all", "small" if is_small else "large", *["cpu"] * is_short, *["vit"] * is_vit, *["tiny"] * is_tiny]
    share = min(0.1, 10 / epochs)
    found = [Choice("", {"optim.warmup": float(f"{share:.3g}")})]
    if epochs > 100:
        found = [Choice("10 epochs of warm-up", found[0].values)]
    for name in there:
        if table := tables.get(name):
            values = {key: value for key, value in flags.leaves(table) if key != "why"}
            found.append(Choice(table.get("why", ""), values))
    if is_vit and is_tiny and "patch" in encoder:
        found.append(Choice("a ViT on small images: patches of 4 px", {"encoder.patch": 4}))
    if not gpu:
        found.append(Choice("no GPU: smaller batches, fewer epochs", dict(ON_CPU)))
    if source.suited:
        found.append(Choice(source.suited_why, source.suited))
    return found


SMALLER_VIEWS = Choice("no GPU: smaller views, a fifth of the work", {"data.size": SIDE_ON_CPU})


def smaller_batch(num_images: int) -> Choice:
    """The largest power of two of images that there are."""
    return Choice(f"{num_images} images are less than a batch", {"batch_size": 2 ** (num_images.bit_length() - 1)})


def applied(config: Config, values: Mapping[str, Any], names: Collection[str]) -> Config:
    """The config with these values, by dotted name, in place of those options that are among ``names``."""
    changes: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, option = name.rpartition(".")
        if name in names:
            inside = sections.setdefault(section, {}) if section else changes
            inside[option] = tuple(value) if isinstance(value, list) else value
    changes |= {name: replace(getattr(config, name), **options) for name, options in sections.items()}
    return replace(config, **changes)


def merged(found: list[Choice]) -> dict[str, Any]:
    """The values of all of them, the last one of each name."""
    values: dict[str, Any] = {}
    for choice in found:
        values |= choice.values
    return values


def words(found: list[Choice], open_names: set[str]) -> list[str]:
    """A line for each choice with a reason: that, and the flags by which to choose otherwise.

    open_names: the options that nobody has set.
    """
    said = set[str]()
    lines: list[str] = []
    for choice in reversed(found):  # a value is the last one's that sets it
        mine = {name: value for name, value in choice.values.items() if name in open_names and name not in said}
        said |= mine.keys()
        if choice.why and mine:
            mostly = 2 * len(mine) > len(choice.values.keys() & open_names)  # else later choices have replaced it
            why = choice.why if mostly else "other defaults of the method"
            lines.append(f"{why} ({' '.join(_flag(name, value) for name, value in mine.items())})")
    return lines[::-1]


def _flag(name: str, value: Any) -> str:
    section, _, option = name.replace("_", "-").rpartition(".")
    prefix = f"--{section}." if section else "--"
    if isinstance(value, bool):
        return f"{prefix}{option}" if value else f"{prefix}no-{option}"
    return f"{prefix}{option} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
