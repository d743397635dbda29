"""Multi-crop: beside views of full size, small ones of small parts of the image (arXiv 2006.09882, 3.2)."""

from dataclasses import replace

from sslx.data.views import Augment, ViewSpec
from sslx.errors import ConfigError


def local_views(
    augment: Augment,
    size: int,
    num_local: int,
    local_size: int | None,
    local_min_scale: float,
    local_max_scale: float,
) -> tuple[ViewSpec, ...]:
    """``num_local`` views of ``local_size`` pixels by the recipe, but for the share of the image that a crop covers.

    size: of the global views.  local_size: None for the paper's 96 of 224, as a share of ``size``: the nearest multiple
    of 8, at least 8.
    """
    pixels = local_size or max(8, 8 * round(size * 96 / 224 / 8))
    local = replace(augment, min_scale=local_min_scale, max_scale=local_max_scale)
    return (ViewSpec(size=pixels, augment=local),) * num_local


def check(
    num_local: int, local_size: int | None, local_min_scale: float, local_max_scale: float, method_name: str
) -> None:
    """Raise ConfigError for numbers that make no local views; 0 of them are fine."""
    if num_local < 0 or (local_size is not None and local_size < 1):
        raise ConfigError(f"{method_name} needs num_local >= 0 and local_size >= 1, got {num_local} and {local_size}")
    if not 0 < local_min_scale <= local_max_scale <= 1:
        got = f"got {local_min_scale} and {local_max_scale}"
        raise ConfigError(f"{method_name} needs 0 < local_min_scale <= local_max_scale <= 1, {got}")
