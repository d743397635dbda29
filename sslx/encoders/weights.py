"""Loads an encoder's weights from files of other frameworks, or says in one line what is wrong with a file.

Each framework stores an encoder in its own place: in ``state_dict`` as ``module.encoder_q.conv1.weight``, in
``teacher`` as ``backbone.blocks.0.norm1.bias``.  So every table of tensors in the file is searched for a prefix under
which all of the encoder's tensors stand with the right shapes.  Heads and other prefixes are left out and reported.
No code in a file is run.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import cast

import torch
from torch import Tensor, nn

from sslx.console.words import shown
from sslx.errors import DataError, MissingInput
from sslx.machine.files import expanded
from sslx.runs import checkpoint

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch's wrappers insert anywhere into the names of tensors."""
_HEAD = re.compile(
    r"(fc|heads?|head_dist|classifier|projectors?|projection\w*|predictors?|prototypes\w*|decoder\w*|mask_token|"
    r"queue\w*|(dino|ibot)_head|last_layer)(\.|$)"
)
"""Modules that frameworks store beside an encoder's own: heads on its features, and decoders and mask tokens."""
_DERIVED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask)$")
"""Buffers that a model derives or only counts.  A file may lack them, or have some that the encoder does not."""
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_MAX_DEPTH, _MAX_TABLES = 8, 1000
_TEXT = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])  # the bytes of texts in UTF-8 and other encodings
_EXPECTED = (
    "expected 'timm' (timm's own weights), a run folder of sslx, or a .pt, .pth or .safetensors file on this machine"
)
SSLX_PREFIX = "method.encoder.trunk"
"""Place of the encoder in an sslx checkpoint, which may hold a teacher or a target of the same shape as well."""


@dataclass(frozen=True)
class Table:
    """Tensors by name, and the keys that lead to them in the file, such as ("state_dict",)."""

    path: tuple[str, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """The tensors under one prefix of a table, which may be the encoder.

    prefix: path of the table and the prefix in it, joined by dots.
    tensors: those whose names the encoder has, by the encoder's names.
    extra_names: names under the prefix that the encoder does not have.
    num_others: number of tensors elsewhere in the file.
    """

    prefix: str
    tensors: dict[str, Tensor]
    extra_names: tuple[str, ...]
    num_others: int


def load(trunk: nn.Module, source: str, name: str, part: str | None = None) -> str:
    """Copy an encoder's weights from a file or an sslx run into the trunk; return a log line about what was loaded.

    source: a run folder, a checkpoint in it, or a file of torch or safetensors.  name: the trunk's name, for messages.
    part: place of the encoder in a file that holds several encoders, such as "teacher" or "encoder_q".
    Raises MissingInput if there is no such file.  Raises DataError if the file holds no weights, no such encoder, only
    a part of it, several of them, or numbers that are not floats.  The trunk is then unchanged.
    """
    origin = f"--encoder.weights {shown(source)}"
    own, tables = trunk.state_dict(), _tables(source, origin, part)
    classifiers = _classifiers(trunk)
    candidates = list(_candidates(tables, own))
    if not candidates:
        names = [".".join([*table.path, key]) for table in tables for key in table.tensors]
        raise DataError(f"{origin} has no tensor of {name}: it holds {len(names)} others ({_listed(names)})")
    misfits = [_misfits(candidate, own, classifiers) for candidate in candidates]
    complete = [candidate for candidate, (num, _) in zip(candidates, misfits, strict=True) if num == 0]
    if not complete:
        _, description = min(misfits, key=lambda misfit: misfit[0])
        raise DataError(f"{origin} does not fit {name}: {description}")
    chosen = _choose(complete, part, origin)
    _check_dtypes(chosen.tensors, own, origin)
    trunk.load_state_dict({**own, **chosen.tensors}, strict=True)
    return _summary(chosen, own, origin)


def _classifiers(trunk: nn.Module) -> tuple[str, ...]:
    """Return timm's names of the classification layers, which a trunk does not have."""
    names = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _summary(candidate: Candidate, own: Mapping[str, Tensor], origin: str) -> str:
    """Return one line that says what was loaded and what was left out."""
    line = f"{origin}: {len(own)} of {len(own)} tensors"
    if candidate.prefix:
        line += f", under {candidate.prefix}"
    left_out: list[str] = []
    if names := [name for name in candidate.extra_names if not _DERIVED.search(name)]:
        left_out.append(_listed(names))
    if candidate.num_others:
        left_out.append(f"{candidate.num_others} elsewhere in the file")
    return f"{line}; left out: {', and '.join(left_out)}" if left_out else line


def _choose(candidates: list[Candidate], part: str | None, origin: str) -> Candidate:
    """Return the only candidate, or the one that ``part`` names; DataError if none or several different ones remain."""
    if part is None and any(candidate.prefix == SSLX_PREFIX for candidate in candidates):
        part = SSLX_PREFIX
    if part is not None:
        words = part.strip(".").split(".")
        named = [candidate for candidate in candidates if _contains(candidate.prefix.split("."), words)]
        if not named:
            prefixes = _listed([candidate.prefix or "no prefix" for candidate in candidates])
            raise DataError(
                f"{origin} holds the encoder under {prefixes}, not under --encoder.weights-part {shown(part)}"
            )
        candidates = named
    if not all(_equal(candidates[0], other) for other in candidates[1:]):
        prefixes = _listed([candidate.prefix or "no prefix" for candidate in candidates], 6)
        raise DataError(
            f"{origin} holds {len(candidates)} such encoders, under {prefixes}: choose one with --encoder.weights-part"
        )
    return candidates[0]


def _contains(words: list[str], run: list[str]) -> bool:
    """Return whether ``run`` occurs in ``words`` as consecutive elements."""
    return any(words[i : i + len(run)] == run for i in range(len(words)))


def _equal(first: Candidate, second: Candidate) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(value, second.tensors[name]) for name, value in first.tensors.items()
    )


