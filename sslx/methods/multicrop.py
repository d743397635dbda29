"""Multi-crop: beside views of full size, small ones of small parts of the image (arXiv 2006.09882, 3.2)."""

from dataclasses import replace

from sslx.data.augment import Augment
from sslx.data.views import ViewSpec


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
