"""Reads an encoder that sslx did not train, or that it exported: its recipe, weights and view, from files alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sslx import rng
from sslx.console.words import one_line, shown
from sslx.data import views
from sslx.data.views import ViewSpec
from sslx.encoders.encoder import rebuild
from sslx.encoders.recipe import Recipe
from sslx.encoders.weights import files, identify, loading, preprocessing
from sslx.encoders.weights.candidates import refusal
from sslx.encoders.weights.tables import located, tables
from sslx.errors import DataError
from sslx.machine.files import read_text
from sslx.runs import manifest

_PART = "--part, or part= in Python"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An encoder in a file.  weights: by the names of an ``Encoder``.  notes: what was loaded, and how images are made.

    view: the transform of an image for features.
    """

    recipe: Recipe
    view: ViewSpec
    weights: Mapping[str, Tensor]
    notes: tuple[str, ...]


def is_foreign(path: Path) -> bool:
    """Return whether there is a file, or a folder with one, that is no part of a run of sslx."""
    if path.is_dir():
        return files.in_folder(path) is not None or (path / "model.onnx").is_file()
    is_of_run = (path.parent / manifest.NAME).is_file() or manifest.FOLDER.fullmatch(path.parent.name)
    return path.exists() and not is_of_run


def read(path: Path, part: str | None = None) -> Foreign:
    """Return the encoder in a file of torch or safetensors, or in a folder that ``sslx export`` or a library wrote.

    part: the place of the encoder in a file that holds several, such as "teacher".
    Raises MissingInput if there is no such file, and DataError if it is damaged, needs code to be run, or holds no
    encoder that is recognized, only a part of one, or several.
    """
    origin = shown(path)
    file = located(str(path), origin)
    if file == path and (path / "model.onnx").is_file():
        raise DataError(f"{origin} holds an ONNX file, which onnxruntime runs, and no weights: export to safetensors")
    found, settings = tables(str(file), origin), files.config_beside(file)
    recipe, view = _saved(file, path)
    if recipe is None:
        if reason := refusal(found):
            raise DataError(f"{origin} holds {reason}")
        recipe = identify.chosen(identify.of_tables(found, settings), part, origin, _PART)
    if view is None:
        view, words = _view(file, recipe)
    else:
        words = "as sslx export wrote it down"
    with rng.OwnGenerator():
        encoder = rebuild(recipe, view.size)
    line = loading.load_tables(encoder.trunk, found, settings, recipe.name, origin, part, part_flag=_PART)
    notes = f"weights: {line.removeprefix(f'{origin}: ')}", f"preprocessing: {view.size} px, {words}"
    return Foreign(recipe=recipe, view=view, weights=encoder.state_dict(), notes=notes)


def _saved(file: Path, path: Path) -> tuple[Recipe | None, ViewSpec | None]:
    """Return the recipe and the view that ``sslx export`` wrote into or beside a file, or (None, None).

    What stands beside a file is of the one whose name the folder's weights have.
    """
    saved: Mapping[str, Any] = files.metadata(file)
    beside = file.parent / preprocessing.SSLX
    where = f"the metadata of {shown(file)}"
    try:
        if not {"sslx", "recipe", "view"} <= saved.keys():
            if (path != file.parent and files.in_folder(file.parent) != file) or not beside.is_file():
                return None, None
            where, saved = shown(beside), json.loads(read_text(beside))
        recipe, view = (json.loads(value) if isinstance(value, str) else value
                        for value in (saved["recipe"], saved["view"]))  # fmt: skip
        return Recipe(**recipe), views.from_json(view)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is not as sslx export wrote it: {one_line(error)}") from error


def _view(file: Path, recipe: Recipe) -> tuple[ViewSpec, str]:
    """Return how images are prepared according to a file beside the weights, else the usual way, and words on it."""
    if found := preprocessing.view_beside(file):
        view, name = found
        return view, f"as {name} says"
    view, words = preprocessing.default(recipe.size, recipe.name)
    return view, f"with {words}, because no file beside the weights says how images are prepared"
