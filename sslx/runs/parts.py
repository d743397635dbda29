"""The files of a checkpoint: which part of the state is in which, and how each is written and read as plain data.

``encoder.safetensors``  the exported encoder's tensors, by its own names: all that features need, readable by other
                         libraries
``method.pt``            the method's other tensors: heads, teachers, queues
``optimizer.pt``         the optimizer's state
``loader.pt``            which images the run was trained on, and how far
``facts.json``           everything else: config, step, view, ids
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sslx.errors import DataError
from sslx.machine import files
from sslx.runs import state as states

EXPORTED = "encoder"
"""The name, among the modules of the method, of the encoder that users get, where the state does not say another."""
ENCODER, FACTS = "encoder.safetensors", "facts.json"
_PICKLED = {"method": "method.pt", "optimizer": "optimizer.pt", "loader": "loader.pt"}
OLD = "state.pt"
"""The whole state in one file, as sslx 0.1 wrote it."""
NAMES = (ENCODER, FACTS, *_PICKLED.values(), OLD)
_MAX_FACTS_BYTES = 1 << 26

Writer = Callable[[Any], None]


def writers(state: Mapping[str, Any]) -> dict[str, Writer]:
    """File name -> the function that writes its part of the state.

    state: tensors only in ``method``, ``optimizer`` and ``loader``; everything else becomes JSON.  ``exported`` is the
      name of the encoder that users get among the modules of the method (``teacher.encoder``); default: ``encoder``.
    """
    assert (foreign := states.foreign(dict(state), "state")) is None, foreign
    facts = {key: value for key, value in state.items() if key not in _PICKLED}
    found: dict[str, Writer] = {}
    if "method" in state:
        method: Mapping[str, Any] = state["method"]
        prefix = _prefix(state)
        encoder = {key.removeprefix(prefix): value for key, value in method.items() if key.startswith(prefix)}
        if encoder:
            found[ENCODER] = partial(_write_safetensors, encoder)
        rest = {key: value for key, value in method.items() if not key.startswith(prefix)}
        found[_PICKLED["method"]] = partial(torch.save, rest)
    for name in ("optimizer", "loader"):
        if name in state:
            found[_PICKLED[name]] = partial(torch.save, state[name])
    text = json.dumps(facts, indent=1).encode()
    return found | {FACTS: lambda file: file.write(text)}


def _prefix(state: Mapping[str, Any]) -> str:
    """Return what the names of the exported encoder's tensors begin with in the method's state."""
    return f"{state.get('exported', EXPORTED)}."


def _write_safetensors(tensors: Mapping[str, Tensor], file: Any) -> None:
    # Contiguous, since channels_last is a layout of the module and not of its weights, and each with memory of its own,
    # which safetensors insists on: a trunk may share tensors between two names.
    plain = torch.contiguous_format
    file.write(safetensors.torch.save({k: x.detach().cpu().clone(memory_format=plain) for k, x in tensors.items()}))


def needed(needs: Sequence[str]) -> Callable[[Sequence[str]], list[str]]:
    """Picks from a manifest's names the files with the parts that ``needs`` names; with none named, all files."""

    def choose(names: Sequence[str]) -> list[str]:
        wanted = {OLD, FACTS, *(_PICKLED[name] for name in needs if name in _PICKLED)}
        if {"method", "encoder"} & set(needs):
            wanted.add(ENCODER)
        return [name for name in names if not needs or name in wanted]

    return choose


def read(opened: Mapping[str, BinaryIO], map_location: str | torch.device, needs: Sequence[str], what: str) -> object:
    """The state, from verified files, without running anything in them; of tensors the parts that were read.

    ``encoder`` is the encoder's tensors by its own names, where ``needs`` names it.  DataError, in one line that starts
    with ``what``, for files that hold anything but plain data.
    """
    try:
        if OLD in opened:
            state = torch.load(opened[OLD], map_location=map_location, weights_only=True)
            return _with_encoder(state) if "encoder" in needs else state
        state = _facts(opened[FACTS], what)
        for part, name in _PICKLED.items():
            if name in opened:
                state[part] = torch.load(opened[name], map_location=map_location, weights_only=True)
        if ENCODER in opened:
            encoder = safetensors.torch.load(opened[ENCODER].read())
            encoder = {key: value.to(map_location) for key, value in encoder.items()}
            if "encoder" in needs:
                state["encoder"] = encoder
            if type(state.get("method")) is dict:
                state["method"] |= {_prefix(state) + key: value for key, value in encoder.items()}
        return state
    except pickle.UnpicklingError as error:
        reason = re.search(r"unsupported \w+ \S+", str(error), re.IGNORECASE)
        raise DataError(
            f"{what} is untrusted: it holds more than tensors and plain data"
            f"{f' ({reason[0]})' if reason else ''}; none of it was run: use one that sslx wrote"
        ) from error
    except (MemoryError, torch.OutOfMemoryError, DataError):
        raise
    except SafetensorError as error:
        raise DataError(f"{what} cannot be loaded ({ENCODER}: {error}): use one that sslx wrote") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(f"{what} cannot be loaded ({reason}): use one that sslx wrote") from error


def _facts(file: BinaryIO, what: str) -> dict[str, Any]:
    try:
        return files.parse_json(file.read(_MAX_FACTS_BYTES))
    except ValueError as error:
        raise DataError(f"{what} is not one that sslx wrote: its {FACTS}: {files.reason(error)}") from error


def _with_encoder(state: object) -> object:
    """The state that sslx 0.1 wrote, with the encoder's tensors by its own names beside the method's."""
    if type(state) is not dict or not isinstance(state.get("method"), Mapping):
        return state
    method: Mapping[Any, Any] = state["method"]
    prefix = f"{EXPORTED}."
    names = [key for key in method if isinstance(key, str) and key.startswith(prefix)]
    return {**state, "encoder": {key.removeprefix(prefix): method[key] for key in names}}
