"""DALI's graph for a GPU, built and serialized without one: devices, arguments and layouts of every operator.

DALI checks each operator against its schema when it is added to the backend, which works on any machine as long as the
pipeline is not built.  Its Python operator cannot be serialized, so that there the boxes are fed from outside.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import fake_cuda
import numpy as np
import pytest
import torch

from kit.sources import by_path, in_memory
from sslx.data.backends import dali
from sslx.data.backends.dali import Dali, backend, fn, types
from sslx.data.backends.feed import Feed
from sslx.data.order import Sequential
from sslx.data.planner import Planner
from sslx.data.views import Augment, ViewSpec

CUDA = torch.device("cuda", 0)
Kind = str
KINDS = ("files", "pixels", "branched")
SPECS = (
    ViewSpec(size=32, augment=Augment()),
    ViewSpec(size=24, augment=Augment(interpolation="bicubic", brightness=0.2)),
    ViewSpec(size=16),
)


class Operator(NamedTuple):
    """What the backend knows of one: ``inputs`` and ``outputs`` are names and devices."""

    kind: str
    inputs: list[tuple[str, str]]
    outputs: list[tuple[str, str]]
    arguments: dict[str, str]


def operators(pipeline: Any) -> list[Operator]:
    every = list[Operator]()
    for operator in pipeline._ops:
        spec = operator.spec
        text = str(spec)
        settings = dict(re.findall(r"^    (\w+): (.*)$", text.partition("Arguments:")[2], re.MULTILINE))
        every.append(
            Operator(
                text.split()[2].rstrip(":"),
                [(spec.InputName(i), str(spec.InputDevice(i))) for i in range(spec.NumInput())],
                [(spec.OutputName(i), str(spec.OutputDevice(i))) for i in range(spec.NumOutput())],
                {name: value for name, value in settings.items() if not name.startswith("_")},
            )
        )
    return every


def checked(pipeline: Any) -> Any:
    """After what building begins with: DALI's checks of every operator."""
    pipeline._build_graph()
    pipeline._init_pipeline_backend()
    return pipeline


def fed_boxes(specs: Any, shape: Any, boxes: Any) -> Any:
    """In the place of ``_corners``: what its Python operator would have put out."""
    del shape, boxes
    num = 2 * len(specs) + 1
    *corners, checked = fn.external_source(
        source=lambda: None, num_outputs=num, batch=True, dtype=types.FLOAT, ndim=[1] * num
    )
    return corners, checked


@pytest.fixture
def graph() -> Callable[..., Any]:
    """``graph(kind, device)``: the pipeline that ``Dali`` makes, for no device in particular, so not built."""

    def made(kind: Kind, device: torch.device = CUDA, specs: tuple[ViewSpec, ...] = SPECS) -> Any:
        pixels = np.zeros((4, 20, 20, 3), dtype=np.uint8)
        source = in_memory(pixels) if kind == "pixels" else by_path(["/nowhere.jpg"] * 4)
        with fake_cuda.on():
            backend = Dali(source, specs, max_per_rank=4, device=device, num_threads=1)
        backend.branched = kind == "branched"
        planner = Planner(order=Sequential(num_samples=4, per_rank=4), specs=specs)
        pipeline = backend._pipeline(Feed(backend, planner, 0))
        assert pipeline.device_id == (0 if device.type == "cuda" else None)
        pipeline._device_id = None  # of a backend that needs no driver before it is built
        return pipeline

    return made


