"""Builds trunks: timm models without their classifier, with the stem and norms of a recipe."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sslx.encoders import norms
from sslx.encoders.config import Config
from sslx.encoders.recipe import Recipe
from sslx.errors import ConfigError

MAX_SMALL_STEM_SIZE = 64
"""Largest view in pixels for which the stem "auto" is "small", which keeps the resolution of its input."""


def check_name(name: str) -> None:
    """Raise ConfigError if timm has no model of this name."""
    timm = import_timm()
    if not timm.is_model(name):
        similar_names = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(similar_names)}?" if similar_names else "see timm.list_models()"
        raise ConfigError(f"--encoder.name {name!r} is not a timm model: {hint}")


def import_timm() -> Any:
    """Import timm without wandb, which timm imports if it can: that takes a tenth of the time in which a run starts."""
    hides_wandb = "wandb" not in sys.modules
    if hides_wandb:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]
    try:
        return import_module("timm")  # inside a function: see encoders.build
    finally:
        if hides_wandb:
            del sys.modules["wandb"]


def arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` for the configured layers, channels and patch size.

    Raises ConfigError if the model cannot have them.
    """
    return _vit_arguments(config) if is_plain_vit(config.name) else _resnet_arguments(config)


def _vit_arguments(config: Config) -> dict[str, int]:
    shape: dict[str, int] = {} if config.patch is None else {"patch_size": config.patch}
    if any(len(numbers) > 1 for numbers in (config.layers, config.channels)):
        raise ConfigError("a ViT has one stage: give one number each for --encoder.layers and --encoder.channels")
    for depth in config.layers:
        shape["depth"] = depth
    for width in config.channels:
        num_heads = max(1, width // 64)  # 64 channels per head, as in ViTs of all sizes (arXiv 2010.11929, table 1)
        if width % (4 * num_heads):
            raise ConfigError(
                f"--encoder.channels of a ViT must be a multiple of 4 x heads (one head per 64 channels), got {width}"
            )
        shape |= {"embed_dim": width, "num_heads": num_heads}
    if min(shape.values(), default=1) < 1:
        raise ConfigError("--encoder.patch, --encoder.layers and --encoder.channels must be at least 1")
    return shape


def _resnet_arguments(config: Config) -> dict[str, Any]:
    if config.patch is not None:
        raise ConfigError(f"--encoder.patch applies to timm's vit_* and deit_* models; {config.name} is not one")
    shape = {k: list(v) for k, v in (("layers", config.layers), ("channels", config.channels)) if v}
    if not shape:
        return {}
    if not config.name.startswith("resnet") or config.name.startswith("resnetv2"):
        raise ConfigError(f"--encoder.{next(iter(shape))} applies to ResNets and ViTs; {config.name} is neither")
    four = all(len(numbers) == 4 and min(numbers) >= 0 and numbers[-1] > 0 for numbers in shape.values())
    if not four or 0 in config.channels:
        raise ConfigError(
            "a ResNet has 4 stages: --encoder.layers and --encoder.channels take 4 numbers >= 1 each "
            "(0 layers remove a stage, but not the last one)"
        )
    if sum(config.layers) == 1:
        raise ConfigError("timm builds no ResNet of a single block: give --encoder.layers 2 or more blocks in total")
    if config.stem == "narrow":
        # Only timm's deep stems have a settable width; _replace_stem replaces their convolutions afterwards.
        return {**shape, "stem_type": "deep", "stem_width": shape.get("channels", [64])[0] // 2}
    return shape


def is_plain_vit(name: str) -> bool:
    """Return whether a timm model is one of vit_* and deit_*, whose patches, depth, width and image size can be set."""
    from timm.models import is_model_in_modules  # inside the function: see encoders.build

    return is_model_in_modules(name.partition(".")[0], ["vision_transformer", "deit"])


def with_sizes(recipe: Recipe, other_sizes: Sequence[int]) -> Recipe:
    """Return the recipe of an encoder that also accepts views of ``other_sizes`` in pixels.

    A ViT then interpolates its position embeddings.
    """
    if is_plain_vit(recipe.name) and set(other_sizes) - {recipe.size}:
        return replace(recipe, arguments={**recipe.arguments, "dynamic_img_size": True})
    return recipe


def create(recipe: Recipe, *, pretrained: bool = False) -> tuple[nn.Module, Recipe]:
    """Create a recipe's model, still with timm's stem and norms.

    Returns the model and its recipe, without ``img_size`` if the model does not have that argument.
    pretrained: load timm's weights, which timm downloads.  Raises ConfigError if timm cannot build the model.
    """
    try:
        try:
            return _model(recipe, pretrained), recipe
        except TypeError:  # a convolutional trunk, which accepts images of any size
            without_size = {name: value for name, value in recipe.arguments.items() if name != "img_size"}
            recipe = replace(recipe, arguments=without_size)
            return _model(recipe, pretrained), recipe
    except Exception as error:  # timm, its hub and its models raise exceptions of any type
        model, hint = recipe.name, ""
        if pretrained:
            model += " with timm's weights"
            hint = "; without internet access, download them elsewhere and use --encoder.weights FILE"
        raise ConfigError(f"cannot build {model} for {recipe.size} px: {_first_line(error)}{hint}") from error


def _model(recipe: Recipe, pretrained: bool) -> nn.Module:
    import timm  # inside the function: see encoders.build

    return timm.create_model(
        recipe.name, pretrained=pretrained, num_classes=0, in_chans=recipe.channels, **recipe.arguments
    )


def with_stem(recipe: Recipe, config: Config, trunk: nn.Module) -> Recipe:
    """Return the recipe with the configured stem; "auto" chooses by the size of the views."""
    if config.stem != "auto":
        return replace(recipe, stem=config.stem)
    is_small = _is_resnet(trunk) and recipe.size <= MAX_SMALL_STEM_SIZE
    return replace(recipe, stem="small" if is_small else "imagenet")


def complete(trunk: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the trunk's stem and norms by the recipe's and return it; ConfigError if it cannot have that stem."""
    if recipe.stem != "imagenet":
        if not _is_resnet(trunk):
            raise ConfigError(
                f"--encoder.stem {recipe.stem} applies to ResNets; {recipe.name} is not one: use auto or imagenet"
            )
        _replace_stem(trunk, recipe.channels)
    return norms.replace(trunk, recipe.norm)


def _is_resnet(trunk: nn.Module) -> bool:
    from timm.models.resnet import ResNet  # inside the function: see encoders.build

    return isinstance(trunk, ResNet)


def _replace_stem(resnet: Any, channels: int) -> None:
    """Give a ResNet the CIFAR stem: a 3x3 convolution with stride 1, no max-pool (arXiv 2002.05709, appendix B.9)."""
    resnet.conv1 = nn.Conv2d(channels, resnet.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def dim(trunk: nn.Module, size: int, channels: int, name: str) -> int:
    """Return the length of an image's feature vector, from a forward pass on the CPU.

    size: side of the image in pixels.  Raises ConfigError if the trunk fails on it or ignores a part of it.
    """
    was_training = trunk.training
    image = torch.zeros(1, channels, size, size)

    def check_border(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape == image.shape:
            _check_border(module, size)

    handles = [
        module.register_forward_pre_hook(check_border) for module in trunk.modules() if isinstance(module, nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            features = trunk.eval()(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot take views of {size} px: {_first_line(error)}; set --data.size, --data.eval-size or "
            "the size of local crops"
        ) from error
    finally:
        trunk.train(was_training)
        for handle in handles:
            handle.remove()
    if features.ndim != 2:
        raise ConfigError(
            f"expected one feature vector per image, but {name} gives features of shape {tuple(features.shape)}: "
            "use another --encoder.name"
        )
    return features.shape[1]


def _check_border(module: nn.Module, side: int) -> None:
    """Raise ValueError if a convolution cuts the image into patches that do not overlap and leaves a border uncovered.

    side: of the image, in pixels.
    """
    assert isinstance(module, nn.Conv2d)
    for kernel, stride, padding in zip(module.kernel_size, module.stride, module.padding, strict=False):
        if kernel == stride > 1 and padding == 0 and side % stride:
            covered = side // stride * stride
            sizes = " or ".join(str(size) for size in (covered, covered + stride) if size)
            raise ValueError(f"its patches of {stride} px leave a border of {side - covered} px unseen, use {sizes} px")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
