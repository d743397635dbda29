"""Identifies the encoders in a file of weights: what they are, where they are, and the flags to use them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sslx.console.words import shown
from sslx.encoders import trunk as trunks
from sslx.encoders.config import Config
from sslx.encoders.recipe import Recipe
from sslx.encoders.weights import accounting, architectures, layouts
from sslx.encoders.weights.candidates import TIMM, candidate, converted, path, places
from sslx.encoders.weights.files import config_beside
from sslx.encoders.weights.kinds import listed
from sslx.encoders.weights.layouts.base import Converted
from sslx.encoders.weights.tables import Table, located, tables, unwrapped
from sslx.errors import ConfigError, DataError

_TIMM_MARKS = (
    (r"patch_embed\.proj\.weight", r"blocks\.0\.norm1\.weight"),
    (r"patch_embed\.proj\.weight", r"layers\.0\.blocks\.0\.norm1\.weight"),
    (r"conv1\.weight", r"layer1\.0\.conv1\.weight"),
    (r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"),
    (r"stem\.conv1\.conv\.weight", r"stages\.0\.0\.conv1_1x1\.conv\.weight"),
)
"""Names of timm's models whose architecture is recognized."""


@dataclass(frozen=True, kw_only=True)
class Identified:
    """An encoder in a file.

    part: path of its table and its prefix there, joined by dots; may be empty.  layout: whose names it has.
    recipe: its architecture.  num_tensors: how many of the file's tensors are the encoder's.
    misfit: why timm's model of this recipe does not take it; empty if it does.
    """

    part: str
    layout: str
    recipe: Recipe
    num_tensors: int
    misfit: str


def recipe(source: str, part: str | None = None) -> Recipe:
    """Return the recipe of the encoder in a file, with which ``sslx.encoders.rebuild`` builds it.

    source: a file of torch or safetensors, or a folder of another library.  part: place of the encoder in a file that
    holds several.  Raises MissingInput if there is no such file, and DataError if it holds no encoder that is
    recognized, or several different ones.
    """
    return chosen(identified(source), part, shown(source))


def chosen(found: list[Identified], part: str | None, origin: str, part_flag: str = "--encoder.weights-part") -> Recipe:
    """Return the recipe of the only encoder among those in a file, or of the one in the part with this name.

    origin, part_flag: how messages name the file and the choice of a part.  Raises DataError as ``recipe`` does.
    """
    where = f" under {shown(part)}" if part else ""
    inside = [one for one in found if _is_in(one.part, part)]
    fitting = [one for one in inside if not one.misfit]
    if not fitting:
        nearly = f"; nearly {inside[0].recipe.name}: {inside[0].misfit}" if inside else ""
        raise DataError(
            f"{origin} holds no encoder that is recognized{where}: sslx weights FILE shows what it holds{nearly}"
        )
    if any(one.recipe != fitting[0].recipe for one in fitting):
        parts = listed([one.part for one in fitting], 6)
        raise DataError(f"{origin} holds different encoders, under {parts}: choose one with {part_flag}")
    return fitting[0].recipe


def identified(source: str) -> list[Identified]:
    """Return the encoders that are recognized in a file, those that fit timm's model first.

    Raises MissingInput if there is no such file, and DataError if it holds no weights.
    """
    origin = shown(source)
    settings = config_beside(located(source, origin))
    return of_tables(tables(source, origin, None), settings)


def of_tables(found: list[Table], settings: architectures.Settings) -> list[Identified]:
    """Return the encoders that are recognized in tables, those that fit timm's model first."""
    fitting: dict[str, Identified] = {}
    others: dict[str, Identified] = {}
    for encoder in (encoder for table in found for encoder in _of_table(table, settings)):
        (others if encoder.misfit else fitting).setdefault(encoder.part, encoder)
    return [*fitting.values(), *(encoder for part, encoder in others.items() if part not in fitting)]


