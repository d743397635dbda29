"""Masks: which patches of an image are seen and which are predicted, drawn on the host for each sample."""

import numpy as np
import numpy.typing as npt

from sslx.data.draws import Draws

Places = npt.NDArray[np.int64]


def random(draws: Draws, num_patches: int, num_visible: int) -> tuple[Places, Places]:
    """Return the places of visible (B, num_visible) and masked patches (B, num_patches - num_visible).

    Places are counted row by row from 0.  Every choice of visible patches is equally likely, independent of other
    samples (MAE, arXiv 2111.06377, section 3).
    """
    places = draws.per_sample(num_patches).argsort(axis=1, kind="stable")
    return places[:, :num_visible], places[:, num_visible:]
