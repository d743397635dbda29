"""Candidates: the tensors under each prefix of each table that may be an encoder, under timm's names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sslx.encoders.weights import fitting, layouts
from sslx.encoders.weights.accounting import is_derived
from sslx.encoders.weights.layouts.base import Converted
from sslx.encoders.weights.tables import Table, unwrapped


@dataclass(frozen=True)
class Candidate:
    """The tensors under one prefix of a table, which may be the encoder.

    prefix: path of the table and the prefix in it, joined by dots.
    layout: name of the layout from which the names were changed to timm's; "timm" if they are timm's.
    tensors: those whose names the encoder has, by the encoder's names.
    extra: timm's names of the tensors under the prefix that the encoder does not have, and their names there.
    num_others: number of tensors elsewhere in the file.
    """

    prefix: str
    layout: str
    tensors: dict[str, Converted]
    extra: dict[str, str]
    num_others: int


def candidates(tables: list[Table], trunk: nn.Module, own: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yield every prefix under which one of the encoder's first or last tensors, or a layout, stands.

    own: the encoder's tensors by name.
    """
    total = sum(len(table.tensors) for table in tables)
    for table in tables:
        names = {unwrapped(name): name for name in table.tensors}
        for prefix, layout in _places(names, own):
            inside = {name[len(prefix) :]: table.tensors[old] for name, old in names.items() if name.startswith(prefix)}
            if layout == "timm":
                tensors = {name: Converted(value, (name,)) for name, value in inside.items()}
            else:
                tensors = layouts.layout(layout).converted(inside)
            tensors = fitting.fitted(tensors, trunk, own)
            full_prefix = ".".join([*table.path, prefix.rstrip(".")]).strip(".")
            yield Candidate(
                prefix=full_prefix,
                layout=layout,
                tensors={name: tensors[name] for name in own if name in tensors},
                extra={name: ", ".join(tensors[name].sources) or name for name in tensors if name not in own},
                num_others=total - len(inside),
            )


def _places(names: Mapping[str, str], own: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield (prefix, layout)."""
    anchors = [name for name in own if not is_derived(name)]
    prefixes = {
        name[: len(name) - len(anchor)]
        for anchor in dict.fromkeys([*anchors[:2], *anchors[-2:]])
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    }
    for prefix in sorted(prefixes, key=len):
        yield prefix, "timm"
    for layout in layouts.available():
        for prefix in layouts.layout(layout).prefixes(names):
            yield prefix, layout
