"""The files of a checkpoint: which part of the state each one holds, and how it is written and read as plain data.

``encoder.safetensors``  the exported encoder's tensors, by its own names: all that features need, readable by other
                         libraries
``method.pt``            the method's other tensors: heads, teachers, queues
``optimizer.pt``         the optimizer's state
``loader.pt``            which images the run was trained on, and its position in them
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
"""The method's submodule that users get as the encoder, unless the state's ``exported`` names another."""
ENCODER, FACTS = "encoder.safetensors", "facts.json"
_PICKLED = {"method": "method.pt", "optimizer": "optimizer.pt", "loader": "loader.pt"}
STATE_FILE = "state.pt"
"""File with the whole state, as sslx 0.1 wrote it."""
NAMES = (ENCODER, FACTS, *_PICKLED.values(), STATE_FILE)
_MAX_FACTS_BYTES = 1 << 26

Writer = Callable[[Any], None]


def writers(state: Mapping[str, Any]) -> dict[str, Writer]:
    """Return, by file name, the functions that write the parts of the state.

    state: has tensors only in ``method``, ``optimizer`` and ``loader``; everything else becomes JSON.  ``exported`` is
      the method's submodule that users get as the encoder (such as ``teacher.encoder``); the default is ``encoder``.
    """
    assert (problem := states.find_foreign(dict(state), "state")) is None, problem
    facts = {key: value for key, value in state.items() if key not in _PICKLED}
    by_file: dict[str, Writer] = {}
    if "method" in state:
        method: Mapping[str, Any] = state["method"]
        prefix = _prefix(state)
        encoder = {key.removeprefix(prefix): value for key, value in method.items() if key.startswith(prefix)}
        if encoder:
            by_file[ENCODER] = partial(_write_safetensors, encoder)
        rest = {key: value for key, value in method.items() if not key.startswith(prefix)}
        by_file[_PICKLED["method"]] = partial(torch.save, rest)
    for name in ("optimizer", "loader"):
        if name in state:
            by_file[_PICKLED[name]] = partial(torch.save, state[name])
    text = json.dumps(facts, indent=1).encode()
    return by_file | {FACTS: lambda file: file.write(text)}


def _prefix(state: Mapping[str, Any]) -> str:
    """Return the prefix of the exported encoder's tensors in the method's state."""
    return f"{state.get('exported', EXPORTED)}."


def _write_safetensors(tensors: Mapping[str, Tensor], file: Any) -> None:
    # Make the weights contiguous, because channels_last is the module's layout, not the weights'.  Clone them, because
    # safetensors refuses tensors that share memory, and a trunk may share tensors between two names.
    plain = torch.contiguous_format
    file.write(safetensors.torch.save({k: x.detach().cpu().clone(memory_format=plain) for k, x in tensors.items()}))


def file_filter(needs: Sequence[str]) -> Callable[[Sequence[str]], list[str]]:
    """Return a function that picks from file names those with the parts in ``needs``, or all if ``needs`` is empty."""

    def choose(names: Sequence[str]) -> list[str]:
        needed = {STATE_FILE, FACTS, *(_PICKLED[name] for name in needs if name in _PICKLED)}
        if {"method", "encoder"} & set(needs):
            needed.add(ENCODER)
        return [name for name in names if not needs or name in needed]

    return choose


def read(opened: Mapping[str, BinaryIO], map_location: str | torch.device, needs: Sequence[str], title: str) -> object:
    """Return the state from verified files, without running any code in them; only tensors in these files are in it.

    If ``needs`` names ``encoder``, the state has the encoder's tensors by its own names under that key.  Raise
    DataError, in one line that starts with ``title``, for files that hold anything but plain data.
    """
    try:
        if STATE_FILE in opened:
            state = torch.load(opened[STATE_FILE], map_location=map_location, weights_only=True)
            return _with_encoder(state) if "encoder" in needs else state
        state = _read_facts(opened[FACTS], title)
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
        match = re.search(r"unsupported \w+ \S+", str(error), re.IGNORECASE)
        detail = f" ({match[0]})" if match else ""
        raise DataError(
            f"{title} is not trusted: it holds more than tensors and plain data{detail}; none of it was run: "
            "use one that sslx wrote"
        ) from error
    except (MemoryError, torch.OutOfMemoryError, DataError):
        raise
    except SafetensorError as error:
        raise DataError(f"{title} cannot be loaded ({ENCODER}: {error}): use one that sslx wrote") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise DataError(f"{title} cannot be loaded ({reason}): use one that sslx wrote") from error


def _read_facts(file: BinaryIO, title: str) -> dict[str, Any]:
    try:
        return files.parse_json(file.read(_MAX_FACTS_BYTES))
    except ValueError as error:
        raise DataError(f"{title} was not written by sslx: its {FACTS}: {files.reason(error)}") from error


def _with_encoder(state: object) -> object:
    """Return a state of sslx 0.1 with the encoder's tensors added under ``encoder``, by its own names."""
    if type(state) is not dict or not isinstance(state.get("method"), Mapping):
        return state
    method: Mapping[Any, Any] = state["method"]
    prefix = f"{EXPORTED}."
    names = [key for key in method if isinstance(key, str) and key.startswith(prefix)]
    return {**state, "encoder": {key.removeprefix(prefix): method[key] for key in names}}
