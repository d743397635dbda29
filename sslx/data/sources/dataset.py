"""A Dataset of your own: ``sslx.pretrain(dataset=...)`` in Python.

Its items are pictures, tuples that start with a picture, such as (picture, label), or dicts with an "image" and perhaps
a "label".  A picture is a path, a PIL image, an (H, W, 3) array of uint8, or a (3, H, W) tensor.  Arrays (H, W, C) and
tensors (C, H, W) of any number of channels, of uint8, uint16 or float32, are read with all their bits.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from sslx.console.words import one_line, shown
from sslx.data.facts import Channels, Facts
from sslx.data.sources import sides
from sslx.data.sources.base import Context, Encoded
from sslx.data.sources.config import SourceConfig, Split
from sslx.errors import ConfigError, DataError, MissingInput


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The Dataset that a program gives."""

    name: Literal["dataset"] = "dataset"

    has_unlabeled: ClassVar[bool] = False

    def build(self, split: Split, context: "Context") -> "Encoded":
        del context
        if split == "test":
            raise MissingInput("a Dataset that a program gives has no test split")
        if _given is None:
            raise MissingInput(
                "the images of this run came from a Python program: call sslx.pretrain(dataset=...) there, or name "
                "other images by --source.name or --source.root"
            )
        return _source(_given)


_given: Any = None
"""The Dataset of ``use``: an object cannot be a value of an option."""


def use(dataset: Any) -> None:
    """Let this process build its source from a Dataset with ``__len__`` and ``__getitem__``; None: from none.

    Raises ConfigError for another kind of object.
    """
    global _given
    if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"expected a Dataset with __len__ and __getitem__, got {shown(type(dataset).__name__)}: training needs any "
            "image at any time, which an iterable cannot give"
        )
    _given = dataset


@dataclass(frozen=True, eq=False)
class _Items:
    """Reads the pictures of a Dataset as image files: those that it names by path, NPY of bands, BMP of all others."""

    dataset: Any

    def read(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        return [_bytes(self.dataset[row]) for row in rows.tolist()]

    def where(self, row: int) -> str:
        return f"item {row} of the {type(self.dataset).__name__}"


def _source(dataset: Any) -> Encoded:
    num, kind = len(dataset), type(dataset).__name__
    if not num:
        raise DataError(f"the {shown(kind)} is empty: expected a Dataset with images")
    items = _Items(dataset)
    try:
        _bytes(first := dataset[0])
        bands = _bands(_picture(first))
    except Exception as error:  # of the Dataset's own code, too
        raise DataError(f"{items.where(0)} is no picture: {one_line(error)}") from error
    labels = _labels(dataset)
    classes: Any = None
    if labels is not None:
        classes = getattr(dataset, "classes", ())
        if len(classes) <= labels.max():
            classes = range(int(labels.max()) + 1)
    facts = Facts(
        num_samples=num,
        size=sides.LARGEST if bands is None else sides.nearest(min(bands.shape[:2])),
        channels=Channels() if bands is None else _channels(bands),
        labels=labels,
        classes=None if classes is None else tuple(map(str, classes)),
    )
    unlabeled = "" if labels is not None else 'it has no "targets", a list with the number of each item\'s class'
    source = Encoded(name=f"a {shown(kind)}", facts=facts, reader=items, unlabeled=unlabeled)
    return sides.sized(source) if bands is None else source


def _channels(bands: npt.NDArray[Any]) -> Channels:
    """Return the channels of pictures like this one: gray ones become three equal channels, as those of files do."""
    num = 3 if bands.shape[2] == 1 else bands.shape[2]
    dtype: Any = bands.dtype.name
    return Channels(num=num, is_rgb=num == 3, dtype=dtype)


def _labels(dataset: Any) -> npt.NDArray[np.int64] | None:
    """Return the classes that a Dataset lists, as torchvision's do: to ask its items would read all images."""
    for name in ("targets", "labels", "_labels"):
        try:
            labels = np.asarray(getattr(dataset, name, None))
        except Exception:  # a list of lists of different lengths, or a tensor of another device
            continue
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu" and labels.min() >= 0:
            return labels.astype(np.int64)
    return None


def _picture(item: Any) -> Any:
    if isinstance(item, Mapping):
        return cast("Mapping[str, Any]", item).get("image")
    return cast("Any", item)[0] if isinstance(item, tuple | list) and item else item


def _bands(picture: Any) -> npt.NDArray[Any] | None:
    """Return an array or a tensor as (H, W, C) if it is other than RGB of 8 bits, or floats that stand for such."""
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
        if tensor.ndim == 3 and len(tensor) == 3 and tensor.is_floating_point():
            return None
        picture = (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()
    if not isinstance(picture, np.ndarray) or picture.ndim not in (2, 3):
        return None
    array = cast("npt.NDArray[Any]", picture)
    array = array if array.ndim == 3 else array[..., None]
    if array.dtype.name not in ("uint8", "uint16", "float32") or (array.dtype == np.uint8 and array.shape[2] == 3):
        return None
    return array


def _bytes(item: Any) -> bytes:
    picture, file = _picture(item), io.BytesIO()
    if (bands := _bands(picture)) is not None:
        np.save(file, bands, allow_pickle=False)
        return file.getvalue()
    if isinstance(picture, str | PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, Image.Image) and picture.mode.startswith(("I", "F")):
        picture.save(file, "TIFF")  # more than 8 bits, whose range is measured as that of files
        return file.getvalue()
    from sslx.data import pictures

    Image.fromarray(pictures.pixels(picture)).save(file, "BMP")
    return file.getvalue()
