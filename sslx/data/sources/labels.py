"""Labels and captions of a table's rows or an archive's members, as numbers and names of classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from sslx.console.words import plural, shown
from sslx.data.sources.base import Source
from sslx.data.sources.located import Located
from sslx.errors import DataError

Kind = TypeVar("Kind", bound=Source)
NAMES = ("label", "labels", "class", "target", "category")
"""Usual names of a column of labels."""
CAPTIONS = ("caption", "captions", "text", "sentence")
"""Usual names of a column of captions."""


def column(names: Sequence[str], usual: Sequence[str], chosen: str, flag: str, place: str) -> str:
    """Return the chosen one of a table's columns, or the first one that has a usual name, in any case; "" if none has.

    Raises DataError, with all columns, if the chosen one is missing.
    """
    if chosen and chosen not in names:
        raise DataError(f"{place} has no column {chosen!r} ({flag}): its columns are {listed(names)}")
    lower = {name.lower(): name for name in reversed(names)}
    return chosen or next((lower[name] for name in usual if name in lower), "")


def listed(names: Sequence[str]) -> str:
    """Join a table's columns for messages."""
    return shown(", ".join(map(repr, names)) or "none")


def labeled(
    source: Kind, values: Sequence[Any], known: Sequence[str] | None, names: Sequence[str] | None = None
) -> Kind:
    """Return the source with labels: whole numbers or names of classes, or text that holds either.

    values: each image's label; None, "", NaN or [] for none; a list of one label counts as that label.  known: the
    classes of the training images, for test images; those of other classes are left out.  names: the names of the
    classes 0, 1, ..., if they are known; otherwise numbers are sorted as such and names as text.  Raises DataError for
    a label that is neither, such as 0.5.
    """
    try:
        single = {value: _single(value) for value in set(values)}
        singles = [single[value] for value in values]
    except TypeError:  # lists, which are not hashable
        singles = [_single(value) for value in values]
    if missing := [i for i, value in enumerate(singles) if value is None or (names and value == -1)]:
        some = f"{plural(len(missing), 'image')} without a label, the first one {source.where(missing[0])}"
        return replace(source, unlabeled=some if len(missing) < len(values) else "no labels")
    if several := [i for i, value in enumerate(singles) if isinstance(value, list)]:
        some = f"several labels of an image, such as {source.where(several[0])}, are not supported"
        return replace(source, unlabeled=some)
    if odd := [i for i, value in enumerate(singles) if not isinstance(value, int | str)]:
        raise _neither(singles[odd[0]], source.where(odd[0]))
    first = dict(zip(reversed(singles), range(len(singles) - 1, -1, -1), strict=True))
    title = _titles(first, names, source)
    if known or not names:
        number = {name: i for i, name in enumerate(known or dict.fromkeys(title.values()))}
    else:
        number = {shown(name): i for i, name in enumerate(names)}
    labels = np.array([number.get(title[value], -1) for value in singles], dtype=np.int64)
    source = replace(source, facts=replace(source.facts, labels=labels, classes=tuple(number)))
    unknown = [name for name in title.values() if name not in number]
    return without_unknown(source, unknown) if unknown else source


def _single(value: Any) -> Any:
    """Return a label as an int, a text or a list of several; None for none."""
    if isinstance(value, list | tuple) and len(value) < 2:
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value.strip()
        is_number = text.isascii() and text.lstrip("-").isdigit() and str(int(text)) == text  # 007 is a name
        return int(text) if is_number else text or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if value != value else value  # NaN


def _titles(first: Mapping[Any, int], names: Sequence[str] | None, source: Source) -> dict[Any, str]:
    """Return the classes' names by their labels, sorted.  first: the first image that has each label."""
    for label, i in first.items():
        if names and not (isinstance(label, int) and 0 <= label < len(names)):
            raise DataError(f"the label of {source.where(i)} is {label}, but there are names of {len(names)} classes")
    texts = [label for label in first if isinstance(label, str)]
    if texts and all(map(_is_float, texts)):
        raise _neither(texts[0], source.where(first[texts[0]]))
    if names:
        return {label: shown(names[label]) for label in sorted(first)}
    order: list[Any] = sorted(first, key=str if texts else None)
    return {label: shown(label, limit=len(str(label)) * 10) for label in order}


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "." in text


def _neither(value: object, place: str) -> DataError:
    return DataError(f"the label of {place} is {shown(value, 60)}: expected a whole number or the name of a class")


def captioned(source: Kind, values: Sequence[Any]) -> Kind:
    """Return the source with captions: each image's text or list of texts, None or "" for none.

    Without captions for all images, it has none, and a note says so.
    """
    texts = [
        tuple(map(str, value if isinstance(value, list | tuple) else [value] if value else [])) for value in values
    ]
    if missing := [i for i, some in enumerate(texts) if not some]:
        if len(missing) == len(texts):
            return source
        note = f"no captions for all: {plural(len(missing), 'image')} without, the first one {source.where(missing[0])}"
        return replace(source, notes=(*source.notes, note))
    return replace(source, facts=replace(source.facts, captions=texts))


def first_labeled(found: Located, build: Callable[[str, Sequence[str]], Kind]) -> Kind:
    """Return the first source with labels that ``build`` makes of the name and files, else the first one."""
    sources: list[Kind] = []
    for paths in found.candidates:
        sources.append(build(found.name, paths))
        if sources[-1].facts.labels is not None:
            break
    source = sources[-1] if sources[-1].facts.labels is not None else sources[0]
    return replace(source, notes=(*found.notes, *source.notes))


def without_unknown(source: Kind, unknown: Sequence[str]) -> Kind:
    """Return a test split without the images of classes that training lacks.  Raises DataError if none are left.

    unknown: the names of these classes.
    """
    facts = source.facts
    assert facts.labels is not None
    kept = np.flatnonzero(facts.labels >= 0)
    unknown_classes = f"'{unknown[0]}'{and_more(len(unknown) - 1)}"
    if not len(kept):
        raise DataError(
            f"the test images below {source.name} share no class with the training images: the test classes are "
            f"{unknown_classes}, the training classes {', '.join((facts.classes or ())[:5])}: check --source.test-root"
        )
    note = (
        f"{len(source) - len(kept):,} test images are left out: the training images lack their class, {unknown_classes}"
    )
    return replace(source.take(kept), notes=(*source.notes, note))


def and_more(count: int) -> str:
    """Return " and N more", or "" for none."""
    return f" and {count:,} more" if count > 0 else ""