def _candidates(tables: list[Table], own: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """Yield every prefix of every table under which one of the encoder's first or last tensors stands."""
    total = sum(len(table.tensors) for table in tables)
    anchors = [name for name in own if not _DERIVED.search(name)]
    anchors = list(dict.fromkeys([*anchors[:2], *anchors[-2:]]))
    for table in tables:
        names = {_unwrapped(name): name for name in table.tensors}
        prefixes = {
            name[: len(name) - len(anchor)]
            for anchor in anchors
            for name in names
            if name == anchor or name.endswith(f".{anchor}")
        }
        for prefix in sorted(prefixes, key=len):
            inside = {name[len(prefix) :]: original for name, original in names.items() if name.startswith(prefix)}
            tensors = {name: table.tensors[inside[name]] for name in own if name in inside}
            extra_names = tuple(name for name in inside if name not in own)
            full_prefix = ".".join([*table.path, prefix.rstrip(".")]).strip(".")
            yield Candidate(full_prefix, tensors, extra_names, total - len(inside))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _misfits(candidate: Candidate, own: Mapping[str, Tensor], classifiers: tuple[str, ...]) -> tuple[int, str]:
    """Return the number of tensors in which a candidate differs from the encoder, and a description of them."""
    missing = [name for name in own if name not in candidate.tensors and not _DERIVED.search(name)]
    shapes = {
        name: f"{name} {tuple(own[name].shape)}, not {tuple(value.shape)}"
        for name, value in candidate.tensors.items()
        if own[name].shape != value.shape
    }
    unexpected = [name for name in candidate.extra_names if not _is_optional(name, own, classifiers)]
    problems = [
        f"{len(names)} {kind} ({_listed(names)})"
        for names, kind in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (list(shapes.values()), "of another shape"),
        )
        if names
    ]
    prefix = f" under {candidate.prefix}" if candidate.prefix else ""
    advice = _advice(own, candidate, missing, list(shapes))
    description = f"of {len(own)} tensors{prefix} {', '.join(problems)}: {advice}"
    return len(missing) + len(shapes) + len(unexpected), description


def _is_optional(name: str, own: Mapping[str, Tensor], classifiers: tuple[str, ...]) -> bool:
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


def _advice(own: Mapping[str, Tensor], candidate: Candidate, missing: list[str], shapes: list[str]) -> str:
    tensors = candidate.tensors
    stems = [name for name in shapes if own[name].ndim == 4 and own[name].shape[2:] != tensors[name].shape[2:]]
    if shapes == stems == ["conv1.weight"]:
        stem = {3: "small", 7: "imagenet"}.get(tensors["conv1.weight"].shape[-1])
        if stem:
            return f"it has the other stem: use --encoder.stem {stem}"
    if shapes and all("pos_embed" in name for name in shapes) and not missing:
        return "its position embeddings are for another --data.size or --encoder.patch: use those of the file"
    if missing and all(_STATISTICS.search(name) for name in missing):
        return "it was trained with group norm: use --batch-norm group"
    return "use the --encoder.name, layers, channels and patch that it was trained with"


def _check_dtypes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raise DataError for weights whose numbers are of another kind than the encoder's."""
    for name, value in tensors.items():
        if _DERIVED.search(name):  # scripts that convert a checkpoint to half precision convert the counters, too
            continue
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise DataError(f"{origin}: {name} is quantized, sparse or without data: expected plain tensors")
        if value.is_complex() or value.is_floating_point() != own[name].is_floating_point():
            raise DataError(f"{origin}: {name} is {value.dtype}, expected {own[name].dtype} or another float")


