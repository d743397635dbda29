"""Small encoders, methods and batches of them, and what a Config refuses."""

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslx import encoders, methods, rng
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.facts import Facts
from sslx.data.views import Augment, ViewSpec
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods.base import Method
from sslx.methods.config import MethodConfig
from sslx.train.verify import narrow

SIZE = 16
RESNET = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
VIT = encoders.Config(name="vit_tiny_patch16_224", patch=4, layers=(2,), channels=(16,))
ENCODERS = {"resnet": RESNET, "vit": VIT}
CASES = [(name, encoder) for name in methods.available() for encoder in methods.encoders(name)]
"""Every method with each kind of encoder that it is tested with."""
UNLABELED = Facts(num_samples=100, size=SIZE)
LABELED = Facts(num_samples=100, size=SIZE, labels=np.arange(100) % 2, classes=("a", "b"))
AnyMethod = TypeVar("AnyMethod", bound=Method)


def specs(config: MethodConfig) -> tuple[ViewSpec, ...]:
    return config.inputs(Augment(), SIZE).views


def build(config: MethodConfig, trunk: encoders.Config = RESNET, seed: int = 0) -> Any:
    """The method around a small encoder, in fp32."""
    rng.seed_torch(seed)
    return config.build(encoders.build(trunk, SIZE, *(spec.size for spec in specs(config))))


def narrowed(name: str, encoder: str, seed: int = 0) -> Any:
    """A method by its name, with narrow heads."""
    return build(narrow(methods.module(name).Config()), ENCODERS[encoder], seed)


def identity(dim: int = 16) -> Encoder:
    """An encoder that does nothing, for tests of heads and losses."""
    return Encoder(nn.Identity(), dim, encoders.Recipe(name="identity", size=SIZE))


class Pixels(Encoder):
    """An encoder whose features are the pixels, and which keeps what it was given."""

    def __init__(self, dim: int, size: int = SIZE) -> None:
        super().__init__(nn.Flatten(), dim, encoders.Recipe(name="pixels", size=size))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


def at(method: AnyMethod, progress: float) -> AnyMethod:
    """The method, at this progress of its training."""
    method.progress.fill_(progress)
    return method


def drawn(method: Method, num: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What the loader would bring for ``num`` samples, of a fresh seed."""
    seed = int(torch.randint(1 << 30, (), generator=generator))
    return tuple(map(torch.from_numpy, method.draw(Draws(seed=seed, epoch=1, batch=2, index=np.arange(num)))))


def batch(method: Any, generator: torch.Generator, num: int = 6) -> Batch:
    """Noise for the method's views, in its dtype, with two samples of each label."""
    dtype = next(method.parameters()).dtype
    sizes = [spec.size for spec in specs(method.config)]
    views = tuple(torch.randn(num, 3, size, size, generator=generator, dtype=dtype) for size in sizes)
    return Batch(views, torch.arange(num) // 2, torch.arange(num), drawn(method, num, generator))


def part(images: Batch, rows: slice) -> Batch:
    """Some of the samples of a batch."""
    label = None if images.label is None else images.label[rows]
    views, draws = (tuple(tensor[rows] for tensor in tensors) for tensors in (images.views, images.draws))
    return Batch(views, label, images.index[rows], draws)


def linear_widths(head: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of each linear layer."""
    return [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]


def move_randomly(parameters: Iterator[nn.Parameter], generator: torch.Generator) -> None:
    """Make weights others than those that they follow."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 10


def refuses(kind: type[MethodConfig], **wrong: tuple[float, ...]) -> None:
    """Check that each of these values is refused in one line, which names the method, the field and the value."""
    name = kind().name  # pyright: ignore[reportCallIssue]
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(ConfigError, match=rf"^{name} needs [^\n]*{field}[^\n]*{value}[^\n]*$"):
                kind(**{field: value})  # pyright: ignore[reportArgumentType]
