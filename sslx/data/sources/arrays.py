"""Arrays of images: NPY, NPZ and HDF5 files with any number of channels, mapped into memory where possible."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sslx.console import activity
from sslx.console.words import shown
from sslx.data.facts import Channels, Facts
from sslx.data.sources import labels, located, sides
from sslx.data.sources.base import Context, Pixels, gray_as_rgb
from sslx.data.sources.config import SourceConfig, Split
from sslx.errors import ConfigError, DataError, MissingInput, UserError
from sslx.machine import files

_IMAGES = ("images", "image", "x", "data", "pixels", "imgs", "arr_0")
_LABELS = ("labels", "label", "y", "targets", "target", "arr_1")
_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
_PARTS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
_TYPES = ("uint8", "uint16", "float32")
_MAX_CHANNELS = 16  # of a layout that is found by itself


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """The location of your arrays and their keys."""

    name: Literal["arrays"] = "arrays"
    root: Path | None = None
    """File with an array of images: .npy, .npz, .h5 or .hdf5."""
    test_root: Path | None = None
    """File with the test images.  Default: the root, if it has keys such as x_test or test_images."""
    image: str = ""
    """Key of the images.  Default: images, x, data or similar, or such as x_train and train_images."""
    label: str = ""
    """Key of the labels, or an .npy file of labels for images in an .npy file.  Default: labels, y or similar."""
    layout: Literal["auto", "nhw", "nhwc", "nchw"] = "auto"
    """Order of the dimensions: images, height, width, channels.  auto: the channels are the smaller of two sides."""

    def build(self, split: Split, context: "Context") -> "Pixels":
        with activity.doing("reading the arrays of images"):
            return context.call(
                f"the arrays of images {shown(self.root or '')}", lambda _: _read(self, split, context.classes)
            )


Array = npt.NDArray[Any]
Arrays = Mapping[str, Callable[[], Array]]
"""Functions that read the arrays of a file, by their keys."""


def _read(config: Config, split: Split, known: Sequence[str] | None) -> Pixels:
    what = "a file of arrays"
    path, is_other = located.one_file("arrays", config.root, config.test_root, split, what, _SUFFIXES)
    try:
        arrays = _arrays(path)
        image = _key(config.image, "--source.image", _IMAGES, arrays, path, split, is_other)
        pixels = _pixels(arrays[image](), config.layout, f"{image} of {shown(path)}")
        values = _labels(config, arrays, path, split, is_other)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and h5py raise several kinds at damaged files
        raise DataError(f"the arrays of {shown(path)} cannot be read: {files.reason(error)}") from error
    num, height, width, num_channels = pixels.shape
    if not num:
        raise MissingInput(f"the array {image} of {shown(path)} is empty: it holds no images")
    side = sides.nearest(min(height, width))
    dtype: Any = str(pixels.dtype)
    channels = Channels(num=num_channels, is_rgb=num_channels == 3, dtype=dtype)
    facts = Facts(num_samples=num, size=side, channels=channels)
    source = Pixels(name=shown(config.root), facts=facts, pixels=pixels, unlabeled="no labels")
    if values is None:
        return source
    if len(values) != num:
        raise DataError(f"{shown(path)} has {num:,} images and {len(values):,} labels: expected one label for each")
    return labels.labeled(source, values.tolist(), known)


def _arrays(path: Path) -> Arrays:
    """Return functions that read the arrays of a file, by their keys."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return {"arr_0": lambda: np.load(path, mmap_mode="c", allow_pickle=False)}
    if suffix == ".npz":
        archive: Any = np.load(path, allow_pickle=False)
        return {key: lambda key=key: archive[key] for key in archive.files}
    if suffix in (".h5", ".hdf5"):
        return _of_hdf5(path)
    raise DataError(f"{shown(path)} has the suffix '{suffix}': expected {', '.join(_SUFFIXES)}")


def _of_hdf5(path: Path) -> Arrays:
    if find_spec("h5py") is None:
        raise ConfigError(f"{shown(path)} needs h5py: pip install h5py, or save the arrays as .npy")
    h5py: Any = import_module("h5py")
    file = h5py.File(path, "r")
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return {name: lambda name=name: _of_dataset(path, file[name]) for name in names}


def _of_dataset(path: Path, dataset: Any) -> Array:
    """Return an array of an HDF5 file, mapped into memory if it lies there in one piece as it is."""
    offset = dataset.id.get_offset() if dataset.chunks is None and str(dataset.dtype) in _TYPES else None
    if offset is None:
        return dataset.asstr()[()] if dataset.dtype.kind == "O" else dataset[()]
    return np.memmap(path, dataset.dtype, "c", offset, dataset.shape)


def _key(chosen: str, flag: str, usual: Sequence[str], arrays: Arrays, path: Path, split: Split, is_other: bool) -> str:
    """Return the key of a split's array.  is_other: whether the file holds only this split."""
    if chosen and (split != "test" or is_other):
        return labels.column([*arrays], usual, chosen, flag, shown(path))
    parts = _PARTS["test" if split == "test" else "train"]
    of_split = [name for part in parts for one in usual for name in (f"{one}_{part}", f"{part}_{one}", f"{part}/{one}")]
    found = labels.column([*arrays], of_split, "", flag, shown(path))
    if not found and (split != "test" or is_other):
        found = labels.column([*arrays], usual, "", flag, shown(path))
    if found or flag == "--source.label":
        return found
    keys = labels.listed([*arrays])
    if split == "test" and not is_other:
        raise MissingInput(f"no test images: {shown(path)} has only the keys {keys}: give them with --source.test-root")
    raise DataError(
        f"{shown(path)} has no array of images, such as images or x: its keys are {keys}; name it with {flag}"
    )


def _pixels(array: Array, layout: str, name: str) -> Array:
    """Return the images as (N, H, W, C), without copying what is mapped into memory."""
    if array.dtype.name not in _TYPES:
        raise DataError(
            f"the array {name} is of type {array.dtype}: expected uint8 pixels from 0 to 255, uint16 or float32"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if layout == "auto":
        layout = _layout(array, name)
    if array.ndim != len(layout):
        raise DataError(f"the array {name} has the shape {array.shape}: expected {len(layout)} dimensions, {layout}")
    if layout == "nchw":
        array = np.moveaxis(array, 1, 3)
    if layout == "nhw":
        array = array[..., None]
    return gray_as_rgb(array[..., 0]) if array.shape[-1] == 1 else array


def _layout(array: Array, name: str) -> str:
    if array.ndim == 3:
        return "nhw"
    if array.ndim == 4 and array.shape[1] != array.shape[3] and min(array.shape[1], array.shape[3]) <= _MAX_CHANNELS:
        return "nhwc" if array.shape[3] < array.shape[1] else "nchw"
    raise DataError(
        f"the array {name} has the shape {array.shape}: expected images, height and width, and channels before or "
        "behind these; name them with --source.layout nhwc or nchw"
    )


def _labels(config: Config, arrays: Arrays, path: Path, split: Split, is_other: bool) -> Array | None:
    """Return the labels, one-dimensional, or None if there are none."""
    if path.suffix.lower() == ".npy":
        if not config.label or is_other:
            return None
        values = np.load(files.expanded(config.label), allow_pickle=False)
        key = shown(config.label)
    else:
        key = _key(config.label, "--source.label", _LABELS, arrays, path, split, is_other)
        if not key:
            return None
        values = arrays[key]()
    if math.prod(values.shape[1:]) != 1:
        raise DataError(f"the labels {key} of {shown(path)} have the shape {values.shape}: expected one for each image")
    return values.reshape(-1)
