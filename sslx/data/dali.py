"""ViewSpec -> NVIDIA DALI pipeline, on the CPU or the GPU.  The only importer of nvidia.dali.

The pipeline is stateless: an external source feeds it paths (or pixels) and every sample's parameters, drawn
by ``views.draw``; DALI reads, decodes once, crops and flips each view, and sets brightness and contrast.  Nothing
of it needs to be checkpointed.  The other operations are matrix products, which torch makes on the same device
(``finish``): on a CPU in a third of DALI's time.

DALI reads the files that ``headers.is_plain`` knows it to read as all backends do.  The others are read by ``color``
and fed as pixels, in a graph with a branch, which costs 5 us a sample and so is built only once one of them is met.

Traps (DALI 2.4), each held by a parity test against torchvision:
- contrast pivots at 128 unless given the image's mean gray;
- hue, a shift in HSV in torchvision, is the one operation that cannot agree (``finish``);
- GPU decoding needs ``jpeg_fancy_upsampling`` to interpolate chroma as libjpeg-turbo does;
- argument inputs must be CPU nodes, also for GPU operators;
- ``decoders.image`` ends the process by SIGSEGV where a parser refuses one image of a batch of 25 or more, but
  ``peek_image_shape`` raises: so the decoder's input hangs on it (``_checked``);
- reading by mmap is SIGBUS where a file is cut meanwhile, and costs 6 us a file more than plain reading;
- a list of B paths costs 4 us a sample more than one array of them, padded with zeros;
- each operator costs a CPU a microsecond a sample, also the arithmetic ones, and a 32 px crop costs 20: the boxes are
  worked out for the batch in one Python operator.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # DALI's own, which writes of damaged files to the terminal

from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
from torch import Tensor

from sslx.data import views
from sslx.data.finish import finish
from sslx.data.headers import Unreadable
from sslx.data.order import Order, Sequential
from sslx.data.patience import Caller, Patience, being_read
from sslx.data.sources import Source
from sslx.data.triage import Triage
from sslx.data.views import Draw, ViewSpec
from sslx.machine import deterministic
from sslx.words import shown

Indices = npt.NDArray[np.int64]
Node = Any  # a DALI DataNode
fn: Any = _fn  # DALI's stubs know neither its generated constants nor that an operator has one output
types: Any = _types

_AHEAD = 2  # batches whose odd images are read before they are fed
_NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
_ONE = np.ones(1, dtype=np.float32)


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
        patience: Patience | None = None,
    ) -> None:
        self.source, self.specs, self.seed = source, tuple(specs), seed
        self.max_per_rank, self.device, self.num_threads = max_per_rank, device, num_threads
        self.patience = patience or Patience()
        self.branched = False
        self.triage = Triage(source, num_threads)

    def stream(
        self, order: Order, start: int, substitute: Callable[[Indices], Indices]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batch start, start + 1, ... of the order: one (B, 3, H, W) float32 channels_last tensor a view.

        substitute: maps sample indices to those to read in their place (bad files).  Raises RuntimeError where
        a file of the batch cannot be read; the stream is then at its end.  Also what ``patience.Caller`` raises.
        """
        t = start
        while not order.finished(t):
            feed = _Feed(self, order, t, substitute)
            for batch in self._run(feed):
                yield batch
                t += 1
            if feed.error is not None:
                raise feed.error

    def _run(self, feed: "_Feed") -> Iterator[tuple[Tensor, ...]]:
        """The batches of one pipeline, until its feed ends."""
        pipeline = self._pipeline(feed)
        pipeline.build()
        with Caller(self.patience, self._being_read) as call:
            yield from self._batches(partial(call, pipeline.run), feed)

    def _batches(self, run: Callable[[], Any], feed: "_Feed") -> Iterator[tuple[Tensor, ...]]:
        # On a GPU torch reads DALI's buffers after this function has gone on; let go, DALI would fill them again.
        held: deque[tuple[torch.cuda.Event, Any]] = deque()
        while True:
            try:
                outputs = run()
            except StopIteration:
                return
            made: list[Tensor] = []
            for spec, drawn, output in zip(self.specs, feed.ahead.popleft(), outputs, strict=True):
                made.append(finish(spec, drawn, torch.from_dlpack(output.as_tensor())))
            if self.device.type == "cuda":
                read = torch.cuda.Event()
                read.record()
                held.append((read, outputs))
                while held and held[0][0].query():
                    held.popleft()
            yield tuple(made)

    def _being_read(self) -> str:
        """What DALI and ``triage``, whose threads tell nothing, may be waiting for."""
        path = being_read(set(self.source.paths or ()))
        return f"DALI is reading {shown(path)}" if path else f"DALI has not read a batch of {self.source.name}"

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why: by ``color``, as on the other backends.

        What that reads and DALI does not, ``color`` reads from now on.
        """
        with Caller(self.patience, self._being_read) as call:
            reasons = call(partial(self.triage.unreadable, index))
        if not reasons:
            for i in self._refused_by_dali(index[self.triage.plain(index)]):
                self.triage.set_odd(i)
        return reasons

    def _refused_by_dali(self, files: Indices) -> list[int]:
        """Those that DALI cannot decode: halves that fail are halved again."""
        if not len(files) or self._decodes(files):
            return []
        half = len(files) // 2
        if half == 0:
            return [int(files[0])]
        return self._refused_by_dali(files[:half]) + self._refused_by_dali(files[half:])

    def _decodes(self, files: Indices) -> bool:
        """Whether DALI reads and decodes all these files."""
        number = len(files)
        small = Dali(
            self.source,
            [ViewSpec(size=8)],
            seed=0,
            max_per_rank=number,
            device=self.device,
            num_threads=self.num_threads,
            patience=self.patience,
        )
        small.triage = self.triage
        try:
            next(small.stream(Sequential(num_samples=number, per_rank=number), 0, files.take))
        except RuntimeError:
            return False
        return True

    def _pipeline(self, feed: "_Feed") -> Pipeline:
        gpu = self.device.type == "cuda"
        boxes = do_not_convert(partial(_boxes, self.specs, feed.uncropped))
        arguments: dict[str, Any] = {
            "batch_size": self.max_per_rank,
            "num_threads": self.num_threads,
            "device_id": (self.device.index or 0) if gpu else None,
            "prefetch_queue_depth": 3 if gpu else 2,
            "seed": 0,  # nothing in the graph draws
        }
        if self.branched:
            return _branched_graph(self.specs, gpu, iter(feed), boxes, **arguments)
        return _graph(self.specs, self.source.pixels is None, gpu, iter(feed), boxes, **arguments)


class _Images:
    """What the graph is fed for the images of a batch; the reading of odd ones begins here."""

    def __init__(self, dali: Dali, files: Indices) -> None:
        self.source, self.files, self.triage = dali.source, files, dali.triage
        self.plain = np.ones(len(files), dtype=np.bool_)
        self.error: Unreadable | None = None
        self.odd: dict[np.int64, Future[npt.NDArray[np.uint8]]] = {}
        if self.source.pixels is None:
            try:
                self.plain = self.triage.plain(files)
            except Unreadable as error:
                self.error = error
            odd = files[~self.plain]
            self.odd = dict(zip(odd, self.triage.pixels(odd), strict=True))

    def inputs(self, branched: bool) -> list[Any]:
        """For the graph with a branch or without one.  Raises Unreadable."""
        if self.error is not None:
            raise self.error
        if self.source.pixels is not None:
            pixels = self.source.pixels[self.files]
            return [list(pixels) if pixels.dtype == object else pixels]
        paths = self.triage.paths(self.files)
        if not branched:
            return [paths]
        odd = {i: pixels.result() for i, pixels in self.odd.items()}
        return [paths, [odd.get(i, _NO_PIXELS) for i in self.files], ~self.plain]


class _Feed:
    """The inputs of each batch: the images, then every view's parameters.

    It ends with the order, before a batch that needs the graph with a branch, or with an ``error``.
    ahead: what was drawn for batches that DALI is still making.  uncropped: and for those whose images it has yet to
    look at.
    """

    def __init__(self, dali: Dali, order: Order, start: int, substitute: Callable[[Indices], Indices]) -> None:
        self.dali, self.order, self.start, self.substitute = dali, order, start, substitute
        self.ahead: deque[list[Draw | None]] = deque()
        self.uncropped: deque[list[Draw | None]] = deque()
        self.error: Unreadable | None = None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        t, images = self.start, deque[_Images]()
        while not self.order.finished(t):
            while len(images) <= _AHEAD and not self.order.finished(t + len(images)):
                files = self.substitute(self.order.batch(t + len(images)))
                images.append(_Images(self.dali, files))
            batch = images.popleft()
            if batch.odd and not self.dali.branched:
                self.dali.branched = True
                return
            try:
                inputs = batch.inputs(self.dali.branched)
            except Unreadable as error:
                self.error = error
                return
            index, drawn = self.order.batch(t), list[Draw | None]()
            for number, spec in enumerate(self.dali.specs):
                one = None
                if spec.augment is not None:
                    one = views.draw(spec, self.dali.seed, self.order.epoch(t), index, number)
                drawn.append(one)
                inputs += [getattr(one, name) for name in _fed(spec)]
            self.ahead.append(drawn)
            self.uncropped.append(drawn)
            yield tuple(inputs)
            t += 1


@pipeline_def
def _graph(
    specs: Sequence[ViewSpec],
    from_files: bool,
    gpu: bool,
    feed: Iterator[tuple[Any, ...]],
    boxes: Callable[[list[Any]], tuple[Any, ...]],
) -> tuple[Node, ...]:
    """The pipeline, the same for both devices: images and parameters in, one uint8 HWC batch a view out."""
    image, *fed = _inputs(specs, feed, [(types.UINT8, 1, "") if from_files else (types.UINT8, 3, "HWC")])
    if not from_files:
        corners, _ = _corners(specs, image.shape(), boxes)
        return _views(specs, image.gpu() if gpu else image, corners, fed)
    encoded = _file(image)
    corners, checked = _corners(specs, fn.peek_image_shape(encoded), boxes)
    return _views(specs, _decode(encoded, checked, gpu), corners, fed)


@pipeline_def(enable_conditionals=True)
def _branched_graph(
    specs: Sequence[ViewSpec],
    gpu: bool,
    feed: Iterator[tuple[Any, ...]],
    boxes: Callable[[list[Any]], tuple[Any, ...]],
) -> tuple[Node, ...]:
    """The same for files of which some (``odd``) come as pixels."""
    path, pixels, odd, *fed = _inputs(specs, feed, [(types.UINT8, 1, ""), (types.UINT8, 3, "HWC"), (types.BOOL, 0, "")])
    if odd:
        encoded = path
        shape = pixels.shape(dtype=types.INT64)
    else:
        encoded = _file(path)
        shape = fn.peek_image_shape(encoded)
    corners, checked = _corners(specs, shape, boxes)
    if odd:
        image = pixels.gpu() if gpu else fn.copy(pixels)
    else:
        image = _decode(encoded, checked, gpu)
    return _views(specs, image, corners, fed)


@do_not_convert
def _inputs(
    specs: Sequence[ViewSpec], feed: Iterator[tuple[Any, ...]], images: list[tuple[Any, int, str]]
) -> list[Node]:
    """What is fed: the images, each input's (type, dimensions, layout), and the drawn parameters."""
    kinds = images + [(types.FLOAT, 0, "")] * sum(len(_fed(spec)) for spec in specs)
    dtype, ndim, layout = map(list, zip(*kinds, strict=True))
    return fn.external_source(source=feed, num_outputs=len(kinds), batch=True, dtype=dtype, ndim=ndim, layout=layout)


