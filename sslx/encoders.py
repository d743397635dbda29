"""Encoders: any timm trunk by name, without its classifier, in channels_last."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sslx import checkpoint
from sslx.errors import ConfigError, DataError, MissingInput

SMALL = 64  # pixels: inputs up to here keep their resolution through the stem


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk whose features are pretrained."""

    name: str = "resnet18"
    """Any timm model: resnet18, resnet50, vit_small_patch16_224, ...; timm.list_models() lists them."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """small: a 3x3 stem of stride 1 without max-pool (ResNets only); auto: small for views up to 64 px."""
    weights: str | None = None
    """timm (its own, downloaded), a run folder of sslx, or a .pt, .pth or .safetensors file; None: random."""
    layers: tuple[int, ...] = ()
    """Blocks of each stage, for a ResNet smaller or larger than its name: --encoder.layers 1 1 1 1."""
    channels: tuple[int, ...] = ()
    """Channels of each stage of such a ResNet (before a bottleneck's expansion)."""


class Encoder(nn.Module):
    """A timm trunk with pooled features: (B, 3, H, W) -> (B, dim).  ``trunk`` keeps timm's parameter names."""

    def __init__(self, trunk: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk, self.dim = trunk, dim

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def build(config: Config, size: int, *others: int) -> Encoder:
    """The encoder for views of ``size`` pixels, which takes those of ``others`` pixels, the probes', too.

    Raises ConfigError, MissingInput or DataError in one line.
    """
    import timm  # here: it takes three seconds, and --help and a wrong flag need none of it
    from timm.models.resnet import ResNet

    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ConfigError(f"--encoder.name {config.name!r} is no timm model: {hint}")
    arguments: dict[str, Any] = {"pretrained": config.weights == "timm", "num_classes": 0}
    arguments |= _resnet_arguments(config)
    try:
        try:
            trunk = timm.create_model(config.name, **arguments, img_size=size)
        except TypeError:  # a convolutional trunk, which takes any size
            trunk = timm.create_model(config.name, **arguments)
    except Exception as error:  # timm, its hub and its models raise anything
        what = f"{config.name} with timm's weights" if config.weights == "timm" else config.name
        raise ConfigError(f"cannot build {what} for {size} px: {_first_line(error)}") from error
    stem = config.stem if config.stem != "auto" else ("small" if size <= SMALL else "imagenet")
    if stem == "small" and isinstance(trunk, ResNet):
        _small_stem(trunk)
    elif config.stem == "small":
        raise ConfigError(f"--encoder.stem small is for ResNets, and {config.name} is none: take auto or imagenet")
    dims = [_dim(trunk, pixels, config.name) for pixels in dict.fromkeys((size, *others))]
    encoder = Encoder(trunk, dims[0]).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.weights not in (None, "timm"):
        load_trunk(encoder, Path(config.weights), config.name)
    return encoder


def _resnet_arguments(config: Config) -> dict[str, list[int]]:
    given = {k: list(v) for k, v in (("layers", config.layers), ("channels", config.channels)) if v}
    if not given:
        return {}
    if not config.name.startswith("resnet") or config.name.startswith("resnetv2"):
        raise ConfigError(f"--encoder.{next(iter(given))} shapes a ResNet, and {config.name} is none")
    if any(len(numbers) != 4 or min(numbers) < 1 for numbers in given.values()):
        raise ConfigError("a ResNet has 4 stages: --encoder.layers and --encoder.channels take 4 numbers >= 1 each")
    return given


def _small_stem(resnet: Any) -> None:
    """3x3 convolution of stride 1 and no max-pool: what CIFAR ResNets have (2002.05709, appendix B.9)."""
    resnet.conv1 = nn.Conv2d(3, resnet.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def _dim(trunk: nn.Module, size: int, name: str) -> int:
    was = trunk.training
    try:
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot take views of {size} px: {_first_line(error)}; set --data.size or --data.eval-size"
        ) from error
    finally:
        trunk.train(was)
    if features.ndim != 2:
        raise ConfigError(f"{name} gives features of shape {tuple(features.shape)}, not one vector an image")
    return features.shape[1]


def load_trunk(encoder: Encoder, path: Path, name: str) -> None:
    """Copy trunk weights from a file or an sslx run into the encoder; strict, all names and shapes must match."""
    if not path.exists():
        raise MissingInput(f"--encoder.weights {path} does not exist (or say 'timm' for timm's own weights)")
    if path.is_dir() or (path.parent / "manifest.json").is_file():
        state = checkpoint.load(path)["method"]
        state = {key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")}
    else:
        state = _read_weights(path)
    state = {key.removeprefix("trunk."): value for key, value in state.items()}
    own, classifier = encoder.trunk.state_dict(), ("fc.", "head.", "classifier.")
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    checkpoint.load_weights(encoder.trunk, state, f"--encoder.weights {path} for {name}")


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and safetensors raise anything
        raise DataError(f"{path} is no file of weights that can be trusted: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no weights: expected a dict of tensors by name, or one under 'state_dict'")
    return cast(dict[str, Tensor], state)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
