"""What the options of all sources share.  Imports neither numpy nor torch, for help and flags."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sslx.machine.files import expanded

if TYPE_CHECKING:
    from sslx.data.sources.base import Context, Source

Split = Literal["pretrain", "train", "test"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Fields that all sources share; each source's own Config adds its name and what it needs to find its images.

    is_own: whether the images are a user's own, unlike those of a well-known data set.  has_unlabeled: whether the
    split ``pretrain`` has images that ``train`` has not.  suited, suited_why: values of a run's options that suit
    these images, by dotted name, and the reason in a few words.  score_note: what to know about scores on them.
    """

    name: str
    """Where images come from: a name that sslx sources lists, or a .py file.  --source.root FOLDER alone is folder."""

    is_own: ClassVar[bool] = True
    has_unlabeled: ClassVar[bool] = False
    suited: ClassVar[dict[str, Any]] = {}
    suited_why: ClassVar[str] = ""
    score_note: ClassVar[str] = ""

    def build(self, split: Split, context: "Context") -> "Source":
        """The images of a split: ``pretrain`` (with unlabeled ones where there are any), ``train`` or ``test``.

        Raises MissingInput, DataError or ConfigError, each in one line that names the place and the flag.
        """
        raise NotImplementedError(f"the source {self.name} does not say how its images are found")

    @property
    def place(self) -> tuple[str, ...]:
        """Where the training images are: two configs of the same place name the same ones."""
        paths = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "test_root"}
        return self.name, *(os.path.realpath(expanded(path)) for path in paths.values() if isinstance(path, Path))
