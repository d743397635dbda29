"""Loads an encoder's weights from files of other libraries, or says in one line what is wrong with a file.

Each framework stores an encoder in its own place: in ``state_dict`` as ``module.encoder_q.conv1.weight``, in
``teacher`` as ``backbone.blocks.0.norm1.bias``.  So every table of tensors in the file is searched for a prefix under
which all of the encoder's tensors stand with the right shapes, under timm's names or those of a layout.  Heads and
other prefixes are left out and reported.  No code in a file is run.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sslx.console.words import shown
from sslx.encoders.weights import accounting
from sslx.encoders.weights.accounting import Account, is_derived
from sslx.encoders.weights.candidates import Candidate, candidates, of_timms_converter, refusal
from sslx.encoders.weights.files import config_beside
from sslx.encoders.weights.kinds import listed
from sslx.encoders.weights.tables import Table, located, tables
from sslx.errors import DataError

SSLX_PREFIX = "method.encoder.trunk"
"""Place of the encoder in an sslx checkpoint, which may hold a teacher or a target of the same shape as well."""


def load(trunk: nn.Module, source: str, name: str, part: str | None = None, missing: Sequence[str] = ()) -> str:
    """Copy an encoder's weights from a file or an sslx run into the trunk; return a log line about what was loaded.

    source: a run folder, a checkpoint in it, a file of torch or safetensors, or a folder of another library.
    name: the trunk's name, for messages.
    part: place of the encoder in a file that holds several encoders, such as "teacher" or "encoder_q".
    missing: patterns of the names of the encoder's tensors that the file may lack, as for ``fnmatch``.
    Raises MissingInput if there is no such file.  Raises DataError if the file holds no weights, no such encoder, only
    a part of it, several of them, or numbers that are not floats.  The trunk is then unchanged.
    """
    origin = f"--encoder.weights {shown(source)}"
    _check_patterns(missing, trunk.state_dict(), name)
    settings = config_beside(located(source, origin))
    return load_tables(trunk, tables(source, origin, part), settings, name, origin, part, missing)


def load_tables(
    trunk: nn.Module,
    found: list[Table],
    settings: Mapping[str, object],
    name: str,
    origin: str,
    part: str | None = None,
    missing: Sequence[str] = (),
    part_flag: str = "--encoder.weights-part",
) -> str:
    """Do the work of ``load`` for the tables of a file.

    settings: the content of the ``config.json`` beside the file.  origin: how messages name the file.
    part_flag: how they name the choice of a part.
    """
    own = trunk.state_dict()
    classifiers = accounting.classifiers(trunk)
    possible = list(candidates(found, trunk, own))
    accounts = [(one, accounting.account(one, own, classifiers, missing)) for one in possible]
    if not (complete := _complete(accounts, own)):
        others = of_timms_converter(found, trunk, own)
        complete = _complete([(one, accounting.account(one, own, classifiers, missing)) for one in others], own)
    if not complete and (reason := refusal(found)):
        raise DataError(f"{origin} holds {reason}")
    if not any(one.tensors for one in possible) and not complete:
        names = [".".join([*table.path, key]) for table in found for key in table.tensors]
        raise DataError(
            f"{origin} has no tensor of {name}: it holds {len(names)} others ({listed(names)}); sslx weights FILE "
            "shows which encoder it fits"
        )
    if not complete:
        candidate, account = min(accounts, key=lambda pair: pair[1].num_misfits)
        raise DataError(f"{origin} does not fit {name}: {accounting.description(candidate, account, own)}")
    fewest = min(len(account.allowed) for _, account in complete)
    chosen, account = _choose([pair for pair in complete if len(pair[1].allowed) == fewest], part, origin, part_flag)
    values = {key: tensor.value for key, tensor in chosen.tensors.items() if key not in account.allowed}
    _check_dtypes(values, own, origin)
    _check_heads(trunk, settings, name, origin)
    trunk.load_state_dict({**own, **values}, strict=True)
    return accounting.summary(chosen, account, own, origin) + _other_epsilon(trunk, settings)


def _complete(accounts: list[tuple[Candidate, Account]], own: Mapping[str, Tensor]) -> list[tuple[Candidate, Account]]:
    """Return the candidates that lack nothing but what is allowed, and have more than that."""
    return [pair for pair in accounts if pair[1].num_misfits == 0 and len(pair[1].allowed) < len(own)]


def _check_patterns(patterns: Sequence[str], own: Mapping[str, Tensor], name: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in own):
            raise DataError(
                f"--encoder.missing {shown(pattern)} matches no tensor of {name}, whose names are like "
                f"{listed(list(own), 2)}"
            )


def _choose(
    complete: list[tuple[Candidate, Account]], part: str | None, origin: str, part_flag: str
) -> tuple[Candidate, Account]:
    """Return the only candidate, or the one that ``part`` names; DataError if none or several different ones remain."""
    if part is None and any(candidate.prefix == SSLX_PREFIX for candidate, _ in complete):
        part = SSLX_PREFIX
    if part is not None:
        words = part.strip(".").split(".")
        named = [pair for pair in complete if _contains(pair[0].prefix.split("."), words)]
        if not named:
            prefixes = listed([candidate.prefix or "no prefix" for candidate, _ in complete])
            raise DataError(f"{origin} holds the encoder under {prefixes}, not under {part_flag} {shown(part)}")
        complete = named
    if not all(_equal(complete[0][0], other) for other, _ in complete[1:]):
        prefixes = listed([candidate.prefix or "no prefix" for candidate, _ in complete], 6)
        raise DataError(f"{origin} holds {len(complete)} such encoders, under {prefixes}: choose one with {part_flag}")
    return complete[0]


def _contains(words: list[str], run: list[str]) -> bool:
    """Return whether ``run`` occurs in ``words`` as consecutive elements."""
    return any(words[i : i + len(run)] == run for i in range(len(words)))


def _equal(first: Candidate, second: Candidate) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor.value, second.tensors[name].value) for name, tensor in first.tensors.items()
    )


def _check_dtypes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Raise DataError for weights whose numbers are of another kind than the encoder's."""
    for name, value in tensors.items():
        if is_derived(name):  # scripts that convert a checkpoint to half precision convert the counters, too
            continue
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise DataError(f"{origin}: {name} is quantized, sparse or without data: expected plain tensors")
        if value.is_complex() or value.is_floating_point() != own[name].is_floating_point():
            raise DataError(f"{origin}: {name} is {value.dtype}, expected {own[name].dtype} or another float")


def _check_heads(trunk: nn.Module, settings: Mapping[str, object], name: str, origin: str) -> None:
    """Raise DataError if the ``config.json`` beside the file has another number of heads, which no tensor shows."""
    expected = settings.get("num_attention_heads")
    numbers = {module.num_heads for module in trunk.modules() if hasattr(module, "num_heads")}
    if isinstance(expected, int) and len(numbers) == 1 and numbers != {expected}:
        raise DataError(
            f"{origin} does not fit {name}: its config.json has {expected} heads, and the encoder {numbers.pop()}: use "
            "the --encoder.name that it was trained with"
        )


def _other_epsilon(trunk: nn.Module, settings: Mapping[str, object]) -> str:
    """Return what to add to the line if layer norms were trained with another epsilon, which changes features a bit."""
    expected = settings.get("layer_norm_eps")
    numbers = {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)}
    if not isinstance(expected, float) or len(numbers) != 1 or numbers == {expected}:
        return ""
    return f"; its config.json has layer norms with an epsilon of {expected:g}, and the encoder {numbers.pop():g}"
