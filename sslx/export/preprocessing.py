"""How images are prepared for an exported encoder, in the words of each target, and as Python code."""

import math
from typing import Any

from sslx.data.views import FILTERS, ResizedView, ViewSpec


def of_timm(view: ViewSpec) -> dict[str, Any]:
    """Return what a ``pretrained_cfg`` of timm says about images, apart from their channels.

    timm resizes an image before it cuts out the center, also for views of sslx, which are made the other way around.
    """
    fraction, mode, interpolation = view.center, "center", "bilinear"
    if isinstance(view, ResizedView):
        fraction, interpolation = view.size / view.resized, view.interpolation
        mode = "center" if view.keeps_ratio else "squash"
        while math.floor(view.size / fraction) < view.resized:  # as timm computes it, with rounding errors
            fraction = math.nextafter(fraction, 0)
    common = {"mean": view.mean, "std": view.std}
    return {**common, "crop_pct": fraction, "crop_mode": mode, "interpolation": interpolation}


def of_hugging_face(view: ViewSpec) -> dict[str, Any]:
    """Return the settings of an image processor of transformers that makes the view.

    For views of sslx, this is the one processor that cuts out the central square before it resizes.
    """
    size = {"height": view.size, "width": view.size}
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": view.mean,
              "image_std": view.std}  # fmt: skip
    if isinstance(view, ResizedView):
        resample = next(number for number, name in FILTERS.items() if name == view.interpolation)
        crop = {"do_center_crop": view.resized != view.size or view.keeps_ratio, "crop_size": size}
        kind, resized = "BeitImageProcessor", {"height": view.resized, "width": view.resized}
        if view.keeps_ratio:
            kind, resized = "CLIPImageProcessor", {"shortest_edge": view.resized}
        return {"image_processor_type": kind, **crop, "size": resized, "resample": resample, **common}
    side = view.size / view.center
    if view.size / side < view.center:  # by a rounding error, which would cut off a row of pixels
        side = math.nextafter(side, 0)
    crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
    return {"image_processor_type": "PerceiverImageProcessor", **crop, "size": size, "resample": 2, **common}


def as_python(view: ViewSpec) -> str:
    """Return the Python code that makes the same pixels as ``Trained.transform``.

    It takes an ``image`` of PIL or, for other images than RGB of 8 bits, an ``array`` of NumPy.
    """
    mean, std = list(view.mean), list(view.std)
    last = f"images = functional.normalize(pixels / 255, {mean}, {std})[None]"
    if isinstance(view, ResizedView):
        sides = [view.resized] if view.keeps_ratio else [view.resized, view.resized]
        rounded = "int" if view.rounds_down else "round"
        return f"""from torchvision.transforms.v2 import InterpolationMode, functional
image = functional.resize(image.convert("RGB"), {sides}, InterpolationMode.{view.interpolation.upper()})
pixels = functional.pil_to_tensor(image)
top, left = ({rounded}((side - {view.size}) / 2) for side in pixels.shape[-2:])
pixels = functional.crop(pixels, top, left, {view.size}, {view.size})
{last}"""
    if not view.channels.is_plain:
        channels = view.channels
        return f"""import torch
from torchvision.transforms.v2 import functional
pixels = torch.from_numpy(array.astype("float32")).permute(2, 0, 1)
pixels = ((pixels - {channels.black:g}) / {channels.full_scale - channels.black:g}).clamp(0, 1)
{_square(view)}
images = functional.normalize(pixels.clamp(0, 1), {mean}, {std})[None]"""
    return f"""from torchvision.transforms.v2 import functional
pixels = functional.pil_to_tensor(image.convert("RGB"))
{_square(view)}
{last}"""


def given(view: ViewSpec) -> str:
    """Return what the code of ``as_python`` takes, in words."""
    if view.channels.is_plain:
        return "an `image` that PIL has opened"
    return f"an `array` of NumPy, (H, W, {view.channels.num}) of {view.channels.dtype}"


def _square(view: ViewSpec) -> str:
    return f"""height, width = pixels.shape[-2:]
side = int({view.center} * min(height, width) + 0.5)  # of the central square
box = ((height - side) // 2, (width - side) // 2, side, side)
pixels = functional.resized_crop(pixels, *box, [{view.size}, {view.size}], antialias=True)"""


def in_words(view: ViewSpec) -> str:
    """Return how the view is made, in a few words."""
    after = f"mean {view.mean}, std {view.std}"
    if not view.channels.is_plain:
        after = f"{view.channels.in_words}, {after}"
    if isinstance(view, ResizedView):
        side = "the shorter side" if view.keeps_ratio else "both sides"
        return f"{side} resized to {view.resized} px ({view.interpolation}), the central {view.size} px, {after}"
    return f"the central {view.center:.0%} of the shorter side, resized to {view.size} px, {after}"
