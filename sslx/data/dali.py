"""ViewSpec -> NVIDIA DALI pipeline, on the CPU or the GPU.  The only importer of nvidia.dali.

The pipeline is stateless: an external source feeds it paths (or pixels) and every sample's parameters, drawn
by ``views.draw``; DALI reads, decodes once, crops and flips each view, and sets brightness and contrast.  Nothing
of it needs to be checkpointed.  The other operations are matrix products, which torch makes on the same device
(``finish``): on a CPU in a third of DALI's time.

Traps (DALI 2.4), each held by a parity test against torchvision:
- contrast pivots at 128 unless given the image's mean gray;
- hue, a shift in HSV in torchvision, is the one operation that cannot agree (``finish``);
- GPU decoding needs ``jpeg_fancy_upsampling`` to interpolate chroma as libjpeg-turbo does;
- argument inputs must be CPU nodes, also for GPU operators;
- each operator costs a CPU a microsecond a sample, also the arithmetic ones, and a 32 px crop costs 20: the boxes are
  worked out for the batch in one Python operator.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from sslx.data import views
from sslx.data.finish import finish
from sslx.data.order import Order, Sequential
from sslx.data.sources import Source
from sslx.data.views import Draw, ViewSpec

Node = Any  # a DALI DataNode
fn: Any = _fn  # DALI's stubs know neither its generated constants nor that an operator has one output
types: Any = _types


def _fed(spec: ViewSpec) -> list[str]:
    """The drawn parameters that the graph takes from outside for one view, in the order in which they are fed."""
    augment = spec.augment
    if augment is None or augment.jitter == 0:
        return []
    return [name for name in ("brightness", "contrast") if getattr(augment, name) > 0]


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
        uncropped: deque[list[Draw | None]] = deque()  # and for those whose images it has yet to look at
        pipeline = self._pipeline(
            self._feed(order, start, substitute, ahead, uncropped), partial(_boxes, self.specs, uncropped)
        )
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
                made.append(finish(spec, drawn, torch.from_dlpack(output.as_tensor())))
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
        *queues: deque[list[Draw | None]],
    ) -> Iterator[tuple[Any, ...]]:
        """The inputs of each batch: the images, then every view's parameters; what was drawn goes to the queues."""
        t = start
        while not order.finished(t):
            index = order.batch(t)
            inputs: list[Any] = [self._images(substitute(index))]
            drawn: list[Draw | None] = []
            for number, spec in enumerate(self.specs):
                one = None if spec.augment is None else views.draw(spec, self.seed, order.epoch(t), index, number)
                drawn.append(one)
                inputs += [getattr(one, name) for name in _fed(spec)]
            for queue in queues:
                queue.append(drawn)
            yield tuple(inputs)
            t += 1

    def _images(self, index: npt.NDArray[np.int64]) -> Any:
        if self.source.pixels is not None:
            images = self.source.pixels[index]
            return list(images) if images.dtype == object else images
        assert self.source.paths is not None
        return [np.frombuffer(self.source.paths[int(i)].encode(), dtype=np.uint8) for i in index]

    def _pipeline(self, feed: Iterator[tuple[Any, ...]], boxes: Callable[[list[Any]], tuple[Any, ...]]) -> Pipeline:
        gpu = self.device.type == "cuda"
        return _graph(  # pyright: ignore[reportCallIssue] (the decorator adds these arguments)
            self.specs,
            self.source.pixels is None,
            gpu,
            feed,
            boxes,
            batch_size=self.max_per_rank,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=3 if gpu else 2,
            seed=0,  # nothing in the graph draws
        )


@pipeline_def
def _graph(
    specs: Sequence[ViewSpec],
    from_files: bool,
    gpu: bool,
    feed: Iterator[tuple[Any, ...]],
    boxes: Callable[[list[Any]], tuple[Any, ...]],
) -> tuple[Node, ...]:
    """The pipeline, the same for both devices: images and parameters in, one uint8 HWC batch a view out."""
    numbers = sum(len(_fed(spec)) for spec in specs)
    image, *fed = fn.external_source(
        source=feed,
        num_outputs=1 + numbers,
        batch=True,
        dtype=[types.UINT8] + [types.FLOAT] * numbers,
        ndim=[1 if from_files else 3] + [0] * numbers,
        layout=["" if from_files else "HWC"] + [""] * numbers,
    )
    if from_files:
        encoded = fn.io.file.read(image)
        shape = fn.peek_image_shape(encoded)
        image = _decode(encoded, gpu)
    else:
        shape = image.shape()
        image = image.gpu() if gpu else image
    corners = fn.python_function(shape, function=boxes, batch_processing=True, num_outputs=2 * len(specs))
    outputs: list[Node] = []
    for spec, start, end in zip(specs, corners[::2], corners[1::2], strict=True):
        names = _fed(spec)
        view = _jitter(_resize(spec, image, start, end), dict(zip(names, fed, strict=False)))
        fed = fed[len(names) :]
        outputs.append(view)
    return tuple(outputs)


def _boxes(
    specs: Sequence[ViewSpec], uncropped: deque[list[Draw | None]], shapes: list[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.float32]], ...]:
    """Where each view's crop starts and ends, (y, x) a sample, from the (H, W, C) of a batch's images."""
    height, width = np.array(shapes)[:, :2].T
    corners: list[list[npt.NDArray[np.float32]]] = []
    for spec, drawn in zip(specs, uncropped.popleft(), strict=True):
        box = views.boxes(spec, drawn, height, width).astype(np.float32)
        if drawn is not None:
            flipped = drawn.flip > 0
            box[flipped] = box[flipped][:, [0, 3, 2, 1]]
        corners += [list(box[:, :2]), list(box[:, 2:])]
    return tuple(corners)


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
        roi_start=start,
        roi_end=end,
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=True,
    )


def _jitter(image: Node, fed: dict[str, Node]) -> Node:
    """Brightness, then contrast; what the recipe never does is left out of the graph."""
    if "brightness" in fed:
        image = fn.brightness_contrast(image, brightness=fed["brightness"])
    if "contrast" in fed:
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        center = fn.reductions.mean(gray, axes=[0, 1, 2])
        center = center.cpu() if gray.device == "gpu" else center
        image = fn.brightness_contrast(image, contrast=fed["contrast"], contrast_center=center)
    return image
