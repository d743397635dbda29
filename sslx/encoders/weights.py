"""Weights of others into an encoder: finds the encoder in a file, whole, or says in one line what the file is.

Frameworks store an encoder under names of their own: ``state_dict`` and ``module.encoder_q.conv1.weight``, ``teacher``
and ``backbone.blocks.0.norm1.bias``.  So all tables of tensors in the file are looked through for a prefix under which
the encoder's own names stand, all of them and of its shapes.  What stands beside them is left out and said: other
prefixes, and heads.  Nothing in a file is run.
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
"""Parts of names that torch's wrappers put anywhere."""
_HEAD = re.compile(
    r"(fc|heads?|head_dist|classifier|projectors?|projection\w*|predictors?|prototypes\w*|decoder\w*|mask_token|"
    r"queue\w*|(dino|ibot)_head|last_layer)(\.|$)"
)
"""Beside an encoder's own parts: what is trained on top of its features, or takes the place of what it does not see."""
_DERIVED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask)$")
"""What a model works out by itself, or only counts: it may be missing from a file, or be left over in it."""
_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_DEEPEST, _MOST_TABLES = 8, 1000
_EXPECTED = (
    "expected 'timm' (its own weights), a run folder of sslx, or a .pt, .pth or .safetensors file on this machine"
)
OWN = "method.encoder.trunk"
"""Where a checkpoint of sslx has its encoder, beside a teacher or a target of the same shape."""


