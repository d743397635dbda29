"""ViewSpec -> NVIDIA DALI pipeline, on the CPU or the GPU.  The only importer of nvidia.dali.

The pipeline is stateless: an external source feeds it paths (or pixels) and every sample's parameters, drawn
by ``views.draw``; DALI reads, decodes once, and crops, flips, blurs and jitters all views.  Nothing of it needs
to be checkpointed.  What is linear in the colours (saturation, hue, grayscale, normalisation) is one 3x3 matrix
a sample, and left to torch on the same device: on a CPU DALI needs 2.1 ms for it at 224 px, torch 0.6 ms.

Traps (DALI 2.4), each held by a parity test against torchvision:
- contrast pivots at 128 unless given the image's mean gray;
- hue, a shift in HSV in torchvision, is the one operation that cannot agree (``color``);
- GPU decoding needs ``jpeg_fancy_upsampling`` to interpolate chroma as libjpeg-turbo does;
- argument inputs and conditions must be CPU nodes, also for GPU operators.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import math
from nvidia.dali import types as _types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from sslx.data import color, views
from sslx.data.order import Order, Sequential
from sslx.data.sources import Source
from sslx.data.views import Draw, ViewSpec

Node = Any  # a DALI DataNode
fn: Any = _fn  # DALI's stubs know neither its generated constants nor that an operator has one output
types: Any = _types


def _fed(spec: ViewSpec) -> dict[str, int]:
    """What the graph needs from outside for one view, in the order in which it is fed: dimensions a sample."""
    augment = spec.augment
    if augment is None:
        return {}
    fed = {"sides": 2, "place": 2, "mirror": 2}
    fed |= {"brightness": 0} if augment.jitter > 0 and augment.brightness > 0 else {}
    fed |= {"contrast": 0} if augment.jitter > 0 and augment.contrast > 0 else {}
    return fed | ({"blur": 0, "sigma": 0, "window": 0} if augment.blur > 0 else {})


def _value(drawn: Draw, name: str) -> npt.NDArray[np.float32]:
    """What is fed under a name; boxes as columns of (y, x), see ``views.crop_box``."""
    if name == "sides":
        return views.sides(drawn)
    if name == "place":
        return drawn.place[:, :, None]
    if name == "mirror":
        return np.stack([np.zeros_like(drawn.flip), drawn.flip], axis=1)[:, :, None]
    return getattr(drawn, name)


class Dali:
    """Batches of views, made by DALI.

    specs: one per view.  device: the views' device.  num_threads: of DALI's own pool, on this rank.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        seed: int,
        max_per_rank: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self.source, self.specs, self.seed = source, tuple(specs), seed
        self.max_per_rank, self.device, self.num_threads = max_per_rank, device, num_threads

    def stream(
        self, order: Order, start: int, substitute: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batch start, start + 1, ... of the order: one (B, 3, H, W) float32 channels_last tensor a view.

        substitute: maps sample indices to those to read in their place (bad files).  Raises RuntimeError where
        a file of the batch cannot be decoded; the stream is then at its end.
        """
        ahead: deque[list[Draw | None]] = deque()  # drawn for batches that DALI is still making
        pipeline = self._pipeline(self._feed(order, start, substitute, ahead))
        pipeline.build()
        # On a GPU torch reads DALI's buffers after this function has gone on; let go, DALI would fill them again.
        held: deque[tuple[torch.cuda.Event, Any]] = deque()
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            made: list[Tensor] = []
            for spec, drawn, output in zip(self.specs, ahead.popleft(), outputs, strict=True):
                made.append(color.finish(spec, drawn, torch.from_dlpack(output.as_tensor())))
            if self.device.type == "cuda":
                read = torch.cuda.Event()
                read.record()
                held.append((read, outputs))
                while held and held[0][0].query():
                    held.popleft()
            yield tuple(made)

    def readable(self, index: npt.NDArray[np.int64]) -> bool:
        """Whether DALI can decode all these files."""
        number = len(index)
        small = Dali(
            self.source,
            [ViewSpec(size=8)],
            seed=0,
            max_per_rank=number,
            device=self.device,
            num_threads=self.num_threads,
        )
        try:
            next(small.stream(Sequential(num_samples=number, per_rank=number), 0, index.take))
        except RuntimeError:
            return False
        return True

    def _feed(
        self,
        order: Order,
        start: int,
        substitute: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
        ahead: deque[list[Draw | None]],
    ) -> Iterator[tuple[Any, ...]]:
        """The inputs of each batch: the images, then every view's parameters."""
        t = start
        while not order.finished(t):
            index = order.batch(t)
            inputs: list[Any] = [self._images(substitute(index))]
            drawn: list[Draw | None] = []
            for number, spec in enumerate(self.specs):
                one = None if spec.augment is None else views.draw(spec, self.seed, order.epoch(t), index, number)
                drawn.append(one)
                inputs += [] if one is None else [_value(one, name) for name in _fed(spec)]
            ahead.append(drawn)
            yield tuple(inputs)
            t += 1

    def _images(self, index: npt.NDArray[np.int64]) -> Any:
        if self.source.pixels is not None:
            return self.source.pixels[index]
        assert self.source.paths is not None
        return [np.frombuffer(self.source.paths[int(i)].encode(), dtype=np.uint8) for i in index]

    def _pipeline(self, feed: Iterator[tuple[Any, ...]]) -> Pipeline:
        gpu = self.device.type == "cuda"
        return _graph(  # pyright: ignore[reportCallIssue] (the decorator adds these arguments)
            self.specs,
            self.source.pixels is None,
            gpu,
            feed,
            batch_size=self.max_per_rank,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=3 if gpu else 2,
            seed=0,  # nothing in the graph draws
        )


@pipeline_def(enable_conditionals=True)
def _graph(specs: Sequence[ViewSpec], from_files: bool, gpu: bool, feed: Iterator[tuple[Any, ...]]) -> tuple[Node, ...]:
    """The pipeline, the same for both devices: images and parameters in, one uint8 HWC batch a view out."""
    dimensions = [count for spec in specs for count in _fed(spec).values()]
    image, *fed = fn.external_source(
        source=feed,
        num_outputs=1 + len(dimensions),
        batch=True,
        dtype=[types.UINT8] + [types.FLOAT] * len(dimensions),
        ndim=[1 if from_files else 3, *dimensions],
        layout=["" if from_files else "HWC"] + [""] * len(dimensions),
    )
    if from_files:
        encoded = fn.io.file.read(image)
        shape = fn.peek_image_shape(encoded, dtype=types.FLOAT)
        image = _decode(encoded, gpu)
    else:
        shape = fn.cast(image.shape(), dtype=types.FLOAT)
        image = image.gpu() if gpu else image
    size = fn.reshape(shape[0:2], shape=[2, 1])
    root = math.sqrt(shape[0] * shape[1])
    outputs: list[Node] = []
    for spec in specs:
        if spec.augment is None:
            outputs.append(_evaluation_view(spec, image, size))
        else:
            names = list(_fed(spec))
            mine = {name: fed[i] for i, name in enumerate(names)}
            fed = fed[len(names) :]
            outputs.append(_training_view(spec, image, size, root, mine))
    return tuple(outputs)


def _decode(encoded: Node, gpu: bool) -> Node:
    """RGB uint8 HWC of a JPEG, PNG, WebP, BMP or TIFF: grayscale repeated, alpha dropped, EXIF turned upright.

    16 bits a channel become 8.  On the CPU the pixels are those of ``torchvision.read``, and so is what fails:
    files that are missing, empty, cut or no image.  Flipped bytes in a JPEG may pass in one and not in both.
    """
    if gpu:
        return fn.decoders.image(
            encoded, device="mixed", output_type=types.RGB, jpeg_fancy_upsampling=True, hw_decoder_load=0.75
        )
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


def _resize(spec: ViewSpec, image: Node, start: Node, end: Node) -> Node:
    """The box of the image as size x size pixels, uint8; mirrored where it starts right of its end."""
    cubic = spec.augment is not None and spec.augment.interpolation == "bicubic"
    return fn.resize(
        image,
        size=(spec.size, spec.size),
        roi_start=fn.reshape(start, shape=[2]),
        roi_end=fn.reshape(end, shape=[2]),
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=True,
    )


def _evaluation_view(spec: ViewSpec, image: Node, size: Node) -> Node:
    side = math.max(math.floor(fn.reductions.min(size, axes=[0, 1]) * spec.center + 0.5), 1.0)
    start = math.floor((size - side) * 0.5)
    return _resize(spec, image, start, start + side)


def _training_view(spec: ViewSpec, image: Node, size: Node, root: Node, fed: dict[str, Node]) -> Node:
    """Crop, flip, brightness, contrast, blur; what the recipe never does is left out of the graph."""
    start, end = views.crop_box(
        spec,
        fed["sides"] * root,
        fed["place"],
        size,
        fn.stack(size[1], size[0]),
        floor=math.floor,
        smaller=math.min,
        lowest=lambda x: fn.reductions.min(x, axes=[0], keep_dims=True),
        highest=lambda x: fn.reductions.max(x, axes=[1], keep_dims=True),
        total=lambda x: fn.reductions.sum(x, axes=[1], keep_dims=True),
    )
    mirrored = fed["mirror"] * (end - start)
    image = _resize(spec, image, start + mirrored, end - mirrored)
    if "brightness" in fed:
        image = fn.brightness_contrast(image, brightness=fed["brightness"])
    if "contrast" in fed:
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        center = fn.reductions.mean(gray, axes=[0, 1, 2])
        center = center.cpu() if gray.device == "gpu" else center
        image = fn.brightness_contrast(image, contrast=fed["contrast"], contrast_center=center)
    if "blur" in fed:
        if fed["blur"] > 0:  # DALI's conditional: runs on the chosen samples only
            window = fn.cast(fed["window"], dtype=types.INT32)
            image = fn.gaussian_blur(image, window_size=window, sigma=fed["sigma"])
    return image
