"""ViewSpec -> NVIDIA DALI pipeline, on the CPU or the GPU.  The only importer of nvidia.dali.

The pipeline is stateless: an external source feeds it paths, bytes or pixels and every sample's parameters, drawn
by ``views.draw``; DALI reads, decodes once, crops and flips each view.  Nothing of it needs to be checkpointed.  The
other operations torch makes on the same device (``finish``): on a CPU in a third of DALI's time.  Brightness and
contrast are DALI's on a CPU alone: on a GPU the mean gray that contrast needs would have to come back to the host.

DALI reads the files that ``headers.is_plain`` knows it to read as all backends do.  The others are read by ``formats``
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # DALI's own, which writes of damaged files to the terminal

from nvidia.dali import backend as _backend
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
from PIL import Image
from torch import Tensor

from sslx.console.words import one_line, shown
from sslx.data.backends.color import Finish
from sslx.data.backends.feed import Feed, Prepared, crop_boxes, fed_parameters
from sslx.data.backends.triage import Triage
from sslx.data.facts import Facts
from sslx.data.order import Sequential
from sslx.data.patience import Caller, Patience, being_read
from sslx.data.planner import Planner, Work
from sslx.data.sources.base import Coded, Files, Pixels, Source
from sslx.data.transfer import Delivery, stage
from sslx.data.views import ViewSpec
from sslx.machine import deterministic, device_errors, limits

Indices = npt.NDArray[np.int64]
Node = Any  # a DALI DataNode
Kind = Literal["pixels", "paths", "bytes"]
fn: Any = _fn  # DALI's stubs know neither its generated constants nor that an operator has one output
types: Any = _types
backend: Any = _backend

PREFETCHED = {"cpu": 2, "cuda": 3}
"""Batches that DALI makes ahead."""


class Dali:
    """Batches of views, made by DALI.

    specs: one per view.  device: the views' device.  num_threads: of DALI's own pool, on this rank.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        max_per_rank: int,
        device: torch.device,
        num_threads: int,
        patience: Patience | None = None,
    ) -> None:
        self.source, self.specs = source, tuple(specs)
        self.max_per_rank, self.device, self.num_threads = max_per_rank, device, num_threads
        self.patience = patience or Patience()
        self.branched = False
        self.gpu = device.type == "cuda"
        self._finish = [Finish(spec, device, jitter=self.gpu) for spec in self.specs]

    @cached_property
    def triage(self) -> Triage:
        """What is known of the source's files."""
        assert isinstance(self.source, Coded)
        return Triage(self.source, self.num_threads)

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batch start, start + 1, ...: one (B, 3, H, W) float32 channels_last tensor a view; what came along.

        Raises RuntimeError where a file of the batch cannot be read; the stream is then at its end.  Also what
        ``patience.Caller`` raises.
        """
        t = start
        try:
            while planner(t) is not None:
                with closing(Feed(self, planner, t)) as feed:
                    for batch in self._run(feed):
                        yield batch
                        t += 1
                if feed.error is not None:
                    raise feed.error
        finally:
            self._release()  # for whoever comes next: DALI would keep it

    def prepare(self, work: Work) -> Prepared:
        """What the host makes for a batch beside its images."""
        each = list(zip(self.specs, work.draws, strict=True))
        fed = [getattr(drawn, name) for spec, drawn in each for name in fed_parameters(spec, self.gpu)]
        parameters = [finish.parameters(one) for one, finish in zip(work.draws, self._finish, strict=True)]
        return Prepared(work, fed, stage([work.along, *parameters], self.device))

    def _run(self, feed: Feed) -> Iterator[Delivery]:
        """The batches of one pipeline, until its feed ends."""
        pipeline = self._pipeline(feed)
        pipeline.build()
        with Caller(self.patience, self._being_read) as call:
            while True:
                try:
                    images = self._images(call, pipeline)
                except StopIteration:
                    return
                batch = [self._make(images, feed.ahead.popleft())]
                del images
                yield batch.pop()

    def _images(self, call: Caller, pipeline: Pipeline) -> list[Tensor]:
        """The next batch of crops, (B, size, size, 3) uint8 a view.

        On a GPU they belong to torch's stream: nobody waits for them, and their memory is DALI's again in the order of
        that stream, so that what torch still reads is not overwritten.
        """
        stream = torch.cuda.current_stream(self.device) if self.gpu else None
        outputs = call(partial(pipeline.run, stream))
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _release(self) -> None:
        """Give the GPU's memory back that DALI keeps and no pipeline uses."""
        if self.gpu:
            backend.ReleaseUnusedMemory()

    def _make(self, images: list[Tensor], batch: Prepared) -> Delivery:
        """The views of a batch from its crops."""
        came, *sent = batch.staged.send()
        every = zip(self._finish, batch.work.draws, images, sent, strict=True)
        views = tuple(finish(one, image, there) for finish, one, image, there in every)
        return Delivery(batch.work.index, views, came)

    def _being_read(self) -> str:
        """What DALI and ``triage``, whose threads tell nothing, may be waiting for."""
        path = being_read(set(self.source.paths)) if isinstance(self.source, Files) else ""
        return f"DALI is reading {shown(path)}" if path else f"DALI has not read a batch of {self.source.name}"

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why: by ``formats``, as on the other backends.

        What that reads and DALI does not, ``formats`` reads from now on. Raises what ``device_errors.find`` names, also
        where DALI does not decode an image of sslx's own either (on a CPU RuntimeError): then no file is to blame.
        """
        if isinstance(self.source, Pixels):
            return {}
        with Caller(self.patience, self._being_read) as call:
            reasons = call(partial(self.triage.unreadable, index))
        if not reasons:
            plain = index[self.triage.plain(index)]
            if len(plain) and (error := self._refusal(plain)):
                self._check_itself(error)
                for i in self._refused_by_dali(plain):
                    self.triage.set_odd(i)
        self._release()
        return reasons

    def _check_itself(self, error: RuntimeError) -> None:
        """Raise the error if DALI refuses an image that is known to be good."""
        with NamedTemporaryFile(suffix=".jpg") as file:
            Image.new("RGB", (16, 16)).save(file, "JPEG")
            file.flush()
            good = Dali(
                Files(name="an image of sslx's own", facts=Facts(num_samples=1, size=8), paths=[file.name]),
                self.specs,
                max_per_rank=1,
                device=self.device,
                num_threads=self.num_threads,
                patience=self.patience,
            )
            if good._refusal(np.zeros(1, dtype=np.int64)):
                kind = torch.AcceleratorError if self.gpu else RuntimeError
                raise kind(f"DALI does not decode an image of sslx's own either: {one_line(error, 2_000)}") from error

    def _refused_by_dali(self, files: Indices) -> list[int]:
        """Those that DALI cannot decode: halves that fail are halved again."""
        if not len(files) or not self._refusal(files):
            return []
        half = len(files) // 2
        if half == 0:
            return [int(files[0])]
        return self._refused_by_dali(files[:half]) + self._refused_by_dali(files[half:])

    def _refusal(self, files: Indices) -> RuntimeError | None:
        """Why DALI does not read and decode all these files; None where it does.  Raises as ``unreadable``."""
        number = len(files)
        small = Dali(
            self.source,
            [ViewSpec(size=8)],
            max_per_rank=number,
            device=self.device,
            num_threads=self.num_threads,
            patience=self.patience,
        )
        small.triage = self.triage
        order = Sequential(num_samples=number, per_rank=number)
        try:
            next(small.stream(Planner(order=order, specs=small.specs, substitute=files.take), 0))
        except (RuntimeError, MemoryError) as error:
            if fault := device_errors.find(error):
                raise fault from None if fault is error else error
            if isinstance(error, MemoryError) or limits.explain(error):
                raise
            return error
        return None

    def _pipeline(self, feed: Feed) -> Pipeline:
        boxes = do_not_convert(partial(crop_boxes, self.specs, feed.uncropped))
        arguments: dict[str, Any] = {
            "batch_size": self.max_per_rank,
            "num_threads": self.num_threads,
            "device_id": (self.device.index or 0) if self.gpu else None,
            "prefetch_queue_depth": PREFETCHED[self.device.type],
            "seed": 0,  # nothing in the graph draws
        }
        kind = "pixels" if isinstance(self.source, Pixels) else "paths" if isinstance(self.source, Files) else "bytes"
        graph = _branched_graph if self.branched else _graph
        return graph(self.specs, kind, self.gpu, iter(feed), boxes, **arguments)


@pipeline_def
def _graph(
    specs: Sequence[ViewSpec],
    kind: Kind,
    gpu: bool,
    feed: Iterator[tuple[Any, ...]],
    boxes: Callable[[list[Any]], tuple[Any, ...]],
) -> tuple[Node, ...]:
    """The pipeline, the same for both devices: images and parameters in, one uint8 HWC batch a view out."""
    in_memory = kind == "pixels"
    image, *fed = _inputs(specs, gpu, feed, [(types.UINT8, 3, "HWC") if in_memory else (types.UINT8, 1, "")])
    if in_memory:
        corners, _ = _corners(specs, image.shape(), boxes)
        return _views(specs, gpu, image.gpu() if gpu else image, corners, fed)
    encoded = _file(image) if kind == "paths" else image
    corners, checked = _corners(specs, fn.peek_image_shape(encoded), boxes)
    return _views(specs, gpu, _decode(encoded, checked, gpu), corners, fed)


@pipeline_def(enable_conditionals=True)
def _branched_graph(
    specs: Sequence[ViewSpec],
    kind: Kind,
    gpu: bool,
    feed: Iterator[tuple[Any, ...]],
    boxes: Callable[[list[Any]], tuple[Any, ...]],
) -> tuple[Node, ...]:
    """The same for files of which some (``odd``) come as pixels."""
    images = [(types.UINT8, 1, ""), (types.UINT8, 3, "HWC"), (types.BOOL, 0, "")]
    file, pixels, odd, *fed = _inputs(specs, gpu, feed, images)
    if odd:
        encoded = file
        shape = pixels.shape(dtype=types.INT64)
    else:
        encoded = _file(file) if kind == "paths" else file
        shape = fn.peek_image_shape(encoded)
    corners, checked = _corners(specs, shape, boxes)
    if odd:
        image = pixels.gpu() if gpu else fn.copy(pixels)
    else:
        image = _decode(encoded, checked, gpu)
    return _views(specs, gpu, image, corners, fed)


@do_not_convert
def _inputs(
    specs: Sequence[ViewSpec], gpu: bool, feed: Iterator[tuple[Any, ...]], images: list[tuple[Any, int, str]]
) -> list[Node]:
    """What is fed: the images, each input's (type, dimensions, layout), and the drawn parameters."""
    kinds = images + [(types.FLOAT, 0, "")] * sum(len(fed_parameters(spec, gpu)) for spec in specs)
    dtype, ndim, layout = map(list, zip(*kinds, strict=True))
    return fn.external_source(source=feed, num_outputs=len(kinds), batch=True, dtype=dtype, ndim=ndim, layout=layout)


