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
from sslx.data.sources import Source, folder
from sslx.data.sources.listing import EXTENSIONS, Listing
from sslx.data.views import ViewSpec
from sslx.errors import DataError, MissingInput

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    Picture = str | PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor
    """A path, a PIL image, (H, W, 3) uint8, or a tensor (3, H, W): uint8, or floats from 0 to 1."""
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
    (3, H, W) uint8 each.
    """

    num: int | None
    items: Iterator[Any]
    decode: Callable[[Sequence[Any]], Iterator[Tensor]]


def pictures_of(images: "Images") -> Pictures:
    """Return the pictures in whatever form they come.

    images: a folder, of which every image file below it is taken; a source of sslx; a picture; or an iterable or a
    torch Dataset of pictures, of tuples that start with a picture, or of dicts with a picture as their "image".
    """
    if isinstance(images, str | PathLike) and os.path.isdir(images):
        images = sources.build(folder.Config(root=Path(images), splits="none"), "train")
    if isinstance(images, Source):
        return Pictures(len(images), iter(range(len(images))), partial(_read, images))
    if _is_picture(images):
        images = [images]
    many = cast("Any", images)
    num = len(many) if hasattr(many, "__len__") else None
    if num is not None and hasattr(many, "__getitem__"):  # a Dataset need not end by an IndexError
        return Pictures(num, map(many.__getitem__, range(num)), _decode)
    return Pictures(num, iter(many), _decode)


def _is_picture(images: object) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim in (2, 3)
    return isinstance(images, str | PathLike | Image.Image)


def batches(pictures: Pictures, view: ViewSpec, batch_size: int, num_threads: int) -> Generator[Tensor]:
    """Yield the pictures' views in batches (B, S, S, 3) uint8, not normalized; the last one may be smaller.

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
    """Return views (B, S, S, 3) uint8 as an encoder takes them: (B, 3, S, S) float32, normalized, channels_last."""
    if device.type == "cuda":
        views = views.pin_memory()
    shift, scale = (torch.tensor([255 * value for value in values], device=device) for values in (view.mean, view.std))
    return views.to(device, non_blocking=True).float().sub_(shift).div_(scale).permute(0, 3, 1, 2)


def _read(source: Source, indices: Sequence[int]) -> Iterator[Tensor]:
    from sslx.data.backends import torchvision
    from sslx.data.codecs.headers import Unreadable

    begun = list(indices[:1])
    try:
        yield from torchvision.images(source, np.array(indices), begun.append)
    except Unreadable as error:
        raise DataError(f"{source.where(begun[-1])} cannot be read: {error}") from error


def _decode(items: Sequence[Any]) -> Iterator[Tensor]:
    for item in items:
        picture: Any = item
        if isinstance(item, Mapping):
            picture = cast("Mapping[str, Any]", item).get("image")
        elif isinstance(item, tuple | list) and item:
            picture = cast("Sequence[Any]", item)[0]
        yield torch.from_numpy(pixels(picture)).permute(2, 0, 1)


def pixels(picture: "Picture") -> npt.NDArray[np.uint8]:
    """Return a picture as (H, W, 3) uint8 RGB.

    Raises DataError for a file that cannot be read, and ValueError for what is no picture.
    """
    from sslx.data.codecs import formats, headers

    if isinstance(picture, str | PathLike):
        try:
            return formats.read(os.fspath(picture))
        except headers.Unreadable as error:
            raise DataError(f"{shown(picture)} cannot be read: {error}") from error
    if isinstance(picture, Tensor):
        return _of_tensor(picture)
    if isinstance(picture, np.ndarray):
        array = cast("npt.NDArray[Any]", picture)
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
        """Return (3, S, S) float32 of a picture; raise DataError for an unreadable file."""
        from sslx.data.backends import torchvision  # here: it imports torchvision, which takes a second

        return torchvision.prepared(self.view, torch.from_numpy(pixels(image)).permute(2, 0, 1))
