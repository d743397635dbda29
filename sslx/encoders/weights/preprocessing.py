"""Reads how another library prepares images from the file beside its weights, as a view."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sslx.data.views import FILTERS, IMAGENET_MEAN, IMAGENET_STD, ViewSpec, eval_view, from_json
from sslx.machine import files

Settings = Mapping[str, Any]
SSLX = "sslx.json"
"""The file that ``sslx export`` writes beside every export, with the recipe and the view."""
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MIN_SQUASHED = 384
"""Side from which transformers' ConvNeXt resizes the whole image to a square, instead of cutting out its center."""


def view_beside(path: Path) -> tuple[ViewSpec, str] | None:
    """Return how images are prepared for the weights in a file or folder, and the name of the file that says so.

    Return None if there is no such file, or if it asks for what a view cannot be, such as borders around the image.
    """
    folder = path if path.is_dir() else path.parent
    for name, read in _READERS.items():
        with suppress(OSError, LookupError, TypeError, ValueError, RecursionError, AttributeError):
            settings = json.loads(files.read_text(folder / name))
            if view := read(settings):
                return view, name
    return None


def default(size: int, name: str) -> tuple[ViewSpec, str]:
    """Return sslx's evaluation view for a model of timm, of which nothing says how images are prepared, and its words.

    The mean and standard deviation are those of ImageNet, or OpenAI's for a model that is a tower of CLIP.
    """
    if "_clip" in name:
        return eval_view(size, _CLIP_MEAN, _CLIP_STD), "the mean and standard deviation of CLIP"
    return eval_view(size), "the mean and standard deviation of ImageNet"


def _of_sslx(settings: Settings) -> ViewSpec:
    return from_json(settings["view"])


def _of_timm(settings: Settings) -> ViewSpec | None:
    """Return the view of a model's ``pretrained_cfg``, as timm's ``create_transform`` makes it."""
    if "architecture" not in settings:
        return None
    config: Settings = settings.get("pretrained_cfg", settings)
    _, size, width = config["input_size"]
    mode, interpolation = config.get("crop_mode") or "center", config.get("interpolation") or "bilinear"
    if size != width or mode not in ("center", "squash"):
        return None
    return _resized(
        size,
        math.floor(size / (config.get("crop_pct") or 0.875)),
        keeps_ratio=mode == "center",
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=config.get("mean", IMAGENET_MEAN),
        std=config.get("std", IMAGENET_STD),
    )


def _of_open_clip(settings: Settings) -> ViewSpec | None:
    """Return the view of ``open_clip_config.json``, as open_clip's ``image_transform`` makes it."""
    config: Settings = settings.get("preprocess_cfg", {})
    size = settings["model_cfg"]["vision_cfg"].get("image_size", 224)
    mode, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash"):
        return None
    return _resized(
        size,
        size,
        keeps_ratio=mode == "shortest",
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=config.get("mean", _CLIP_MEAN),
        std=config.get("std", _CLIP_STD),
    )


def _of_hugging_face(settings: Settings) -> ViewSpec | None:
    """Return the view of an image processor of transformers."""
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    factor = settings.get("rescale_factor", 1 / 255)
    if not (settings.get("do_resize", True) and settings.get("do_rescale", True)) or abs(255 * factor - 1) > 1e-6:
        return None
    if settings.get("do_pad") or settings.get("do_flip_channel_order"):
        return None
    mean, std = settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)
    if not settings.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    interpolation = FILTERS[settings.get("resample", 2)]
    side, keeps_ratio = _side(settings["size"], is_shorter=kind.startswith(("CLIP", "ConvNext")))
    center, _ = _side(settings["crop_size"]) if settings.get("do_center_crop") else (None, False)
    if kind.startswith("Perceiver") and center and interpolation == "bilinear":  # which sslx exports; it crops first
        return from_json({"size": side, "center": min(1.0, side / center), "mean": mean, "std": std})
    size = side if center is None else center
    if kind.startswith("ConvNext"):
        keeps_ratio = side < _MIN_SQUASHED
        side = int(side / (settings.get("crop_pct") or 0.875)) if keeps_ratio else side
    elif keeps_ratio and center is None:  # views that are not square
        return None
    return _resized(
        size, side, keeps_ratio=keeps_ratio, interpolation=interpolation, mean=mean, std=std, rounds_down=True
    )


def _side(size: Any, *, is_shorter: bool = False) -> tuple[int, bool]:
    """Return a side in pixels, and whether it is that of the shorter side alone.

    is_shorter: what a number alone, as older versions of transformers wrote it, means.
    """
    if isinstance(size, int):
        return size, is_shorter
    if "shortest_edge" in size and "longest_edge" not in size:
        return size["shortest_edge"], True
    if size["height"] != size["width"]:
        raise ValueError(f"expected a square, got {size}")
    return size["height"], False


def _resized(size: Any, resized: Any, *, mean: Any, std: Any, **options: Any) -> ViewSpec:
    return from_json({"size": size, "resized": resized, "mean": mean, "std": std, **options})


_READERS: Mapping[str, Callable[[Settings], ViewSpec | None]] = {
    SSLX: _of_sslx,
    "open_clip_config.json": _of_open_clip,
    "preprocessor_config.json": _of_hugging_face,
    "config.json": _of_timm,
}