@do_not_convert
def _corners(
    specs: Sequence[ViewSpec], shape: Node, boxes: Callable[[list[Any]], tuple[Any, ...]]
) -> tuple[list[Node], Node]:
    """``crop_boxes`` in the graph: the start and end of each view's box, and a 1 once all shapes are known."""
    *corners, checked = fn.python_function(shape, function=boxes, batch_processing=True, num_outputs=2 * len(specs) + 1)
    return corners, checked


@do_not_convert
def _views(specs: Sequence[ViewSpec], gpu: bool, image: Node, corners: list[Node], fed: list[Node]) -> tuple[Node, ...]:
    outputs: list[Node] = []
    for spec, start, end in zip(specs, corners[::2], corners[1::2], strict=True):
        names = fed_parameters(spec, gpu)
        outputs.append(_jitter(_resize(spec, image, start, end), dict(zip(names, fed, strict=False))))
        fed = fed[len(names) :]
    return tuple(outputs)


@do_not_convert
def _file(path: Node) -> Node:
    return fn.io.file.read(path, dont_use_mmap=True)


@do_not_convert
def _decode(encoded: Node, checked: Node, gpu: bool) -> Node:
    """RGB uint8 HWC of a plain file: grayscale repeated, alpha dropped, EXIF turned upright.

    On the CPU the pixels are those of ``formats.read``, and what ``formats`` refuses as cut, DALI refuses too: held by
    tests/data/test_bad_images.py.  Flipped bytes in a JPEG may pass in one and not in both.  On a GPU nobody has tested
    either so far: nvJPEG and the JPEG engine may accept a cut file, whose end then is gray or repeated in its view,
    and round the pixels of good ones otherwise, by a level as a rule.
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
    """Brightness, then contrast, on a CPU; what the recipe never does is left out of the graph."""
    if "brightness" in fed:
        image = fn.brightness_contrast(image, brightness=fed["brightness"])
    if "contrast" in fed:
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        center = fn.reductions.mean(gray, axes=[0, 1, 2])
        image = fn.brightness_contrast(image, contrast=fed["contrast"], contrast_center=center)
    return image
