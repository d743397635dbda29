"""The model card beside an export: how it is used, how the encoder was trained, and what it scored."""

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from sslx import __version__, by_name, config
from sslx.config import PretrainConfig, flags
from sslx.console.words import one_line, plural, shown
from sslx.errors import UserError
from sslx.export.preprocessing import as_python, given, in_words
from sslx.machine import files
from sslx.runs import records
from sslx.runs.records import Start
from sslx.trained import Trained

LINE_WIDTH = 110
"""Of the command, in characters."""
_NAMED = ("python", "torch", "timm")
"""Packages whose versions the card names."""
_MAX_BYTES = 1 << 20
"""Of a probe.json."""


def text(trained: Trained, target: ModuleType, folder: Path) -> str:
    """Return the README of an export.  folder: where the export will be."""
    recipe = trained.encoder.recipe
    origin = f"pretrained without labels by sslx {__version__}"
    if not trained.is_run:
        origin = f"that sslx {__version__} did not train, but read from {shown(trained.folder.name)}"
    prepared = target.preprocessing(trained, folder) if hasattr(target, "preprocessing") else as_python(trained.view)
    lines = [
        f"# {shown(trained.folder.name)}",
        "",
        f"An encoder {origin}: {recipe.name}, {trained.dim} features.",
        "",
        *_code(target.usage(trained, folder), "python"),
        "",
        f"`images` is a batch of prepared images (B, C, H, W) in float32. This prepares {given(trained.view)}:",
        "",
        *_code(prepared, "python"),
        "",
        *_training(trained),
    ]
    return "\n".join([*lines, *_scores(trained)]) + "\n"


def facts(trained: Trained, target: ModuleType | None = None) -> dict[str, Any]:
    """Return what ``sslx.load`` needs of an export: sslx's version, and the recipe and view of what was written.

    target: a target that may write another architecture with the same features.
    """
    recipe = target.recipe(trained) if target and hasattr(target, "recipe") else trained.encoder.recipe
    return {"sslx": __version__, "recipe": asdict(recipe), "view": asdict(trained.view)}


def metadata(trained: Trained) -> dict[str, str]:
    """Return the metadata of an exported file: ``facts``, each as JSON if it is no text."""
    return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts(trained).items()}


def quoted(path: Path | str) -> str:
    """Return a path as a Python string in double quotes, with escapes for what cannot be printed."""
    return json.dumps(str(path), ensure_ascii=not str(path).isprintable())


def command(settings: PretrainConfig) -> str:
    """Return the ``sslx pretrain`` command with every setting of a run, apart from its name and folder."""
    tree = json.loads(config.dump(settings))
    for name in ("schema", "name", "runs", "resume"):
        del tree[name]
    lines = ["sslx pretrain"]
    for option in _options(flags.of(tree, Path("config.json"))):
        if len(lines[-1]) + 1 + len(option) > LINE_WIDTH:
            lines.append(f"  {option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines)


def _options(args: list[str]) -> Iterator[str]:
    """Yield each flag with its values, quoted for a shell."""
    words: list[str] = []
    for arg in args:
        if words and arg.startswith("--"):
            yield shlex.join(words)
            words = []
        words.append(arg.replace("_", "-") if arg.startswith("--") else arg)
    yield shlex.join(words)


def _code(code: str, language: str) -> list[str]:
    return [f"```{language}", code, "```"]


def _training(trained: Trained) -> list[str]:
    """Return the lines about the run, or on what was read from another library's files."""
    if not trained.is_run:
        rows = [note.partition(": ")[::2] for note in trained.notes]
        rows.append(("images", in_words(trained.view)))
        return ["| | |", "| --- | --- |", *(f"| {name} | {_cell(value)} |" for name, value in rows), ""]
    try:
        settings = trained.settings
    except UserError as error:  # of another version of sslx, whose encoders can be exported all the same
        return [f"How it was trained cannot be read: {one_line(error)}", ""]
    recipe, starts = trained.encoder.recipe, records.read_starts(trained.folder)
    num_parameters = sum(parameter.numel() for parameter in trained.encoder.parameters())
    arguments = "".join(f", {name} {value}" for name, value in recipe.arguments.items() if name != "img_size")
    rows = {
        "method": f"{by_name.label(settings.method.name)}, of which this is `{trained.exported}`",
        "encoder": f"{recipe.name}{arguments}, {recipe.stem} stem, {num_parameters:,} parameters",
        "images": f"{by_name.label(settings.source.name)}, {trained.size} px",
        "steps": f"{trained.step:,} of batch size {settings.batch_size:,}",
        "trained on": _hardware(trained.folder, starts),
        "preprocessing": in_words(trained.view),
    }
    table = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    typed = list(dict.fromkeys(start.command for start in starts))
    lines = ["| | |", "| --- | --- |", *table, ""]
    if typed:
        lines += ["Started by:", "", *_code("\n".join(shown(line, 10_000) for line in typed), "bash"), ""]
    lines += ["With every setting, whatever the defaults of the installed sslx:", "", *_code(command(settings), "bash")]
    return [*lines, ""]


def _cell(value: str) -> str:
    return shown(value, 1_000).replace("|", "\\|")


def _hardware(run: Path, starts: list[Start]) -> str:
    """Return the hardware and versions of the run's starts, and its last speed, or an empty string."""
    machines: list[str] = []
    for start in starts:
        versions = ", ".join(f"{name} {start.versions[name]}" for name in _NAMED if name in start.versions)
        ranks = plural(len(start.hosts), "rank")
        machines.append(f"{ranks} on {start.device}, {plural(start.cores, 'core')} each; {versions}")
    with suppress(UserError):
        if machines and (speed := records.last_metrics(run / "metrics.jsonl").get("samples_per_s")):
            machines[-1] += f"; {speed:,.0f} images/s"
    return "; then ".join(dict.fromkeys(machines))


def _scores(trained: Trained) -> list[str]:
    """Return the table of the scores that ``sslx probe`` wrote to the run folder, or no lines."""
    if not trained.is_run:
        return []
    path = trained.folder / "probe.json"
    try:
        record = files.parse_json(files.read_bytes(path, _MAX_BYTES))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, UserError) as error:
        return [f"The scores in {shown(path)} cannot be read: {one_line(error)}"]
    rows: list[Any] = record.get("scores") or record.get("label_free") or []
    columns = {
        str(row.get("name")): {key: value for key, value in flags.leaves(row) if isinstance(value, float)}
        for row in rows
        if isinstance(row, dict)
    }
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return []
    num_images, split, source, step = (shown(record.get(key)) for key in ("num_images", "split", "source", "step"))
    lines = [
        f"Scores by `sslx probe` on {num_images} images of the {split} split of {source}, at step {step}:",
        "",
        f"| score | {' | '.join(map(_cell, columns))} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for name in names:
        values = (f"{column[name]:.4g}" if name in column else "" for column in columns.values())
        lines.append(f"| {_cell(name)} | {' | '.join(values)} |")
    return lines
