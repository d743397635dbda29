"""Accounting: which tensors of an encoder a candidate has, which it lacks or has beside, and the line that says so."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sslx.console.words import shown
from sslx.encoders.weights.kinds import listed

if TYPE_CHECKING:
    from sslx.encoders.weights.candidates import Candidate

_HEAD = re.compile(
    r"(fc|heads?|head_dist|classifier|projectors?|projection\w*|predictors?|prototypes\w*|decoder\w*|mask_token|"
    r"queue\w*|(dino|ibot)_head|last_layer|pooler|masked_embed|attn_?pool|proj)(\.|$)"
)
"""Modules that frameworks store beside an encoder's own: heads on its features, and decoders and mask tokens."""
_DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask|periods|bias_mask)$"
)
"""Buffers that a model derives or only counts.  A file may lack them, or have some that the encoder does not."""
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")


@dataclass(frozen=True)
class Account:
    """What a candidate has of an encoder.

    missing: names of tensors that it lacks.  allowed: those that it lacks, or has in another shape, and may lack.
    shapes: descriptions, by name, of those of another shape.  unexpected: names that no such encoder has.
    """

    missing: list[str]
    allowed: list[str]
    shapes: dict[str, str]
    unexpected: list[str]

    @property
    def num_misfits(self) -> int:
        """The number of tensors in which the candidate differs from the encoder."""
        return len(self.missing) + len(self.shapes) + len(self.unexpected)


def is_derived(name: str) -> bool:
    """Return whether a model derives or only counts this buffer."""
    return bool(_DERIVED.search(name))


def classifiers(trunk: nn.Module) -> tuple[str, ...]:
    """Return timm's names of the classification layers, which a trunk does not have."""
    names = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def account(
    candidate: "Candidate", own: Mapping[str, Tensor], classifiers: Sequence[str], patterns: Sequence[str]
) -> Account:
    """Compare a candidate with the encoder's own tensors.

    classifiers: timm's names of the classification layers.  patterns: of the names that may be missing.
    """
    missing = [name for name in own if name not in candidate.tensors and not is_derived(name)]
    shapes = {
        name: f"{name} {tuple(own[name].shape)}, not {tuple(tensor.value.shape)}"
        for name, tensor in candidate.tensors.items()
        if own[name].shape != tensor.value.shape
    }
    allowed = [name for name in (*missing, *shapes) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return Account(
        missing=[name for name in missing if name not in allowed],
        allowed=allowed,
        shapes={name: text for name, text in shapes.items() if name not in allowed},
        unexpected=[
            name
            for name, tensor in candidate.extra.items()
            if not _is_optional(name, own, classifiers) and not _is_zero_bias(name, tensor.value)
        ],
    )


def description(candidate: "Candidate", found: Account, own: Mapping[str, Tensor]) -> str:
    """Return how a candidate differs from the encoder, with the names in the file that are nearest to missing ones."""
    problems = [
        f"{len(names)} {kind} ({listed(names)})"
        for names, kind in (
            (found.missing, "missing"),
            ([candidate.source(name) for name in found.unexpected], "unexpected"),
            (list(found.shapes.values()), "of another shape"),
        )
        if names
    ]
    prefix = f" under {shown(candidate.prefix)}" if candidate.prefix else ""
    layout = f" in the layout {candidate.layout}" if candidate.layout != "timm" else ""
    nearest = _nearest(candidate, found)
    return f"of {len(own)} tensors{prefix}{layout} {', '.join(problems)}{nearest}: {_advice(own, candidate, found)}"


def _nearest(candidate: "Candidate", found: Account) -> str:
    """Return the names in the file that are nearest to the first missing ones."""
    pairs: list[str] = []
    for name in found.missing[:3]:
        if close := difflib.get_close_matches(name, candidate.extra, n=1):
            pairs.append(f"{shown(candidate.source(close[0]))} for {name}")
    return f"; nearest in the file: {', '.join(pairs)}" if pairs else ""


def _advice(own: Mapping[str, Tensor], candidate: "Candidate", found: Account) -> str:
    tensors, shapes = candidate.tensors, list(found.shapes)
    stems = [n for n in shapes if own[n].ndim == 4 and own[n].shape[2:] != tensors[n].value.shape[2:]]
    if shapes == stems == ["conv1.weight"]:
        stem = {3: "small", 7: "imagenet"}.get(tensors["conv1.weight"].value.shape[-1])
        if stem:
            return f"it has the other stem: use --encoder.stem {stem}"
    if shapes and all("pos_embed" in name for name in shapes) and not found.missing:
        return "its position embeddings are for another --data.size or --encoder.patch: use those of the file"
    if found.missing and all(_STATISTICS.search(name) for name in found.missing):
        return "it was trained with group norm: use --batch-norm group"
    return "use the --encoder.name, layers, channels and patch that it was trained with (sslx weights FILE shows them)"


def _is_optional(name: str, own: Mapping[str, Tensor], classifiers: Sequence[str]) -> bool:
    """Return whether an encoder without this tensor gives the same features.

    This holds for heads, and for a batch norm's statistics if the encoder has group norms.
    """
    if _DERIVED.search(name) or any(name.startswith(f"{classifier}.") for classifier in classifiers):
        return True
    # ConvNeXt's final norm is head.norm: if the encoder has a part of a head, only the classifier in it is optional.
    if _HEAD.match(name):
        return not any(key.startswith(name.split(".")[0] + ".") for key in own)
    statistic = _STATISTICS.search(name)
    norm = f"{name[: statistic.start()]}.weight".lstrip(".") if statistic else ""
    return norm in own and not any(map(_STATISTICS.search, own))


def _is_zero_bias(name: str, value: Tensor) -> bool:
    """Return whether this is a bias that changes nothing, such as those of DINOv3's queries in some published files."""
    return name.endswith(("_bias", ".bias")) and value.ndim == 1 and not value.any()


def summary(candidate: "Candidate", found: Account, own: Mapping[str, Tensor], origin: str) -> str:
    """Return one line that says what was taken, renamed, changed, and left out."""
    line = f"{origin}: {len(own) - len(found.allowed)} of {len(own)} tensors"
    if candidate.prefix:
        line += f", under {shown(candidate.prefix)}"
    if candidate.layout != "timm":
        num_renamed = sum(tensor.sources != (name,) for name, tensor in candidate.tensors.items())
        line += f", {num_renamed} renamed from the layout {candidate.layout}"
    line += "".join(f"; {change}" for change in _changes(candidate))
    if found.allowed:
        line += f"; {len(found.allowed)} left as initialized, as --encoder.missing allows: {listed(found.allowed)}"
    left_out: list[str] = []
    if names := [candidate.source(name) for name in candidate.extra if not _DERIVED.search(name)]:
        left_out.append(listed(names))
    if candidate.num_others:
        left_out.append(f"{candidate.num_others} elsewhere in the file")
    return f"{line}; left out: {', and '.join(left_out)}" if left_out else line


def _changes(candidate: "Candidate") -> list[str]:
    """Return what was done to tensors: each change with its number, or with the only name."""
    names: dict[str, list[str]] = {}
    for name, tensor in candidate.tensors.items():
        for change in tensor.changes:
            names.setdefault(change, []).append(name)
    return [f"{only[0] if len(only) == 1 else len(only)} {change}" for change, only in names.items()]
