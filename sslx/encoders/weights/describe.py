"""Describes a file of weights in lines of text: its tables, their tensors, the encoders in it, and how to use them."""

import shlex
from collections import Counter
from dataclasses import asdict

from sslx.console.words import plural, shown
from sslx.encoders.weights import identify, layouts
from sslx.encoders.weights.candidates import refusal
from sslx.encoders.weights.files import config_beside
from sslx.encoders.weights.identify import Identified
from sslx.encoders.weights.tables import Table, located, tables, unwrapped

_MAX_GROUPS = 8


def lines(source: str) -> list[str]:
    """Return what a file holds and which encoders fit it, with the flags of ``sslx pretrain``.

    Raises MissingInput if there is no such file, and DataError if it holds no weights.
    """
    path = located(source, shown(source))
    found = tables(source, shown(source))
    encoders = identify.of_tables(found, config_beside(path))
    text = [line for table in found for line in _of_table(table)]
    if reason := refusal(found):
        return [*text, f"it holds {reason}"]
    if not encoders:
        return [
            *text,
            "no encoder in it is recognized: expected a ResNet, ViT, ConvNeXt or Swin with the names of timm or of "
            f"{', '.join(layouts.available())}",
        ]
    fitting = [encoder for encoder in encoders if not encoder.misfit]
    for encoder in encoders:
        text += _of_encoder(encoder, source, needs_part=len(fitting) > 1)
    return text


def _of_table(table: Table) -> list[str]:
    """Return a line with the numbers of a table, and one for each group of names that begin in the same way."""
    title = shown(".".join(table.path)) or "the file"
    text = [f"{title}: {_numbers(list(table.tensors), table)}"]
    names = [unwrapped(name) for name in table.tensors]
    levels = enumerate(zip(*(name.split(".") for name in names), strict=False))
    depth = next((level for level, parts in levels if len({*parts}) > 1), 0)
    groups: dict[str, list[str]] = {}
    for name, original in zip(names, table.tensors, strict=True):
        groups.setdefault(".".join(name.split(".")[: depth + 1]), []).append(original)
    largest = sorted(groups.items(), key=lambda group: -sum(table.tensors[name].numel() for name in group[1]))
    text += [f"  {shown(group)}: {_numbers(members, table)}" for group, members in largest[:_MAX_GROUPS]]
    if len(largest) > _MAX_GROUPS:
        text.append(f"  and {plural(len(largest) - _MAX_GROUPS, 'smaller group')}")
    return text


def _numbers(names: list[str], table: Table) -> str:
    tensors = [table.tensors[name] for name in names]
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    kinds = ", ".join(dtype for dtype, _ in dtypes.most_common())
    return f"{plural(len(tensors), 'tensor')}, {plural(sum(tensor.numel() for tensor in tensors), 'number')}, {kinds}"


def _of_encoder(encoder: Identified, source: str, *, needs_part: bool) -> list[str]:
    """Return what an encoder is, and the flags that use it."""
    recipe = encoder.recipe
    where = f"under {shown(encoder.part)}" if encoder.part else "in the file"
    of_layout = "" if encoder.layout == "timm" else f", in the layout {encoder.layout}"
    title = f"{recipe.name} {where}{of_layout}, for {plural(recipe.channels, 'channel')}"
    if encoder.misfit:
        return [f"nearly {title}: {encoder.misfit}"]
    flags = identify.flags(recipe)
    if flags is None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in asdict(recipe).items())
        return [f"{title}: no flags build it, but sslx.encoders.rebuild(Recipe({arguments})) does"]
    words = ["--encoder.weights", source, *flags]
    if needs_part and encoder.part:
        words += ["--encoder.weights-part", encoder.part]
    return [f"{title}:", f"  {shown(shlex.join(words), 2_000)}"]
