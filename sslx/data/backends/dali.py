"""ViewSpec -> NVIDIA DALI pipeline, on the CPU or the GPU.  The only importer of nvidia.dali.

The pipeline is stateless, so that nothing in it needs checkpoints: an external source feeds it paths, bytes or pixels
and every sample's parameters, drawn by ``views.draw``; DALI reads, decodes once, crops and flips each view.  Torch does
the other operations on the same device (``color.Finish``), on a CPU in a third of DALI's time.  DALI does brightness
and contrast only on a CPU: on a GPU the mean gray that contrast needs would have to return to the host.

DALI reads the files that it decodes as all backends do (``headers.is_plain``).  ``formats`` reads the others, which are
fed as pixels to a graph with a branch.  The branch costs 5 us per sample, so it is built only once it is needed.

Traps (DALI 2.4), each covered by a parity test against torchvision:
- contrast pivots at 128 unless given the image's mean gray;
- hue, a shift in HSV in torchvision, is the only operation that cannot agree (``color``);
- GPU decoding needs ``jpeg_fancy_upsampling`` to interpolate chroma as libjpeg-turbo does;
- argument inputs must be CPU nodes, also for GPU operators;
- ``decoders.image`` ends the process by SIGSEGV if a parser refuses one image of a batch of 25 or more, whereas
  ``peek_image_shape`` raises: therefore the decoder's input depends on it (``checked``);
- reading by mmap ends the process by SIGBUS if a file is truncated meanwhile, and costs 6 us per file more;
- a list of B paths costs 4 us per sample more than one zero-padded array of them;
- each operator, even an arithmetic one, costs a CPU 1 us per sample, compared to 20 us for a 32 px crop: therefore
  one Python operator computes the boxes of the whole batch.
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

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # DALI's OpenCV reports damaged files to the terminal

from nvidia.dali import backend as _backend
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.pipeline import Pipeline, do_not_convert, pipeline_def
from PIL import Image
from torch import Tensor

from sslx.console.words import one_line, shown
from sslx.data.backends.color import Finish
from sslx.data.backends.dali_files import DaliFiles
from sslx.data.backends.feed import Feed, Prepared, crop_boxes, fed_parameters
from sslx.data.facts import Facts
from sslx.data.order import Sequential
from sslx.data.planner import Planner, Work
from sslx.data.sources.base import Coded, Files, Pixels, Source
from sslx.data.transfer import Delivery, stage
from sslx.data.views import ViewSpec
from sslx.data.waiting import Caller, WaitPolicy, being_read
from sslx.machine import deterministic, device_errors, limits

Indices = npt.NDArray[np.int64]
Node = Any  # a DALI DataNode
Kind = Literal["pixels", "paths", "bytes"]
fn: Any = _fn  # DALI's stubs lack its generated constants and allow several outputs per operator
types: Any = _types
backend: Any = _backend

PREFETCHED = {"cpu": 2, "cuda": 3}
"""Number of batches that DALI makes ahead of time."""


class Dali:
    """Batches of views, made by DALI.

    specs: one per view.  device: the views' device.  num_threads: size of this rank's DALI thread pool.  prefetch: the
    number of batches that DALI makes ahead of time, by default that of PREFETCHED.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        max_per_rank: int,
        device: torch.device,
        num_threads: int,
        wait_policy: WaitPolicy | None = None,
        prefetch: int | None = None,
    ) -> None:
        self.source, self.specs = source, tuple(specs)
        self.max_per_rank, self.device, self.num_threads = max_per_rank, device, num_threads
        self.prefetch = prefetch
        self.wait_policy = wait_policy or WaitPolicy()
        self.branched = False
        self.gpu = device.type == "cuda"
        self._finish = [Finish(spec, device, jitter=self.gpu) for spec in self.specs]

    @cached_property
    def files(self) -> DaliFiles:
        """The states of the source's files."""
        assert isinstance(self.source, Coded)
        return DaliFiles(self.source, self.num_threads)

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batches start, start + 1, ..., with one (B, 3, H, W) float32 channels_last tensor per view.

        Raises RuntimeError if a file of the batch cannot be read, which ends the stream, and what ``Caller``
        raises.
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
            self._release()

    def prepare(self, work: Work) -> Prepared:
        """Make a batch's inputs on the host, apart from its images."""
        views = list(zip(self.specs, work.draws, strict=True))
        fed = [getattr(drawn, name) for spec, drawn in views for name in fed_parameters(spec, self.gpu)]
        parameters = [finish.parameters(drawn) for drawn, finish in zip(work.draws, self._finish, strict=True)]
        return Prepared(work, fed, stage([work.along, *parameters], self.device))

    def _run(self, feed: Feed) -> Iterator[Delivery]:
        """Yield the batches of one pipeline until its feed ends."""
        pipeline = self._pipeline(feed)
        pipeline.build()
        with Caller(self.wait_policy, self._being_read) as call:
            while True:
                try:
                    images = self._images(call, pipeline)
                except StopIteration:
                    return
                batch = [self._make(images, feed.ahead.popleft())]
                del images
                yield batch.pop()

    def _images(self, call: Caller, pipeline: Pipeline) -> list[Tensor]:
        """Return the next batch of crops, (B, size, size, 3) uint8 per view.

        On a GPU they are ordered by torch's stream: the host does not wait for them, and DALI reuses their memory in
        the order of that stream, so that crops that torch still reads are not overwritten.
        """
        stream = torch.cuda.current_stream(self.device) if self.gpu else None
        outputs = call(partial(pipeline.run, stream))
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _release(self) -> None:
        """Return GPU memory that DALI would keep although no pipeline uses it."""
        if self.gpu:
            backend.ReleaseUnusedMemory()

    def _make(self, images: list[Tensor], batch: Prepared) -> Delivery:
        """Make the views of a batch from its crops."""
        extras, *parameters = batch.staged.send()
        inputs = zip(self._finish, batch.work.draws, images, parameters, strict=True)
        views = tuple(finish(drawn, image, sent) for finish, drawn, image, sent in inputs)
        return Delivery(batch.work.index, views, extras)

    def _being_read(self) -> str:
        """Describe what DALI and ``files``, whose threads report nothing, may be waiting for."""
        path = being_read(set(self.source.paths)) if isinstance(self.source, Files) else ""
        return f"DALI is reading {shown(path)}" if path else f"DALI has not read a batch of {self.source.name}"

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Return the images that ``formats`` cannot read, as on the other backends, and the reasons.

        Files that ``formats`` reads but DALI does not are left to ``formats`` from now on.  Raises errors of the device
        (``device_errors.find``).  If DALI does not even decode a known good image, no file is to blame: it raises
        AcceleratorError on a GPU and RuntimeError on a CPU.
        """
        if isinstance(self.source, Pixels):
            return {}
        with Caller(self.wait_policy, self._being_read) as call:
            reasons = call(partial(self.files.unreadable, index))
        if not reasons:
            plain = index[self.files.plain(index)]
            if len(plain) and (error := self._refusal(plain)):
                self._check_itself(error)
                for i in self._refused_by_dali(plain):
                    self.files.set_odd(i)
        self._release()
        return reasons

    def _check_itself(self, error: RuntimeError) -> None:
        """Raise the error if DALI refuses a known good image."""
        with NamedTemporaryFile(suffix=".jpg") as file:
            Image.new("RGB", (16, 16)).save(file, "JPEG")
            file.flush()
            good = Dali(
                Files(name="an image made by sslx", facts=Facts(num_samples=1, size=8), paths=[file.name]),
                self.specs,
                max_per_rank=1,
                device=self.device,
                num_threads=self.num_threads,
                wait_policy=self.wait_policy,
            )
            if good._refusal(np.zeros(1, dtype=np.int64)):
                kind = torch.AcceleratorError if self.gpu else RuntimeError
                raise kind(f"DALI cannot decode even an image made by sslx: {one_line(error, 2_000)}") from error

    def _refused_by_dali(self, files: Indices) -> list[int]:
        """Return the files that DALI cannot decode, by bisection."""
        if not len(files) or not self._refusal(files):
            return []
        half = len(files) // 2
        if half == 0:
            return [int(files[0])]
        return self._refused_by_dali(files[:half]) + self._refused_by_dali(files[half:])

    def _refusal(self, files: Indices) -> RuntimeError | None:
        """Return why DALI does not read and decode all these files, or None if it does.  Raises device errors."""
        number = len(files)
        small = Dali(
            self.source,
            [ViewSpec(size=8)],
            max_per_rank=number,
            device=self.device,
            num_threads=self.num_threads,
            wait_policy=self.wait_policy,
        )
        small.files = self.files
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
            "prefetch_queue_depth": self.prefetch or PREFETCHED[self.device.type],
            "seed": 0,  # the graph draws no random numbers
        }
        kind: Kind = "bytes"
        if isinstance(self.source, Pixels):
            kind = "pixels"
        elif isinstance(self.source, Files):
            kind = "paths"
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
    """Define the pipeline for both devices, from images and parameters to one uint8 HWC batch per view."""
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
    """Define the pipeline for files of which some (``odd``) come as pixels."""
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
    """Return the fed inputs: the images and the drawn parameters.  images: (type, dimensions, layout) of each input."""
    kinds = images + [(types.FLOAT, 0, "")] * sum(len(fed_parameters(spec, gpu)) for spec in specs)
    dtype, ndim, layout = map(list, zip(*kinds, strict=True))
    return fn.external_source(source=feed, num_outputs=len(kinds), batch=True, dtype=dtype, ndim=ndim, layout=layout)


@do_not_convert
def _corners(
    specs: Sequence[ViewSpec], shape: Node, boxes: Callable[[list[Any]], tuple[Any, ...]]
) -> tuple[list[Node], Node]:
    """Return the start and end of each view's box by ``crop_boxes``, and a 1 per sample once all shapes are known."""
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
    """Decode plain files to RGB uint8 HWC: gray is repeated, alpha dropped, and EXIF's orientation applied.

    On the CPU the pixels are those of ``formats.read``, and DALI refuses the same truncated files
    (tests/data/test_bad_images.py).  One of the two may accept flipped bytes in a JPEG that the other refuses.  On a
    GPU neither is tested yet: nvJPEG and the JPEG engine may accept a truncated file, whose end is then gray or
    repeated in its view, and usually round the pixels of good files differently by one level.
    checked: a 1 for each sample, computed from the shapes that ``peek_image_shape`` found in all of them.
    """
    encoded = fn.reshape(encoded, rel_shape=checked)  # changes nothing, but makes the decoder wait for the check
    if gpu:
        load = deterministic.decoder_load()
        return fn.decoders.image(
            encoded, device="mixed", output_type=types.RGB, jpeg_fancy_upsampling=True, hw_decoder_load=load
        )
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


def _resize(spec: ViewSpec, image: Node, start: Node, end: Node) -> Node:
    """Resize the image's box to size x size pixels, uint8, mirrored if the box starts to the right of its end."""
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
    """Apply brightness, then contrast, on a CPU.  Operations that the recipe never uses are left out of the graph."""
    if "brightness" in fed:
        image = fn.brightness_contrast(image, brightness=fed["brightness"])
    if "contrast" in fed:
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        center = fn.reductions.mean(gray, axes=[0, 1, 2])
        image = fn.brightness_contrast(image, contrast=fed["contrast"], contrast_center=center)
    return image
