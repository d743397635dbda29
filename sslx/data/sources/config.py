"""The options that all sources share.  This module imports neither numpy nor torch, so that flags and help are fast."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sslx.machine.files import expanded

if TYPE_CHECKING:
    from sslx.data.sources.base import Context, Source

Split = Literal["pretrain", "train", "test"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Options that all sources share.  Each source's Config adds its name and the options that locate its images.

    is_own: whether the images are a user's own, unlike those of a well-known data set.  has_unlabeled: whether the
    split ``pretrain`` has images that ``train`` lacks.  suited, suited_why: values of a run's options, by dotted name,
    that suit these images, and the reason in a few words.  score_note: a remark on scores on these images.
    """

    name: str
    """Source: a name from 'sslx sources', a .py file or module:Class.  Default with --source.root FOLDER: folder."""

    is_own: ClassVar[bool] = True
    has_unlabeled: ClassVar[bool] = False
    suited: ClassVar[dict[str, Any]] = {}
    suited_why: ClassVar[str] = ""
    score_note: ClassVar[str] = ""

    def build(self, split: Split, context: "Context") -> "Source":
        """Return the images of a split: ``pretrain`` (includes unlabeled images, if any), ``train`` or ``test``.

        Raises MissingInput, DataError or ConfigError, each in one line that names the place and the flag.
        """
        raise NotImplementedError(f"the Config of source {self.name} must define build()")

    @property
    def place(self) -> tuple[str, ...]:
        """The location of the training images: configs with the same place name the same images."""
        values = [getattr(self, field.name) for field in fields(self) if field.name != "test_root"]
        several = [value if isinstance(value, tuple) else (value,) for value in values]
        paths = [path for some in several for path in some if isinstance(path, Path)]
        return self.name, *(str(path) if is_address(path) else os.path.realpath(expanded(path)) for path in paths)


def is_address(place: str | Path) -> bool:
    """Return whether this is an address such as s3://bucket/folder, of which a Path keeps a single slash."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", str(place)) is not None
