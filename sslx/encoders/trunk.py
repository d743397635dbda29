"""Trunks: a timm model as a recipe describes it, without its classifier."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sslx.encoders import norms
from sslx.encoders.config import Config
from sslx.encoders.recipe import Recipe
from sslx.errors import ConfigError

SMALL = 64  # pixels: inputs up to here keep their resolution through the stem


def check_name(name: str) -> None:
    """Raise ConfigError for a name that no model of timm has."""
    import timm  # here: see encoders.build

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ConfigError(f"--encoder.name {name!r} is not a timm model: {hint}")


def arguments(config: Config) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that the shape of the encoder asks for, all but its image size.

    ConfigError for a shape that no such model has.
    """
    return _vit_arguments(config) if is_plain_vit(config.name) else _resnet_arguments(config)


def _vit_arguments(config: Config) -> dict[str, int]:
    shape: dict[str, int] = {} if config.patch is None else {"patch_size": config.patch}
    if any(len(numbers) > 1 for numbers in (config.layers, config.channels)):
        raise ConfigError("a ViT has one stage: --encoder.layers and --encoder.channels take one number each")
    for depth in config.layers:
        shape["depth"] = depth
    for width in config.channels:
        heads = max(1, width // 64)  # of 64 dimensions each, as in ViTs of all sizes (arXiv 2010.11929, table 1)
        if width % (4 * heads):
            raise ConfigError(f"the width of a ViT must be a multiple of 4 x its heads (one head per 64), got {width}")
        shape |= {"embed_dim": width, "num_heads": heads}
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
    if (
        config.stem == "narrow"
    ):  # of timm's stems only the deep ones have a width; _small_stem replaces the convolutions
        return {**shape, "stem_type": "deep", "stem_width": shape.get("channels", [64])[0] // 2}
    return shape


def is_plain_vit(name: str) -> bool:
    """Whether a timm model's patches, depth, width and image sizes can be set: of its vit_* and deit_*."""
    from timm.models import is_model_in_modules  # here: see encoders.build

    return is_model_in_modules(name.partition(".")[0], ["vision_transformer", "deit"])


def with_sizes(recipe: Recipe, others: Sequence[int]) -> Recipe:
    """The recipe of an encoder that takes views of these sizes too: a ViT then interpolates position embeddings."""
    if is_plain_vit(recipe.name) and set(others) - {recipe.size}:
        return replace(recipe, arguments={**recipe.arguments, "dynamic_img_size": True})
    return recipe


def create(recipe: Recipe, *, pretrained: bool = False) -> tuple[nn.Module, Recipe]:
    """timm's model with timm's stem and norms, and the recipe as the model takes it: many take no ``img_size``.

    pretrained: whether timm loads (and downloads) its own weights.  ConfigError where timm cannot build it.
    """
    try:
        try:
            return _model(recipe, pretrained), recipe
        except TypeError:  # a convolutional trunk, which takes any size
            others = {name: value for name, value in recipe.arguments.items() if name != "img_size"}
            recipe = replace(recipe, arguments=others)
            return _model(recipe, pretrained), recipe
    except Exception as error:  # timm, its hub and its models raise anything
        what, hint = recipe.name, ""
        if pretrained:
            what += " with timm's weights"
            hint = "; where there is no internet, download them elsewhere and give the file as --encoder.weights FILE"
        raise ConfigError(f"cannot build {what} for {recipe.size} px: {_first_line(error)}{hint}") from error


def _model(recipe: Recipe, pretrained: bool) -> nn.Module:
    import timm  # here: see encoders.build

    return timm.create_model(
        recipe.name, pretrained=pretrained, num_classes=0, in_chans=recipe.channels, **recipe.arguments
    )


def with_stem(recipe: Recipe, config: Config, trunk: nn.Module) -> Recipe:
    """The recipe with the stem that the config asks for, or else one that suits the size of the views."""
    if config.stem != "auto":
        return replace(recipe, stem=config.stem)
    return replace(recipe, stem="small" if _is_resnet(trunk) and recipe.size <= SMALL else "imagenet")


def complete(trunk: nn.Module, recipe: Recipe) -> nn.Module:
    """The trunk with the recipe's stem and norms in place of timm's; ConfigError where it has no such stem."""
    if recipe.stem != "imagenet":
        if not _is_resnet(trunk):
            raise ConfigError(
                f"--encoder.stem {recipe.stem} applies to ResNets; {recipe.name} is not one: take auto or imagenet"
            )
        _small_stem(trunk, recipe.channels)
    return norms.replace(trunk, recipe.norm)


def _is_resnet(trunk: nn.Module) -> bool:
    from timm.models.resnet import ResNet  # here: see encoders.build

    return isinstance(trunk, ResNet)


def _small_stem(resnet: Any, channels: int) -> None:
    """3x3 convolution of stride 1 and no max-pool: what CIFAR ResNets have (2002.05709, appendix B.9)."""
    resnet.conv1 = nn.Conv2d(channels, resnet.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def dim(trunk: nn.Module, size: int, channels: int, name: str) -> int:
    """The length of an image's features, by trying; ConfigError where the trunk does not take all of the image."""
    was = trunk.training
    image = torch.zeros(1, channels, size, size)

    def refuse_a_border(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape == image.shape:
            _refuse_a_border(module, size)

    handles = [
        module.register_forward_pre_hook(refuse_a_border) for module in trunk.modules() if isinstance(module, nn.Conv2d)
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
        trunk.train(was)
        for handle in handles:
            handle.remove()
    if features.ndim != 2:
        raise ConfigError(f"{name} gives features of shape {tuple(features.shape)}, not one vector an image")
    return features.shape[1]


def _refuse_a_border(module: nn.Module, side: int) -> None:
    """Before a convolution of the image: patches that do not overlap must fill it, or its border is never looked at."""
    assert isinstance(module, nn.Conv2d)
    for kernel, stride, padding in zip(module.kernel_size, module.stride, module.padding, strict=False):
        if kernel == stride > 1 and padding == 0 and side % stride:
            least = side // stride * stride
            nearest = " or ".join(str(pixels) for pixels in (least, least + stride) if pixels)
            raise ValueError(f"its patches of {stride} px leave {side - least} px at the border unseen, take {nearest}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