@do_not_convert
def _corners(
    specs: Sequence[ViewSpec], shape: Node, boxes: Callable[[list[Any]], tuple[Any, ...]]
) -> tuple[list[Node], Node]:
    """``_boxes`` in the graph: the start and end of each view's box, and a 1 once all shapes are known."""
    *corners, checked = fn.python_function(shape, function=boxes, batch_processing=True, num_outputs=2 * len(specs) + 1)
    return corners, checked


@do_not_convert
def _views(specs: Sequence[ViewSpec], image: Node, corners: list[Node], fed: list[Node]) -> tuple[Node, ...]:
    outputs: list[Node] = []
    for spec, start, end in zip(specs, corners[::2], corners[1::2], strict=True):
        names = _fed(spec)
        outputs.append(_jitter(_resize(spec, image, start, end), dict(zip(names, fed, strict=False))))
        fed = fed[len(names) :]
    return tuple(outputs)


@do_not_convert
def _file(path: Node) -> Node:
    return fn.io.file.read(path, dont_use_mmap=True)


def _boxes(
    specs: Sequence[ViewSpec], uncropped: deque[list[Draw | None]], shapes: list[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.float32]], ...]:
    """Where each view's crop starts and ends, (y, x) a sample, from the (H, W, C) of a batch's images; then ones."""
    height, width = np.array(shapes)[:, :2].T
    corners: list[list[npt.NDArray[np.float32]]] = []
    for spec, drawn in zip(specs, uncropped.popleft(), strict=True):
        box = views.boxes(spec, drawn, height, width).astype(np.float32)
        if drawn is not None:
            flipped = drawn.flip > 0
            box[flipped] = box[flipped][:, [0, 3, 2, 1]]
        corners += [list(box[:, :2]), list(box[:, 2:])]
    return *corners, [_ONE] * len(shapes)


@do_not_convert
def _decode(encoded: Node, checked: Node, gpu: bool) -> Node:
    """RGB uint8 HWC of a plain file: grayscale repeated, alpha dropped, EXIF turned upright.

    On the CPU the pixels are those of ``color.read``.  Flipped bytes in a JPEG may pass in one and not in both.
    checked: a 1 for each sample, computed from what ``peek_image_shape`` found in all of them.
    """
    encoded = fn.reshape(encoded, rel_shape=checked)  # as it is, but not before
    if gpu:
        load = deterministic.decoder_load()
        return fn.decoders.image(
            encoded, device="mixed", output_type=types.RGB, jpeg_fancy_upsampling=True, hw_decoder_load=load
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