@pytest.mark.filterwarnings("ignore:The external source node")  # of pixels no file is checked
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_graph_passes_dalis_own_checks_and_is_serialized(
    graph: Callable[..., Any], kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali, "_corners", dali.do_not_convert(fed_boxes))
    pipeline = graph(kind)
    assert len(pipeline.serialize()) > 1000
    found = Counter(operator.kind for operator in operators(pipeline))
    assert found["Resize"] == len(SPECS)
    assert found["decoders__Image"] == (kind != "pixels")
    assert not found.keys() & {"BrightnessContrast", "ColorSpaceConversion", "reductions__Mean"}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_go_to_the_gpu_once_and_never_come_back(graph: Callable[..., Any], kind: Kind) -> None:
    pipeline = checked(graph(kind))
    every = operators(pipeline)
    on_gpu = {name for operator in every for name, device in operator.outputs if "gpu" in device.lower()}
    assert on_gpu
    there_are = {
        "cpu": backend.RegisteredCPUOps(), "gpu": backend.RegisteredGPUOps(), "mixed": backend.RegisteredMixedOps()
    }  # fmt: skip
    for operator in every:
        device = operator.arguments["device"]
        python = device == "cpu" and "PythonFunction" in operator.kind  # registered when a pipeline is built
        assert python or operator.kind in there_are[device], f"DALI has no {operator.kind} on the {device}"
        devices = ["gpu" in device.lower() for _, device in operator.inputs]
        to_host = any(name in on_gpu for name, device in operator.inputs if "gpu" not in device.lower())
        assert not to_host, f"{operator.kind} waits for the GPU"
        if operator.kind == "Resize":
            assert devices == [True, False, False], "pixels on the GPU, the box's corners on the host"
            assert operator.arguments["device"] == "gpu"
            assert operator.arguments["antialias"] == "True"
        if operator.kind == "decoders__Image":
            assert operator.arguments["device"] == "mixed"
            assert operator.arguments["jpeg_fancy_upsampling"] == "True"
            assert operator.arguments["output_type"] == str(int(types.RGB))
    assert [device for _, device in pipeline._names_and_devices] == ["gpu"] * len(SPECS)
    layouts = Counter(o.arguments.get("layout", "") for o in every if o.kind == "ExternalSource")
    assert layouts["HWC"] == (kind != "files")


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_uint8_with_channels_last_wherever_dali_can_tell(
    graph: Callable[..., Any], kind: Kind, device: torch.device
) -> None:
    """By DALI's own inference, which says nothing of a branch or a resize: what goes into them must be right."""
    described = dict[str, tuple[Any, ...]]()
    for operator in checked(graph(kind, device))._ops:
        operator.spec.InferOutputMetadata()
        for number in range(operator.spec.NumOutput()):
            name, _, ndim, dtype, layout = operator.spec.OutputDesc(number)
            described[name] = (ndim, dtype, str(layout or ""))
    images = [what for name, what in described.items() if re.match(r"__Image|__Copy", name)]
    images += [what for name, what in described.items() if "ExternalSource" in name and what[0] == 3]
    assert len(images) == {"files": 1, "pixels": 1, "branched": 2 + (device.type == "cpu")}[kind]
    for ndim, dtype, layout in images:
        assert dtype in (types.UINT8, None)
        assert ndim in (3, None)
        assert layout in ("HWC", "")
    assert (3, types.UINT8, "HWC") in images
    shapes = [what for name, what in described.items() if "Shape" in name and "Re" not in name]
    assert all(what[:2] == (1, types.INT64) for what in shapes)
    assert len(shapes) == (2 if kind == "branched" else 1)


def test_resizes_take_the_filters_of_their_views(graph: Callable[..., Any]) -> None:
    for device in (CUDA, torch.device("cpu")):
        pipeline = checked(graph("files", device))
        filters = [o.arguments["interp_type"] for o in operators(pipeline) if o.kind == "Resize"]
        assert filters == [str(int(types.INTERP_LINEAR)), str(int(types.INTERP_CUBIC)), str(int(types.INTERP_LINEAR))]


PLANTED: dict[str, Callable[[Any], Any]] = {
    "an argument that no resize has": lambda image: fn.resize(image, size=8, no_such_argument=1),
    "an operator that exists on the CPU alone": fn.io.file.read,
    "an argument from the GPU": lambda image: fn.brightness_contrast(image, contrast=fn.reductions.mean(image)),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_cannot_work_is_found(graph: Callable[..., Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dali._resize
    monkeypatch.setattr(dali, "_resize", lambda *args: PLANTED[fault](right(*args)))
    with pytest.raises((AssertionError, KeyError, ValueError), match=r"argument|has no"):
        test_pixels_go_to_the_gpu_once_and_never_come_back(graph, "files")


def test_a_round_trip_by_the_host_is_found(graph: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast in the graph, as it was: its mean gray came back to the host."""
    monkeypatch.setattr(dali, "fed_parameters", lambda spec, gpu: ["contrast"] * bool(gpu and spec.augment))

    def by_the_host(image: Any, fed: dict[str, Any]) -> Any:
        if not fed:
            return image
        center = fn.reductions.mean(image, axes=[0, 1, 2]).cpu()
        return fn.brightness_contrast(image, contrast=fed["contrast"], contrast_center=center)

    monkeypatch.setattr(dali, "_jitter", by_the_host)
    with pytest.raises(AssertionError, match="BrightnessContrast waits for the GPU"):
        test_pixels_go_to_the_gpu_once_and_never_come_back(graph, "files")
