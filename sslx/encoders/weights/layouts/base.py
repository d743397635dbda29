"""Layout: how another library names the tensors of an encoder, and how they become those of timm's model."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

Replacement = str | Callable[[re.Match[str]], str]
_OTHER_SHAPES = (RuntimeError, IndexError, ValueError, TypeError)
"""What torch raises for tensors of shapes that are not the layout's, which are then left as they are, and refused."""
_PART = re.compile(r"\[(\d)\]")


@dataclass(frozen=True)
class Converted:
    """A tensor under timm's name, the names in the file that it came from, and what else was done to it."""

    value: Tensor
    sources: tuple[str, ...]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of one family of models in one library.

    marks: regular expressions of names, each of which matches one name of a table under the same prefix.
    renames: regular expressions and their replacements, applied to each name one after the other.  They turn it into
      timm's name.  Tensors that timm has as one are renamed to parts, such as ``attn.qkv[0].weight``, ``[1]``, ``[2]``,
      which are then joined along the first dimension.
    reshape: changes values, by timm's names; it may add and remove tensors.
    refusal: what such a model is, and why no encoder of timm computes the same; empty for all others.
    """

    marks: tuple[str, ...]
    renames: tuple[tuple[str, Replacement], ...] = ()
    reshape: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    refusal: str = ""

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """Return the prefixes, with their final dot, under which names have all marks; the shortest first."""
        names = list(names)
        found = [
            dict.fromkeys(
                match[1] or ""
                for name in names
                for prefix in (r"(.*\.)?", r"(.*?\.)?")  # a mark may begin with an optional word
                if (match := re.fullmatch(prefix + mark, name))
            )
            for mark in self.marks
        ]
        return sorted((prefix for prefix in found[0] if all(prefix in others for others in found)), key=len)

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Converted]:
        """Return the tensors by timm's names; those that timm's model does not have keep or get another name."""
        renamed: dict[str, str] = {}
        for name in tensors:
            new = self._renamed(name)
            renamed[name if new in renamed else new] = name  # a second tensor of this name is not the encoder's
        values = joined({new: tensors[old] for new, old in renamed.items()})
        if self.reshape:
            with suppress(*_OTHER_SHAPES):
                values = self.reshape(values)
        sources: dict[str, list[str]] = {}
        for new, old in renamed.items():
            whole = new if new in values else whole_name(new, values)
            sources.setdefault(whole, []).append(old)
        return {
            name: Converted(value, tuple(sources.get(name, ())), ("joined",) * (len(sources.get(name, ())) > 1))
            for name, value in values.items()
        }

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def whole_name(part: str, values: Mapping[str, object]) -> str:
    """Return the name of the tensor that a part such as ``attn.qkv[0].weight`` was joined to."""
    whole = _PART.sub("", part)
    if whole in values or not _PART.search(part):
        return whole
    return part.replace("qkv[0].bias", "q_bias").replace("qkv[2].bias", "v_bias")


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the parts of each tensor along its first dimension.

    A bias of queries and values without one of keys becomes ``q_bias`` and ``v_bias``, as in timm's BEiT and EVA.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    values: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if match := _PART.search(name):
            parts.setdefault(_PART.sub("", name), {})[int(match[1])] = value
        else:
            values[name] = value
    for name, numbered in parts.items():
        if name.endswith("qkv.bias") and set(numbered) == {0, 2}:
            values[name.replace("qkv.bias", "q_bias")] = numbered[0]
            values[name.replace("qkv.bias", "v_bias")] = numbered[2]
        else:
            try:
                values[name] = torch.cat([numbered[i] for i in sorted(numbered)])
            except _OTHER_SHAPES:
                values |= {f"{name}[{i}]": value for i, value in numbered.items()}  # which no encoder has
    return values


def class_position_into_token(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the position embedding of the class token to the token itself.

    timm's ViTs with register tokens have position embeddings of patches only.
    """
    positions, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if "reg_token" not in tensors or positions is None or token is None:
        return tensors
    return {**tensors, "cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}


def without_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the bias of queries, keys and values, for models in which that of the keys is zero or has no effect."""
    split: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(".attn.qkv.bias"):
            split[name.replace("qkv.bias", "q_bias")], _, split[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            split[name] = value
    return split
