"""What the library of a target cannot load, in one line each; and what several targets need to write tensors."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from sslx import encoders
from sslx.encoders import Encoder
from sslx.encoders.group_norm import GroupNorm
from sslx.errors import ConfigError

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions of whole names, each with the new name as in ``re.sub``."""


def refusal(library: str, encoder: Encoder, feature: str, *, also: str = "", advice: str = "") -> ConfigError:
    """Return the error for an encoder with a feature that the library's model of this name does not have.

    feature: what the model would be "with" or "without".  also: another target that has it.  advice: what else to do.
    """
    return ConfigError(
        f"{library} has no {encoder.recipe.name} {feature}, so it cannot load this encoder: "
        f"{_other_targets(encoder, also)}{advice}"
    )


def unknown(library: str, encoder: Encoder) -> ConfigError:
    """Return the error for an encoder of an architecture that sslx does not write in the library's format."""
    return ConfigError(
        f"of timm's models, sslx writes ResNets, ConvNeXts and ViTs for {library}, not {encoder.recipe.name}: "
        f"{_other_targets(encoder)}"
    )


def _other_targets(encoder: Encoder, also: str = "") -> str:
    timm = "" if _unlike_timm(encoder) else "timm"
    *names, last = filter(None, (timm, also, "safetensors", "onnx"))
    return f"use --to {', '.join(names)} or {last}"


def _unlike_timm(encoder: Encoder) -> str:
    """Return the feature that timm's model of this name does not have, or an empty string."""
    if encoder.recipe.stem != "imagenet":
        return f"with a {encoder.recipe.stem} stem"
    return "with group norm" if any(isinstance(part, GroupNorm) for part in encoder.trunk.modules()) else ""


def check_stem_and_norm(library: str, encoder: Encoder) -> None:
    """Raise ConfigError for an encoder with a small stem or with group norm, which no other library has."""
    if feature := _unlike_timm(encoder):
        advice = ", or pretrain with --encoder.stem imagenet and batch norm"
        raise refusal(library, encoder, feature, advice=advice)


def is_gelu(module: object) -> bool:
    """Return whether an activation is the exact GELU."""
    from timm.layers.activations import GELU  # inside the function: see encoders.build

    return isinstance(module, GELU) or (isinstance(module, nn.GELU) and module.approximate == "none")


def other_size(encoder: Encoder, size: int) -> int | None:
    """Return a side in pixels, other than ``size``, of images that the encoder takes too; None if it takes no other."""
    other = size + 2 * (encoder.patch or 16)
    return other if encoders.accepts_size(encoder, other) else None


def require(target: str, *packages: str) -> None:
    """Raise ConfigError, with the command that installs them, unless the packages of a target can be imported."""
    try:
        for package in packages:
            import_module(package)
    except ImportError as error:
        command = f"pip install {' '.join(packages)}"
        raise ConfigError(
            f"--to {target} needs {error.name or packages[0]}, which is not installed: {command}"
        ) from error


def renamed(tensors: Mapping[str, Tensor], rules: Rules, library: str, encoder: Encoder) -> dict[str, Tensor]:
    """Return the tensors by the library's names.  Raise ConfigError for one that no rule names."""
    names: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        rule = next(((pattern, new) for pattern, new in rules if re.fullmatch(pattern, name)), None)
        if rule is None:
            raise refusal(library, encoder, f"with {name}")
        names[re.sub(rule[0], rule[1], name, count=1)] = tensor.contiguous()
    return names


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as ``torch.save`` does.  Raise OSError, which torch itself does not, if the disk is full."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getbuffer())