@dataclass(frozen=True)
class Table:
    """Tensors by name, and where in the file they stand, as in ("state_dict",)."""

    place: tuple[str, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One prefix of a table, and what stands there under the encoder's own names.

    taken: by own name.  left: names under the prefix that the encoder has not.  num_others: tensors elsewhere.
    """

    where: str
    taken: dict[str, Tensor]
    left: tuple[str, ...]
    num_others: int


def load(trunk: nn.Module, source: str, name: str, part: str | None = None) -> str:
    """Copy an encoder's weights from a file or an sslx run into the trunk; returns a line that accounts for them.

    source: a run folder, a checkpoint in it, or a file of torch or safetensors.  name: the trunk's, for messages.
    part: where in the file the encoder is, where that holds several ("teacher", "encoder_q").
    Raises MissingInput where nothing is there and DataError where the file is no file of weights, holds no such
    encoder, a part of one, several, or other numbers than floats; the trunk is then as it was.
    """
    what = f"--encoder.weights {shown(source)}"
    own, tables = trunk.state_dict(), _tables(source, what)
    classifiers = _classifiers(trunk)
    found = [(p, *_misfits(p, own, classifiers)) for p in _parts(tables, own)]
    if not found:
        names = [".".join([*table.place, key]) for table in tables for key in table.tensors]
        raise DataError(f"{what} has no tensor of {name}: it holds {len(names)} others ({_listed(names)})")
    whole = [p for p, misfits, _ in found if not misfits]
    if not whole:
        raise DataError(f"{what} does not fit {name}: {min(found, key=lambda entry: entry[1])[2]}")
    chosen = _one_of(whole, part, what)
    _check_numbers(chosen.taken, own, what)
    trunk.load_state_dict({**own, **chosen.taken}, strict=True)
    return _account(chosen, own, what)


def _classifiers(trunk: nn.Module) -> tuple[str, ...]:
    """What timm calls the last layers that a trunk without classes has not."""
    names = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _account(part: Part, own: Mapping[str, Tensor], what: str) -> str:
    """What was taken and what was not, in one line."""
    line = f"{what}: {len(own)} of {len(own)} tensors" + (f", under {part.where}" if part.where else "")
    left = [name for name in part.left if not _DERIVED.search(name)]
    notes = [_listed(left)] * bool(left) + [f"{part.num_others} elsewhere in the file"] * bool(part.num_others)
    return line + (f"; left out: {', and '.join(notes)}" if notes else "")


def _one_of(whole: list[Part], wanted: str | None, what: str) -> Part:
    if wanted is None and any(p.where == OWN for p in whole):
        wanted = OWN
    if wanted is not None:
        words = wanted.strip(".").split(".")
        named = [p for p in whole if _holds(p.where.split("."), words)]
        if not named:
            raise DataError(
                f"{what} holds the encoder under {_listed([p.where or 'no prefix' for p in whole])}, not under "
                f"--encoder.weights-part {shown(wanted)}"
            )
        whole = named
    if len(whole) > 1 and not all(_equal(whole[0], other) for other in whole[1:]):
        raise DataError(
            f"{what} holds {len(whole)} such encoders, under {_listed([p.where or 'no prefix' for p in whole], 6)}: "
            "name one by --encoder.weights-part"
        )
    return whole[0]


def _holds(words: list[str], wanted: list[str]) -> bool:
    """Whether the wanted words stand among these, one after the other."""
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _equal(one: Part, other: Part) -> bool:
    return one.taken.keys() == other.taken.keys() and all(
        torch.equal(value, other.taken[name]) for name, value in one.taken.items()
    )


def _parts(tables: list[Table], own: Mapping[str, Tensor]) -> Iterator[Part]:
    """Every prefix of every table under which a part of the encoder's names stands."""
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
            taken = {name: table.tensors[inside[name]] for name in own if name in inside}
            left = tuple(name for name in inside if name not in own)
            where = ".".join([*table.place, prefix.rstrip(".")]).strip(".")
            yield Part(where, taken, left, total - len(inside))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _misfits(part: Part, own: Mapping[str, Tensor], classifiers: tuple[str, ...]) -> tuple[int, str]:
    """How many tensors keep this part from being the encoder, and what they are, in words."""
    missing = [name for name in own if name not in part.taken and not _DERIVED.search(name)]
    shapes = {
        name: f"{name} {tuple(own[name].shape)}, not {tuple(value.shape)}"
        for name, value in part.taken.items()
        if own[name].shape != value.shape
    }
    unknown = [name for name in part.left if not _may_be_left(name, own, classifiers)]
    problems = [
        f"{len(names)} {kind} ({_listed(names)})"
        for names, kind in (
            (missing, "missing"),
            (unknown, "too many"),
            (list(shapes.values()), "of another shape"),
        )
        if names
    ]
    where = f" under {part.where}" if part.where else ""
    words = f"of {len(own)} tensors{where} {', '.join(problems)}: {_advice(own, part, missing, list(shapes))}"
    return len(missing) + len(shapes) + len(unknown), words


def _may_be_left(name: str, own: Mapping[str, Tensor], classifiers: tuple[str, ...]) -> bool:
    """Whether an encoder without this tensor gives the same features: heads, and the statistics of a batch norm that
    the encoder's group norm takes the place of."""
    if _DERIVED.search(name) or any(name.startswith(f"{classifier}.") for classifier in classifiers):
        return True
    # ConvNeXt's own last norm is head.norm: of a head that the encoder has in part, nothing but the classifier may go.
    if _HEAD.match(name):
        return not any(key.startswith(name.split(".")[0] + ".") for key in own)
    statistic = _STATISTICS.search(name)
    norm = f"{name[: statistic.start()]}.weight".lstrip(".") if statistic else ""
    return norm in own and not any(map(_STATISTICS.search, own))


def _advice(own: Mapping[str, Tensor], part: Part, missing: list[str], shapes: list[str]) -> str:
    stems = [name for name in shapes if own[name].ndim == 4 and own[name].shape[2:] != part.taken[name].shape[2:]]
    if shapes == stems == ["conv1.weight"]:
        sides = {3: "small", 7: "imagenet"}
        stem = sides.get(part.taken["conv1.weight"].shape[-1])
        if stem:
            return f"it has the other stem: take --encoder.stem {stem}"
    if shapes and all("pos_embed" in name for name in shapes) and not missing:
        return "its position embeddings are of another --data.size or --encoder.patch: take that of the file"
    if missing and all(_STATISTICS.search(name) for name in missing):
        return "it was trained with group norm: take --batch-norm group"
    return "take the --encoder.name, layers, channels and patch that it was trained with"


def _check_numbers(taken: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """DataError for weights of another kind of number than the encoder's."""
    for name, value in taken.items():
        if _DERIVED.search(name):  # counted in another type by many a script that halves all numbers
            continue
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise DataError(f"{what}: {name} is quantized, sparse or without data: expected plain tensors")
        if value.is_complex() or value.is_floating_point() != own[name].is_floating_point():
            raise DataError(f"{what}: {name} is of {value.dtype}, expected {own[name].dtype} or another float")


def _tables(source: str, what: str) -> list[Table]:
    """All tables of tensors in a file, or those of an sslx run's method."""
    if re.match(r"[A-Za-z][\w+.-]*:(//|[^\\])", source) and not Path(source).exists():
        raise MissingInput(f"{what} is no file: download it first; {_EXPECTED}")
    path = expanded(source)
    if not path.exists():
        raise MissingInput(f"{what} does not exist: {_EXPECTED}")
    if path.is_dir() or (path.parent / "manifest.json").is_file():
        return [Table(("method",), cast(dict[str, Tensor], checkpoint.load(path, needs=("method",))["method"]))]
    content = read(path)
    tables = list(_walk(content, ()))
    if not tables:
        raise DataError(f"{what} holds no weights: expected tensors by name, it has {_kind(content)}")
    return tables


def _walk(content: object, place: tuple[str, ...]) -> Iterator[Table]:
    """The tables in nested dicts, outermost first."""
    waiting: list[tuple[object, tuple[str, ...]]] = [(content, place)]
    for _ in range(_MOST_TABLES):
        if not waiting:
            return
        now, here = waiting.pop(0)
        if not isinstance(now, dict):
            continue
        items = cast(dict[object, object], now)
        tensors = {key: value for key, value in items.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            yield Table(here, tensors)
        if len(here) < _DEEPEST:
            waiting += [(v, (*here, str(k))) for k, v in items.items() if isinstance(v, dict) and k != "optimizer"]


def read(path: Path) -> object:
    """What a file of torch or safetensors holds, by its content, whatever its name; nothing in it is run.

    DataError, which says what the file is, for any other.
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
        # Settings are plain objects.  A file and not its path: torch takes a path's suffix at its word.
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # pickle and safetensors raise anything
        raise DataError(f"{shown(path)} is no file of weights that can be trusted: {_reason(error)}") from error


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    """Whether a file begins with the length of a JSON header that it holds, and with that header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") + 8 <= num_bytes


def _other_kind(path: Path, head: bytes) -> str:
    """What a file is that looks like no weights, and what to do; empty where it may be some."""
    text = head.lstrip().lower()
    if not head:
        return "empty: copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights themselves: run git lfs pull where it comes from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights: the download went wrong"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (of Keras): expected one of torch or safetensors"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd")):
        return "a packed archive: unpack it and give the file in it"
    if head.startswith(b"\x93NUMPY"):
        return "an array of numpy: expected tensors by name, of torch or safetensors"
    if head.startswith(b"GGUF"):
        return "a GGUF file: expected one of torch or safetensors"
    if text.startswith(b"{"):
        return "JSON text, not weights: give the .safetensors or .pt file beside it"
    return _kind_of_zip(path) if head.startswith(b"PK") else ""


def _kind_of_zip(path: Path) -> str:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return "cut or damaged: copy or download it again"
    if any(name.endswith("constants.pkl") for name in names):
        return (
            "a TorchScript archive, a program with weights: where you trust it, save torch.jit.load(FILE).state_dict() "
            "with torch.save"
        )
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz archive of numpy arrays: expected tensors by name, of torch or safetensors"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive without weights (it has {_listed(names)}): unpack it and give the file in it"
    return ""


def _reason(error: Exception) -> str:
    """Why torch or safetensors does not read a file, without their advice to trust it."""
    text = str(error) or type(error).__name__
    if found := re.search(r"(?:GLOBAL|global|class) [`']?([\w.]+)[`']?", text):
        return (
            f"it holds an object of {found[1]}, not only tensors; nothing of it was run: where you trust it, save its "
            "state_dict alone with torch.save"
        )
    if "PytorchStreamReader" in text or "central directory" in text:
        return "it is cut or damaged: copy or download it again"
    return shown(text.splitlines()[0])


def _kind(content: object) -> str:
    if isinstance(content, Tensor):
        return f"one tensor {tuple(content.shape)} without a name"
    if isinstance(content, dict):
        names = [str(key) for key in cast(dict[object, object], content)]
        return f"{_listed(names, 6)} without any" if names else "an empty dict"
    return f"an object of {type(content).__name__}"


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")
