"""Images as a program has them (paths, PIL images, arrays, tensors, Datasets, sources), made into views by threads.

Threads rather than processes, so that this works in a notebook, in a thread and in a program without a main module:
reading, decoding and resizing an image all release Python's lock.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sslx.console.words import shown
from sslx.data import sources
from sslx.data.backends import depth
from sslx.data.codecs import bands, formats, headers
from sslx.data.config import Config as Reading
from sslx.data.facts import RGB, Channels
from sslx.data.sources import Source, folder
from sslx.data.sources.listing import EXTENSIONS, Listing
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError, DataError, MissingInput

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    Picture = str | PathLike[str] | Image.Image | npt.NDArray[Any] | Tensor
    """A path, a PIL image, (H, W, 3) uint8, or a tensor (3, H, W): uint8, or floats from 0 to 1.

    For images of other channels: an array (H, W, C) of their type or uint8, or a tensor (C, H, W) likewise.
    """
    Images = Picture | Iterable[Any] | Dataset[Any] | Source
    """One picture, a folder, or many: ``pictures_of`` has the details."""

_AHEAD = 3
"""Number of batches that are read and decoded ahead of the one that is used."""
_MAX_CHUNK, _MAX_STACKED_BYTES = 32, 1 << 20
"""The most images that a thread takes at a time, and the most bytes of equally large ones that are resized at once."""


def image_paths(root: str | PathLike[str]) -> list[str]:
    """Return the paths of the image files below a folder, sorted: the order in which ``embed`` takes them.

    Hidden files and other kinds of files are left out.  Raises MissingInput if there are none.
    """
    if not os.path.isdir(root):
        raise MissingInput(f"{shown(root)} is not a folder: give the folder of your images")
    if paths := sorted(Listing(Path(root))):
        return paths
    raise MissingInput(f"no images below {shown(root)}: expected files with the endings {', '.join(EXTENSIONS)}")


@dataclass(frozen=True)
class Pictures:
    """Images in an order.

    num: their number; None if it is not known.  items: what stands for each image.  decode: turns some of these into
    (3, H, W) uint8 each or, for other channels than RGB of 8 bits, into (C, H, W) float32 from 0 (black) to 1 (white).
    """

    num: int | None
    items: Iterator[Any]
    decode: Callable[[Sequence[Any]], Iterator[Tensor]]


def reading(channels: Channels) -> Reading:
    """Return the settings by which files are read as images with these channels."""
    if channels.is_plain:
        return Reading()
    if channels.dtype == "uint8":
        return Reading(channels=channels.num)
    return Reading(channels=channels.num, range=(channels.black, channels.full_scale))


def pictures_of(images: "Images", channels: Channels = RGB) -> Pictures:
    """Return the pictures in whatever form they come.

    images: a folder, of which every image file below it is taken; a source of sslx; a picture; or an iterable or a
    torch Dataset of pictures, of tuples that start with a picture, or of dicts with a picture as their "image".
    channels: those of the images that an encoder takes.
    """
    if isinstance(images, str | PathLike) and os.path.isdir(images):
        images = sources.build(folder.Config(root=Path(images), splits="none"), "train", reading(channels))
    if isinstance(images, Source):
        if (num := images.facts.channels.num) != channels.num:
            raise ConfigError(f"expected images with {channels.in_words}, {images.name} has {num}")
        return Pictures(len(images), iter(range(len(images))), partial(_read, images))
    if _is_picture(images):
        images = [images]
    many = cast("Any", images)
    num = len(many) if hasattr(many, "__len__") else None
    if num is not None and hasattr(many, "__getitem__"):  # a Dataset need not end by an IndexError
        return Pictures(num, map(many.__getitem__, range(num)), partial(_decode, channels))
    return Pictures(num, iter(many), partial(_decode, channels))


def _is_picture(images: object) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim in (2, 3)
    return isinstance(images, str | PathLike | Image.Image)


def batches(pictures: Pictures, view: ViewSpec, batch_size: int, num_threads: int) -> Generator[Tensor]:
    """Yield the pictures' views in batches (B, S, S, C), not normalized; the last one may be smaller.

    They are uint8, or float32 from 0 to 1 (``Pictures.decode``).
    view: an evaluation view.  num_threads: the threads that read, decode and resize.  One more thread takes the items,
    one after the other, because a Dataset or a generator need not bear several.
    """
    from sslx.data.backends import torchvision  # here: it imports torchvision, which takes a second

    make = partial(_views, view, pictures.decode, torchvision.apply)
    taking = ThreadPoolExecutor(1, "pictures")
    decoding = ThreadPoolExecutor(num_threads, "decoding")

    def take() -> list[Future[Tensor]]:
        items = list(islice(pictures.items, batch_size))
        chunk = min(_MAX_CHUNK, -(-len(items) // num_threads) or 1)
        return [decoding.submit(make, items[start : start + chunk]) for start in range(0, len(items), chunk)]

    try:
        taken = deque(taking.submit(take) for _ in range(_AHEAD))
        while parts := taken.popleft().result():
            batch = torch.cat([part.result() for part in parts])
            taken.append(taking.submit(take))
            yield batch
    finally:
        taking.shutdown(cancel_futures=True)
        decoding.shutdown(cancel_futures=True)


def _views(
    view: ViewSpec,
    decode: Callable[[Sequence[Any]], Iterator[Tensor]],
    apply: Callable[[ViewSpec, Tensor, None, int], Tensor],
    items: Sequence[Any],
) -> Tensor:
    """Return the views of some items.  Images of the same size are resized together, which changes none of them."""
    views, alike = list[Tensor](), list[Tensor]()

    def finish() -> None:
        if alike:
            views.append(apply(view, torch.stack(alike), None, 0).permute(0, 2, 3, 1))
            alike.clear()

    for image in decode(items):
        if alike and (image.shape != alike[0].shape or len(alike) * image.nbytes >= _MAX_STACKED_BYTES):
            finish()
        alike.append(image)
    finish()
    return torch.cat(views)


def normalized(views: Tensor, view: ViewSpec, device: torch.device) -> Tensor:
    """Return views (B, S, S, C) as an encoder takes them: (B, C, S, S) float32, normalized, channels_last.

    views: uint8, or float32 from 0 to 1.
    """
    white = 255 if views.dtype == torch.uint8 else 1
    if device.type == "cuda":
        views = views.pin_memory()
    shift, scale = (torch.tensor([white * x for x in values], device=device) for values in (view.mean, view.std))
    return views.to(device, non_blocking=True).to(torch.float32, copy=True).sub_(shift).div_(scale).permute(0, 3, 1, 2)


def _read(source: Source, indices: Sequence[int]) -> Iterator[Tensor]:
    from sslx.data.backends import torchvision

    begun, channels = list(indices[:1]), source.facts.channels
    try:
        for image in torchvision.images(source, np.array(indices), begun.append):
            yield image if channels.is_plain else depth.scaled(image, channels, 1)
    except headers.Unreadable as error:
        raise DataError(f"{source.where(begun[-1])} cannot be read: {error}") from error


def _decode(channels: Channels, items: Sequence[Any]) -> Iterator[Tensor]:
    for item in items:
        picture: Any = item
        if isinstance(item, Mapping):
            picture = cast("Mapping[str, Any]", item).get("image")
        elif isinstance(item, tuple | list) and item:
            picture = cast("Sequence[Any]", item)[0]
        yield _image(picture, channels)


def _image(picture: "Picture", channels: Channels) -> Tensor:
    """Return a picture as ``Pictures.decode`` does."""
    image = torch.from_numpy(pixels(picture, channels)).permute(2, 0, 1)
    return image if channels.is_plain else depth.scaled(image, channels, 1)


def pixels(picture: "Picture", channels: Channels = RGB) -> npt.NDArray[Any]:
    """Return a picture as (H, W, C), by default RGB of 8 bits, else of the number, type and range of ``channels``.

    Raises DataError for a file that cannot be read, and ValueError for what is no picture.
    """
    if isinstance(picture, str | PathLike):
        levels = None if channels.is_plain else formats.Levels(chosen=(channels.black, channels.full_scale))
        try:
            return formats.read(os.fspath(picture), levels, channels)
        except headers.Unreadable as error:
            raise DataError(f"{shown(picture)} cannot be read: {error}") from error
    if not channels.is_plain:
        return _with_channels(picture, channels)
    if isinstance(picture, Tensor):
        return _of_tensor(picture)
    if isinstance(picture, np.ndarray):
        array = picture
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"expected an (H, W, 3) array of uint8, got {array.shape} of {array.dtype}")
        return np.array(array) if any(stride < 0 for stride in array.strides) or not array.flags.writeable else array
    if not isinstance(picture, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            "expected images as paths, PIL images, (H, W, 3) arrays of uint8 or (3, H, W) tensors, got an object of "
            f"type {shown(type(picture).__name__)}"
        )
    try:
        return formats.of_pil(picture)
    except headers.Unreadable as error:
        raise ValueError(f"expected a PIL image of RGB or gray pixels of 8 bits, got {error}") from error


def _with_channels(picture: object, channels: Channels) -> npt.NDArray[Any]:
    """Return an array (H, W) or (H, W, C), a tensor (C, H, W) or a PIL image as pixels of these channels.

    Values of another type than the channels' are taken from black to white: uint8 from 0 to 255, and floats from 0 to 1
    where the channels have whole numbers.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture if picture.mode[0] in "LIFR" else formats.of_pil(picture))
    if isinstance(picture, Tensor):
        tensor = picture.detach().cpu()
        picture = (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()
    words = f"an array (H, W, {channels.num}) of {channels.dtype} or uint8, a tensor ({channels.num}, H, W) or a path"
    if not isinstance(picture, np.ndarray) or picture.ndim not in (2, 3):
        raise ValueError(f"expected {words}, got an object of type {shown(type(picture).__name__)}")
    array = cast("npt.NDArray[Any]", picture)
    if np.can_cast(array.dtype, channels.dtype) and array.dtype != np.uint8:
        black, white = channels.black, channels.full_scale
    elif array.dtype == np.uint8 or array.dtype.kind == "f":
        black, white = 0.0, 255.0 if array.dtype == np.uint8 else 1.0
    else:
        raise ValueError(f"expected {words}, got an array of {array.dtype}")
    try:
        return bands.fitted(array, black, white, is_white_first=False, channels=channels)
    except headers.Unreadable as error:
        raise ValueError(f"expected {words}, got {error}") from error


def _of_tensor(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor (3, H, W) of uint8, or of floats from 0 to 1 as torchvision makes them, as (H, W, 3) uint8."""
    if tensor.ndim != 3 or len(tensor) != 3 or not (tensor.dtype == torch.uint8 or tensor.is_floating_point()):
        raise ValueError(f"expected a (3, H, W) tensor of uint8 or floats, got {tuple(tensor.shape)} of {tensor.dtype}")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        low, high = tensor.min().item(), tensor.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"expected a tensor of floats from 0 to 1, got {low:g} to {high:g}: images that are normalized already "
                "go into .encoder"
            )
        tensor = (tensor.float() * 255).round().to(torch.uint8)
    return tensor.permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Transform:
    """The evaluation transform of an image for probes: the central square, resized and normalized."""

    view: ViewSpec

    def __call__(self, image: "Picture") -> Tensor:
        """Return (C, S, S) float32 of a picture; raise DataError for an unreadable file."""
        from sslx.data.backends import torchvision  # here: it imports torchvision, which takes a second

        return torchvision.prepared(self.view, _image(image, self.view.channels))