def _tables(source: str, origin: str, part: str | None) -> list[Table]:
    """Return all tables of tensors in a file; of an sslx run the encoder it exports, or all if a part is named."""
    if re.match(r"[A-Za-z][\w+.-]*:(//|[^\\])", source) and not Path(source).exists():
        raise MissingInput(f"{origin} is not a file: download it first; {_EXPECTED}")
    path = expanded(source)
    if not path.exists():
        raise MissingInput(f"{origin} does not exist: {_EXPECTED}")
    if path.is_dir() or (path.parent / "manifest.json").is_file():
        name = "encoder" if part is None else "method"
        return [Table((name,), cast(dict[str, Tensor], checkpoint.load(path, needs=(name,))[name]))]
    content = read(path)
    tables = list(_walk(content))
    if not tables:
        raise DataError(f"{origin} holds no weights: expected tensors by name, got {_kind(content)}")
    return tables


def _walk(content: object) -> Iterator[Table]:
    """Yield the tables in nested dicts, outermost first."""
    pending: list[tuple[object, tuple[str, ...]]] = [(content, ())]
    for _ in range(_MAX_TABLES):
        if not pending:
            return
        value, path = pending.pop(0)
        if not isinstance(value, dict):
            continue
        items = cast(dict[object, object], value)
        tensors = {key: value for key, value in items.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            yield Table(path, tensors)
        if len(path) < _MAX_DEPTH:
            pending += [(v, (*path, str(k))) for k, v in items.items() if isinstance(v, dict) and k != "optimizer"]


def read(path: Path) -> object:
    """Return the content of a torch or safetensors file without running code in it; the file's name does not matter.

    Raises DataError, which says what the file is, for any other file.
    """
    if not path.is_file():
        raise DataError(f"{shown(path)} is not a regular file: copy or download the weights")
    with open(path, "rb") as file:
        head = file.read(512)
    if kind := _other_kind(path, head):
        raise DataError(f"{shown(path)} is {kind}")
    try:
        if _is_safetensors(head, path.stat().st_size):
            from safetensors.torch import load_file

            return load_file(path)
        # Training scripts store their settings as Namespace and Path.  torch gets an open file instead of a path,
        # because it would choose the format by the path's suffix.
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # pickle and safetensors raise exceptions of any type
        raise DataError(f"cannot load weights from {shown(path)} safely: {_reason(error)}") from error


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    """Return whether a file of ``num_bytes`` begins with the length of a JSON header that fits in it, and a brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= num_bytes


def _other_kind(path: Path, head: bytes) -> str:
    """Return what a file that does not hold weights is, and what to do; an empty string if it may hold weights."""
    text = head.lstrip().lower()
    if not head:
        return "empty: copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves: run git lfs pull in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights: the download went wrong"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (as Keras writes): expected a torch or safetensors file"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd")):
        return "a compressed archive: unpack it and use the file in it"
    if head.startswith(b"\x93NUMPY"):
        return "a single NumPy array: expected a torch or safetensors file with tensors by name"
    if head.startswith(b"GGUF"):
        return "a GGUF file: expected a torch or safetensors file"
    if text.startswith(b"{"):
        return "JSON text, not weights: use the .safetensors or .pt file beside it"
    if not head.translate(None, _TEXT):
        return "a text file, not weights: expected a torch or safetensors file"
    return _kind_of_zip(path) if head.startswith(b"PK") else ""


def _kind_of_zip(path: Path) -> str:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "truncated or damaged: copy or download it again"
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "a TorchScript archive, which is a program with weights: if you trust it, save "
            "torch.jit.load(FILE).state_dict() with torch.save"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz archive of NumPy arrays: expected a torch or safetensors file with tensors by name"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive without weights (it has {_listed(names)}): unpack it and use the file in it"
    return ""


def _reason(error: Exception) -> str:
    """Return why torch or safetensors cannot read a file, without their advice to trust the file."""
    text = str(error) or type(error).__name__
    if match := re.search(r"(?:GLOBAL|global|class) [`']?([\w.]+)[`']?", text):
        return (
            f"it holds a {match[1]} object, not only tensors, and none of it was run: if you trust it, save its "
            "state_dict alone with torch.save"
        )
    if "PytorchStreamReader" in text or "central directory" in text:
        return "it is truncated or damaged: copy or download it again"
    if "weights_only" in text:  # torch's advice is for programmers
        return "it is neither a torch nor a safetensors file, or it is damaged: copy or download it again"
    return shown(text.splitlines()[0])


def _kind(content: object) -> str:
    """Describe the content of a file that has no tensors by name."""
    if isinstance(content, Tensor):
        return f"one tensor of shape {tuple(content.shape)} without a name"
    if isinstance(content, dict):
        names = [str(key) for key in cast(dict[object, object], content)]
        return f"a dict without tensors (it has {_listed(names, 6)})" if names else "an empty dict"
    return f"a {type(content).__name__} object"


def _listed(names: list[str], limit: int = 3) -> str:
    """Join the first ``limit`` names by commas."""
    return ", ".join(map(shown, names[:limit])) + (", ..." if len(names) > limit else "")
