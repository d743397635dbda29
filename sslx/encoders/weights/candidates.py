"""Candidates: the tensors under each prefix of each table that may be an encoder, under timm's names."""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from sslx.encoders.weights import fitting, layouts
from sslx.encoders.weights.accounting import is_derived
from sslx.encoders.weights.layouts.base import Converted
from sslx.encoders.weights.tables import Table, unwrapped

TIMM = "timm"
"""The layout of files that have timm's own names."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The tensors under one prefix of a table, which may be the encoder.

    prefix: path of the table and the prefix in it, joined by dots.
    layout: name of the layout from which the names were changed to timm's; "timm" if they are timm's.
    tensors: those whose names the encoder has, by the encoder's names.
    extra: the tensors under the prefix that the encoder does not have, by timm's names.
    num_others: number of tensors elsewhere in the file.
    """

    prefix: str
    layout: str
    tensors: dict[str, Converted]
    extra: dict[str, Converted]
    num_others: int

    def source(self, name: str) -> str:
        """Return the name in the file of a tensor that the encoder does not have."""
        return ", ".join(self.extra[name].sources) or name


def candidates(tables: list[Table], trunk: nn.Module, own: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yield every prefix under which one of the encoder's first or last tensors, or a layout, stands.

    own: the encoder's tensors by name.
    """
    total = sum(len(table.tensors) for table in tables)
    for table in tables:
        names = [unwrapped(name) for name in table.tensors]
        for prefix, layout in (*_prefixes_of(own, names), *places(names)):
            tensors = converted(table, prefix, layout)
            num_others = total - sum(name.startswith(prefix) for name in names)
            yield candidate(path(table, prefix), layout, tensors, trunk, own, num_others)


def of_timms_converter(tables: list[Table], trunk: nn.Module, own: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yield what timm's own converter for this model makes of each table, with each common prefix of its names.

    It knows the official files of many models, but not under which prefix they are in a checkpoint.
    """
    convert = getattr(sys.modules.get(type(trunk).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return
    for table in tables:
        tensors = {unwrapped(name): value for name, value in table.tensors.items()}
        levels = enumerate(zip(*(name.split(".") for name in tensors), strict=False))
        depth = next((level for level, parts in levels if len({*parts}) > 1), 0)
        words = next(iter(tensors)).split(".")[:depth]
        for start in range(depth + 1):
            prefix = "".join(f"{word}." for word in words[:start])
            with suppress(Exception):  # timm's converters expect only files that they know
                values = convert({name[len(prefix) :]: value for name, value in tensors.items()}, trunk)
                named = {name: Converted(value, ()) for name, value in values.items() if isinstance(value, Tensor)}
                if _only_renames(named, tensors):
                    yield candidate(path(table, prefix), "of timm's converter", named, trunk, own)


def _only_renames(named: Mapping[str, Converted], tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors were only renamed, reshaped or split, and joined only for queries, keys and values.

    timm's converters also resize them without a word, even patches of another side.
    """
    storages = {value.untyped_storage().data_ptr() for value in tensors.values()}
    return all(
        ".qkv." in name or one.value.untyped_storage().data_ptr() in storages or not one.value.any()
        for name, one in named.items()
    )


def candidate(
    prefix: str,
    layout: str,
    tensors: dict[str, Converted],
    trunk: nn.Module,
    own: Mapping[str, Tensor],
    num_others: int = 0,
) -> Candidate:
    """Return the candidate for an encoder that has these tensors under timm's names."""
    tensors = fitting.fitted(tensors, trunk, own)
    return Candidate(
        prefix=prefix,
        layout=layout,
        tensors={name: tensors[name] for name in own if name in tensors},
        extra={name: tensor for name, tensor in tensors.items() if name not in own},
        num_others=num_others,
    )


def places(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (prefix, name of the layout) for every layout whose marks are under a prefix."""
    for layout in layouts.available():
        for prefix in layouts.layout(layout).prefixes(names):
            yield prefix, layout


def refusal(tables: list[Table]) -> str:
    """Return what a file holds that no encoder of timm equals, and why, or an empty string."""
    names = [unwrapped(name) for table in tables for name in table.tensors]
    return next((layouts.layout(layout).refusal for _, layout in places(names) if layouts.layout(layout).refusal), "")


def converted(table: Table, prefix: str, layout: str) -> dict[str, Converted]:
    """Return the tensors under a prefix of a table by timm's names."""
    names = {unwrapped(name): name for name in table.tensors}
    inside = {name[len(prefix) :]: table.tensors[old] for name, old in names.items() if name.startswith(prefix)}
    if layout == TIMM:
        return {name: Converted(value, (name,)) for name, value in inside.items()}
    return layouts.layout(layout).converted(inside)


def path(table: Table, prefix: str) -> str:
    """Return the path of a table in its file and a prefix in it, joined by dots."""
    return ".".join([*table.path, prefix.rstrip(".")]).strip(".")


def _prefixes_of(own: Mapping[str, Tensor], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (prefix, "timm") for every prefix under which the encoder's first or last tensors stand."""
    anchors = [name for name in own if not is_derived(name)]
    prefixes = {
        name[: len(name) - len(anchor)]
        for anchor in dict.fromkeys([*anchors[:2], *anchors[-2:]])
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    }
    for prefix in sorted(prefixes, key=len):
        yield prefix, TIMM