def flags(recipe: Recipe) -> list[str] | None:
    """Return the flags of ``sslx pretrain`` that build this encoder, or None if they cannot."""
    arguments = recipe.arguments
    wanted = _signature(recipe)
    simplest = Config(name=recipe.name, stem=recipe.stem)
    of_patch = replace(simplest, patch=arguments.get("patch_size"))
    shape = {
        "layers": _numbers(arguments.get("layers", arguments.get("depth"))),
        "channels": _numbers(arguments.get("channels", arguments.get("embed_dim"))),
    }
    sides = {name: side for name, side in arguments.items() if name == "img_size"}
    for config in (simplest, of_patch, replace(simplest, **shape), replace(of_patch, **shape)):
        with suppress(ConfigError):
            if _signature(replace(recipe, arguments={**trunks.arguments(config), **sides})) == wanted:
                return [*_words(config), *_other_words(recipe)]
    return None


def _numbers(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _words(config: Config) -> list[str]:
    words = ["--encoder.name", config.name]
    if config.name.startswith(("resnet", "wide_resnet", "resnext")):  # whose stem depends on the images by default
        words += ["--encoder.stem", config.stem]
    for name, numbers in (
        ("layers", config.layers),
        ("channels", config.channels),
        ("patch", _numbers(config.patch)),
    ):
        words += [f"--encoder.{name}", *map(str, numbers)] if numbers else []
    return words


def _other_words(recipe: Recipe) -> list[str]:
    size = ["--data.size", str(recipe.size)] if "img_size" in recipe.arguments else []
    return [*size, "--batch-norm", "group"] if recipe.norm == "group" else size


def _signature(recipe: Recipe) -> tuple[object, ...]:
    """Return the names and shapes of an encoder's tensors, and its number of heads, which these do not show."""
    trunk = _without_data(recipe)
    heads = [module.num_heads for module in trunk.modules() if hasattr(module, "num_heads")]
    return {name: value.shape for name, value in trunk.state_dict().items()}, heads


class _RatesWithData(TorchFunctionMode):
    """Leaves data to the rates of stochastic depth, which older versions of timm read back from a linspace."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}) | (kwargs or {}))


def _without_data(recipe: Recipe) -> nn.Module:
    """Return a trunk whose tensors have shapes and no data.  Raises ConfigError if timm cannot build it."""
    with torch.device("meta"), _RatesWithData():
        trunk, recipe = trunks.create(recipe)
        return trunks.complete(trunk, recipe)


def _is_in(prefix: str, part: str | None) -> bool:
    return part is None or f".{part.strip('.')}." in f".{prefix}."


def _of_table(table: Table, settings: architectures.Settings) -> list[Identified]:
    names = [unwrapped(name) for name in table.tensors]
    timm_marks = (layouts.Layout(marks=marks) for marks in _TIMM_MARKS)
    of_timm = {(prefix, TIMM): None for layout in timm_marks for prefix in layout.prefixes(names)}
    if architectures.is_of_timm(settings):
        of_timm[("", TIMM)] = None
    found: list[Identified] = []
    for prefix, layout in (*of_timm, *places(names)):
        tensors = converted(table, prefix, layout)
        shapes = {
            name: tuple(tensor.value.shape)
            for name, tensor in tensors.items()
            if not name.endswith(("q_bias", "v_bias")) or tensor.value.any()  # zeros: timm's model may have none
        }
        if recipe := architectures.recipe(shapes, settings):
            place = path(table, prefix)
            num, misfit = _fit(place, layout, tensors, recipe)
            found.append(Identified(part=place, layout=layout, recipe=recipe, num_tensors=num, misfit=misfit))
    return found


def _fit(part: str, layout: str, tensors: dict[str, Converted], recipe: Recipe) -> tuple[int, str]:
    """Return how many of the recipe's tensors there are, and why they are not the whole encoder, or ""."""
    try:
        trunk = _without_data(recipe)
    except ConfigError as error:
        return 0, str(error)
    own = trunk.state_dict()
    possible = candidate(part, layout, tensors, trunk, own)
    account = accounting.account(possible, own, accounting.classifiers(trunk), ())
    misfit = accounting.description(possible, account, own) if account.num_misfits else ""
    return len(possible.tensors), misfit
