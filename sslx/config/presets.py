"""Chooses values for options that neither a recipe nor a flag sets, by method, encoder, batch size, source and images.

Each method has a file ``recipes/defaults/NAME.toml`` with a table for each situation, with the reason (``why``) and the
published source.  The situations are ``all``; ``small`` and ``large`` batches; ``cpu``, for small batches without a GPU
and so for short runs; ``vit``, for any transformer; and ``tiny`` images.  Later tables override earlier ones.  A method
without such a file gets plain defaults.
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
"""Papers' LARS settings are not meant for batches smaller than this."""
FEW_STEPS, FEW_EPOCHS = 500, 10
"""A run with fewer steps or epochs is too short for good features."""
SMALL_SIDE = 64
"""Largest side of tiny views, in pixels."""
_SITUATIONS = ("all", "small", "large", "cpu", "vit", "tiny")
"""Tables of a defaults file, besides ``about``, which describes the method in lists of methods."""
_CONVOLUTIONAL = ("res", "reg", "efficientnet", "mobilenet", "densenet", "vgg", "dla", "hrnet", "inception", "xception")
"""Parts of the names of timm models that train with SGD.  All others train like transformers."""
_PLAIN: dict[str, dict[str, Any]] = {
    "small": {"why": "batches below 1,024: SGD", "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4}},
    "large": {"why": "batches of 1,024 and more: LARS", "optim": {"name": "lars", "lr": 0.3, "weight_decay": 1e-6}},
    "vit": {"why": "transformers: AdamW", "optim": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.05}},
}
ON_CPU = {"batch_size": 64, "epochs": 30}
SIDE_ON_CPU = 96
"""Side in pixels of the views of larger images if there is no GPU."""


@dataclass(frozen=True)
class Choice:
    """Values of options by dotted name, and the reason for them."""

    why: str
    values: dict[str, Any]


SMALLER_VIEWS = Choice("no GPU: smaller views, a fifth of the work", {"data.size": SIDE_ON_CPU})
SMALLER_ENCODER = Choice(
    "no GPU and small images: the narrow ResNet of simclr_cifar10_6min, a twentieth of the work",
    {"encoder.layers": [0, 1, 1, 1], "encoder.channels": [16, 32, 64, 256], "encoder.stem": "narrow"},
)


@cache
def _tables(method: str) -> dict[str, dict[str, Any]]:
    path = Path(__file__).parents[1] / "recipes" / "defaults" / f"{method}.toml"
    if not path.exists():
        return _PLAIN
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    assert tables.keys() <= {"about", *_SITUATIONS}, f"{path} has other tables than about and {_SITUATIONS}"
    return tables


def about(method: str) -> dict[str, str]:
    """Return a method's description for lists of methods: what, encoders, cost (per image of a step), paper."""
    return dict(_tables(method).get("about", {}))


def is_transformer(encoder: str) -> bool:
    """Return whether a timm model with this name trains with AdamW, as all but classic convolutional ones do."""
    name = encoder.lower()
    return not any(part in name.partition(".")[0] for part in _CONVOLUTIONAL) or "vit" in name


def encoder(method: str) -> str | None:
    """Return the method's default encoder, or None if it has none."""
    return _tables(method).get("all", {}).get("encoder", {}).get("name")


def names(method: str, source: SourceConfig) -> set[str]:
    """Return the dotted names of all options that may be chosen for a method and a source."""
    tables = [table for key, table in _tables(method).items() if key in _SITUATIONS]
    inside = {name for table in tables for name, _ in flags.leaves(table)} - {"why"}
    return (
        inside
        | {*ON_CPU, *SMALLER_ENCODER.values, "encoder.name", "data.size", "optim.warmup", "encoder.patch"}
        | {*source.suited}
    )


def choices(
    method: str, encoder: str, batch_size: int, epochs: int, source: SourceConfig, *, gpu: bool, side: int | None = None
) -> list[Choice]:
    """Return the choices that suit the situation.  If several set the same option, the last one applies.

    gpu: whether there is a GPU to train on.
    side: of the training views in pixels; None if it is not known yet, which is treated like photographs.
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


def smaller_batch(num_images: int) -> Choice:
    """Return a batch size that is the largest power of two of at most ``num_images``."""
    return Choice(f"{num_images} images are less than a batch", {"batch_size": 2 ** (num_images.bit_length() - 1)})


def applied(config: Config, values: Mapping[str, Any], names: Collection[str]) -> Config:
    """Return the config with new values, by dotted name, for those options that are among ``names``."""
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
    """Return the values of all choices, with the last one for each name."""
    values: dict[str, Any] = {}
    for choice in found:
        values |= choice.values
    return values


def words(found: list[Choice], open_names: set[str]) -> list[str]:
    """Return a line for each choice that has a reason, with the reason and the flags that would override it.

    open_names: the options that neither a recipe nor a flag has set.
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
