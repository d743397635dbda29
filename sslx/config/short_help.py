"""The short help of ``sslx pretrain``: the most common options with their current values."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any, cast, get_args

from sslx.config import PretrainConfig
from sslx.data import sources

_GROUPS: dict[str, tuple[str, ...]] = {
    "images": ("source.root", "source.name", "source.test_root", "data.size", "data.backend"),
    "what is trained": ("method.name", "encoder.name", "encoder.weights"),
    "how long": ("epochs", "steps", "batch_size"),
    "optimizer": ("optim.name", "optim.lr", "optim.weight_decay", "optim.warmup"),
    "augmentation": ("augment.min_scale", "augment.jitter", "augment.blur", "augment.flip"),
    "where and how": ("ranks", "device", "precision", "compile", "batch_norm", "num_grad_cache_chunks"),
    "the run": ("name", "runs", "resume", "seed", "checkpoint.every", "log.every", "log.wandb", "log.tensorboard"),
}
_INDENT = 30


def text(config: PretrainConfig, recipes: Sequence[str], num_options: int) -> str:
    """Return the help text.  recipes: the recipes that the config's values come from."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    lines = [
        "usage: sslx pretrain [RECIPE ...] [--option VALUE ...]",
        "",
        "Pretrain an image encoder without labels, as in:  sslx pretrain --source.root PHOTOS",
        "RECIPE is a name (sslx recipes lists them), a .toml file or a run folder.  Later recipes override earlier "
        "ones, and options override recipes.  Unset options follow the method, encoder, batch size and images.",
    ]
    lines = [part for line in lines for part in (textwrap.wrap(line, width) or [""])]
    whose = "here" if recipes else "default"
    for group, names in _GROUPS.items():
        lines += ["", f"{group}:"]
        for name in names:
            lines += _option(config, name, whose, width)
    everything = " ".join(["sslx pretrain", *recipes, "--help-all"])
    last = f"All {num_options} options: {everything}.  See also: sslx methods, sslx sources, sslx recipes."
    lines += ["", *textwrap.wrap(last, width)]
    return "\n".join(lines) + "\n"


def _option(config: PretrainConfig, name: str, whose: str, width: int) -> list[str]:
    section, _, option = name.rpartition(".")
    owner: Any = getattr(config, section) if section else config
    if section == "source" and not hasattr(owner, option):  # another source's, which it would choose
        owner = sources.options("folder")(name="folder")
    value = getattr(owner, option)
    flag = f"  --{name.replace('_', '-')} {_kind(owner, option)}"
    words = " ".join(_texts(type(owner))[option].split())
    if value not in (None, "", ()):
        words += f" ({whose}:\xa0{_shown(value)})"  # in one piece
    body = [line.replace("\xa0", " ") for line in textwrap.wrap(words, width - _INDENT, break_long_words=False)]
    if len(flag) < _INDENT:
        return [f"{flag:{_INDENT}}{body[0]}", *(" " * _INDENT + line for line in body[1:])]
    return [flag, *(" " * _INDENT + line for line in body)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "\xa0".join(map(str, cast(tuple[Any, ...], value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(owner: Any, option: str) -> str:
    """Return a placeholder for the option's value in capitals, or its choices if they are few."""
    annotation = next(field.type for field in dataclasses.fields(owner) if field.name == option)
    choices = [str(choice) for choice in get_args(annotation) if isinstance(choice, str)]
    if choices:
        return "|".join(choices) if len(choices) < 5 else "NAME"
    text = str(annotation)
    return next(
        (word for part, word in (("Path", "FOLDER"), ("float", "X"), ("int", "N"), ("str", "NAME")) if part in text), ""
    )


@cache
def _texts(kind: type) -> dict[str, str]:
    """Return the text below each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # made for the choice of methods: its bases have the texts
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant):
                    texts[field.target.id] = str(after.value.value)
    return texts
