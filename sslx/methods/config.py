"""The settings that methods share.  Does not import torch, so that flags and help are fast."""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from sslx.data.augment import Augment
from sslx.errors import ConfigError

if TYPE_CHECKING:
    from sslx.data.facts import Facts
    from sslx.data.views import Inputs, ViewSpec
    from sslx.encoders import Encoder
    from sslx.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """A moving average of the encoder, which any run can keep beside it."""

    momentum: float | None = None
    """Share of the average that a step keeps, such as 0.999.  Probes measure it, too.  Default: no average."""

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 < self.momentum < 1:
            raise ConfigError(f"--average.momentum must be above 0 and below 1, such as 0.999, not {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The base of every method's ``Config``, which adds the method's name and numbers.

    The names of widths end in ``_dim``, and that of a queue is ``queue_size``: ``sslx verify`` and the contract test
    set those to small numbers.
    """

    encoders: ClassVar[tuple[Literal["resnet", "vit"], ...]] = ("resnet",)
    """The kinds of encoder that ``sslx verify`` and the tests train the method with."""
    num_views: ClassVar[int] = 2
    """The number of the recipe's views that ``inputs`` returns."""
    exported_name: ClassVar[str] = ""
    """A description of ``Method.exported``, if that is not the encoder that is trained."""

    name: str
    """Method to train with.  sslx methods describes all of them."""

    def __post_init__(self) -> None:
        self.require(*(field.name for field in fields(self) if field.name.endswith("_dim")), least=1)

    def require(
        self,
        *names: str,
        above: float = -math.inf,
        below: float = math.inf,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> None:
        """Raise ConfigError unless each of these fields is a finite number > above, < below, >= least and <= most."""
        for name in names:
            value: float = getattr(self, name)
            if not (above < value < below and least <= value <= most and math.isfinite(value)):
                bounds = {">": above, ">=": least, "<": below, "<=": most}
                words = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
                flag = f"--method.{name.replace('_', '-')}"
                raise ConfigError(f"{self.name} needs {name} {words}, got {value}: change {flag}")

    def check(self, batch_size: int, facts: "Facts") -> None:
        """Raise ConfigError if the method cannot train; called when only the source is built.

        batch_size: the samples of one loss, over all ranks.  facts: those of the training images.
        """
        del facts
        if batch_size < 2:
            raise ConfigError(f"batch norm and negatives need 2 samples or more, got a batch of {batch_size}")

    def inputs(self, augment: Augment, size: int) -> "Inputs":
        """Return the views that the loader makes of an image: ``num_views`` of the recipe's, unless overridden.

        size: the side of full-size views in pixels.
        """
        from sslx.data.views import Inputs, ViewSpec  # here: it imports torch

        return Inputs(views=(ViewSpec(size=size, augment=augment),) * self.num_views)

    def build(self, encoder: "Encoder") -> "Method":
        """Return the method around an encoder, with new heads.  Use ``methods.build``, which also sets the norms."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SecondViewConfig(MethodConfig):
    """Settings of methods whose second view has its own blur and solarization (arXiv 2006.07733, table 6)."""

    second_blur: float = 0.1
    """Probability of blur in the second view; the first view uses the recipe's, which is 1 in the paper."""
    second_solarize: float = 0.2
    """Probability of solarization in the second view; other views use the recipe's, which is 0 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("second_blur", "second_solarize", least=0, most=1)

    def inputs(self, augment: Augment, size: int) -> "Inputs":
        """Return one view of the recipe, and one with the second view's blur and solarization."""
        from sslx.data.views import Inputs, ViewSpec  # here: it imports torch

        second = replace(augment, blur=self.second_blur, solarize=self.second_solarize)
        return Inputs(views=(ViewSpec(size=size, augment=augment), ViewSpec(size=size, augment=second)))


@dataclass(frozen=True, kw_only=True)
class MultiCropConfig(MethodConfig):
    """Settings of methods with small, local views beside the two global ones (arXiv 2006.09882, section 3.2)."""

    num_local: int
    """Local views of each image; with 0, only the two global views are left."""
    local_size: int | None = None
    """Side of the local views in pixels; by default the multiple of 8 that is nearest to 96/224 of a global view's."""
    local_min_scale: float = 0.05
    """Smallest fraction of the image's area that a local view may cover."""
    local_max_scale: float
    """Largest fraction of the image's area that a local view may cover."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_local", least=0)
        self.require("local_min_scale", "local_max_scale", above=0, most=1)
        self.require("local_min_scale", most=self.local_max_scale)
        if self.local_size is not None:
            self.require("local_size", least=1)

    def inputs(self, augment: Augment, size: int) -> "Inputs":
        """Return the two global views, then the local ones."""
        from sslx.data.views import Inputs  # here: it imports torch

        return Inputs(views=(*super().inputs(augment, size).views, *self.local_views(augment, size)))

    def local_views(self, augment: Augment, size: int) -> "tuple[ViewSpec, ...]":
        """Return the local views for global ones of ``size`` pixels: the recipe's, with smaller crops."""
        from sslx.data.views import ViewSpec  # here: it imports torch

        local = replace(augment, min_scale=self.local_min_scale, max_scale=self.local_max_scale)
        pixels = self.local_size or max(8, 8 * round(size * 96 / 224 / 8))
        return (ViewSpec(size=pixels, augment=local),) * self.num_local
