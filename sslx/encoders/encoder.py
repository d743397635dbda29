"""Encoders: any timm trunk by name, without its classifier, in channels_last."""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sslx.console import activity
from sslx.encoders import weights
from sslx.encoders.config import Config
from sslx.encoders.group_norm import group_norm
from sslx.errors import ConfigError
from sslx.machine import onednn

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SMALL = 64  # pixels: inputs up to here keep their resolution through the stem


class Encoder(nn.Module):
    """A timm trunk with pooled features: (B, 3, H, W) -> (B, dim).  ``trunk`` keeps timm's parameter names.

    size: the side of the views it was built for, in pixels.
    """

    def __init__(self, trunk: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        self.trunk, self.dim, self.size = trunk, dim, size

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def vit(self, what: str) -> "VisionTransformer":
        """The trunk, where it is a plain ViT with a class token; else ConfigError for ``what``, which needs one."""
        from timm.models.vision_transformer import VisionTransformer

        trunk = self.trunk
        if not isinstance(trunk, VisionTransformer) or trunk.cls_token is None or trunk.num_prefix_tokens != 1:
            raise ConfigError(
                f"{what} needs a ViT with a class token, not {type(trunk).__name__}: take --encoder.name "
                "vit_small_patch16_224 (--encoder.patch 4 for images of 32 px)"
            )
        return trunk


@activity.doing("building the encoder")
def build(
    config: Config,
    size: int,
    *others: int,
    norm: Literal["batch", "group"] = "batch",
    say: Callable[[str], None] = lambda _: None,
) -> Encoder:
    """The encoder for views of ``size`` pixels, which takes those of ``others``, small crops' and probes', too.

    A ViT interpolates its position embeddings for those.  norm: "group" puts group norms in the place of batch norms,
    before weights are loaded.  say: told what was loaded from a file.
    Raises ConfigError, MissingInput or DataError in one line.
    """
    import timm  # here: it takes three seconds, and --help and a wrong flag need none of it
    from timm.models.resnet import ResNet

    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ConfigError(f"--encoder.name {config.name!r} is not a timm model: {hint}")
    arguments: dict[str, Any] = {"pretrained": config.weights == "timm", "num_classes": 0}
    vit = is_plain_vit(config.name)
    arguments |= _vit_arguments(config) if vit else _resnet_arguments(config)
    sizes = dict.fromkeys((size, *others))
    if vit and len(sizes) > 1:
        arguments["dynamic_img_size"] = True
    try:
        try:
            trunk = timm.create_model(config.name, **arguments, img_size=size)
        except TypeError:  # a convolutional trunk, which takes any size
            trunk = timm.create_model(config.name, **arguments)
    except Exception as error:  # timm, its hub and its models raise anything
        what, hint = config.name, ""
        if config.weights == "timm":
            what += " with timm's weights"
            hint = "; where there is no internet, download them elsewhere and give the file as --encoder.weights FILE"
        raise ConfigError(f"cannot build {what} for {size} px: {_first_line(error)}{hint}") from error
    stem = config.stem if config.stem != "auto" else ("small" if size <= SMALL else "imagenet")
    if stem in ("small", "narrow") and isinstance(trunk, ResNet):
        _small_stem(trunk)
        if config.weights == "timm":
            say(f"--encoder.weights timm: all but conv1, new in a {stem} stem (--encoder.stem imagenet keeps it)")
    elif config.stem in ("small", "narrow"):
        raise ConfigError(
            f"--encoder.stem {config.stem} is for ResNets, and {config.name} is none: take auto or imagenet"
        )
    if norm == "group":
        trunk = group_norm(trunk)
    dims = [_dim(trunk, pixels, config.name) for pixels in sizes]
    encoder = Encoder(trunk, dims[0], size).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    onednn.keep_out(encoder)
    if config.weights is not None and config.weights != "timm":
        say(weights.load(encoder.trunk, config.weights, config.name, config.weights_part))
    return encoder


def is_plain_vit(name: str) -> bool:
    """Whether a timm model's patches, depth, width and image sizes can be set: of its vit_* and deit_*."""
    from timm.models import is_model_in_modules  # here: see build

    return is_model_in_modules(name.partition(".")[0], ["vision_transformer", "deit"])


def _vit_arguments(config: Config) -> dict[str, int]:
    given: dict[str, int] = {} if config.patch is None else {"patch_size": config.patch}
    if any(len(numbers) > 1 for numbers in (config.layers, config.channels)):
        raise ConfigError("a ViT has one stage: --encoder.layers and --encoder.channels take one number each")
    for depth in config.layers:
        given["depth"] = depth
    for width in config.channels:
        heads = max(1, width // 64)  # of 64 dimensions each, as in ViTs of all sizes (arXiv 2010.11929, table 1)
        if width % (4 * heads):
            raise ConfigError(f"a ViT's width is a multiple of 4 x its heads, one for each 64 of it, not {width}")
        given |= {"embed_dim": width, "num_heads": heads}
    if min(given.values(), default=1) < 1:
        raise ConfigError("--encoder.patch, --encoder.layers and --encoder.channels must be at least 1")
    return given


def _resnet_arguments(config: Config) -> dict[str, Any]:
    if config.patch is not None:
        raise ConfigError(f"--encoder.patch is of timm's vit_* and deit_* models, and {config.name} is none of those")
    given = {k: list(v) for k, v in (("layers", config.layers), ("channels", config.channels)) if v}
    if not given:
        return {}
    if not config.name.startswith("resnet") or config.name.startswith("resnetv2"):
        raise ConfigError(f"--encoder.{next(iter(given))} shapes a ResNet, and {config.name} is none")
    four = all(len(numbers) == 4 and min(numbers) >= 0 and numbers[-1] > 0 for numbers in given.values())
    if not four or 0 in config.channels:
        raise ConfigError(
            "a ResNet has 4 stages: --encoder.layers and --encoder.channels take 4 numbers >= 1 each "
            "(layers of 0: a stage less, but not the last)"
        )
    if (
        config.stem == "narrow"
    ):  # of timm's stems only the deep ones have a width; _small_stem replaces the convolutions
        return {**given, "stem_type": "deep", "stem_width": given.get("channels", [64])[0] // 2}
    return given


def _small_stem(resnet: Any) -> None:
    """3x3 convolution of stride 1 and no max-pool: what CIFAR ResNets have (2002.05709, appendix B.9)."""
    resnet.conv1 = nn.Conv2d(3, resnet.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def _dim(trunk: nn.Module, size: int, name: str) -> int:
    """The length of an image's features, by trying; ConfigError where the trunk does not take all of the image."""
    was = trunk.training
    handles = [
        module.register_forward_pre_hook(_refuse_a_border)
        for module in trunk.modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    ]
    try:
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, 3, size, size))
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


def _refuse_a_border(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a convolution of the image: patches that do not overlap must fill it, or its border is never looked at."""
    assert isinstance(module, nn.Conv2d)
    for side, kernel, stride, padding in zip(
        inputs[0].shape[2:], module.kernel_size, module.stride, module.padding, strict=False
    ):
        if kernel == stride > 1 and padding == 0 and side % stride:
            least = side // stride * stride
            nearest = " or ".join(str(pixels) for pixels in (least, least + stride) if pixels)
            raise ValueError(f"its patches of {stride} px leave {side - least} px at the border unseen, take {nearest}")


def takes(encoder: Encoder, size: int) -> bool:
    """Whether the encoder, on the CPU, makes features of images of ``size`` pixels; a ViT of another size does not."""
    try:
        return _dim(encoder.trunk, size, type(encoder.trunk).__name__) == encoder.dim
    except ConfigError:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
