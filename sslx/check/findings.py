"""What is wrong or unusual about the images of a source, from what was seen of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sslx.check import similar
from sslx.check.images import Looks
from sslx.console.words import plural
from sslx.data.sources import Source

Indices = npt.NDArray[np.int64]
_FEATURELESS = 2.0
"""Standard deviation, of 255 values, below which an image has a single color."""
_FEW = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """Images with a peculiarity.

    name: in a few words.  advice: what it means, or what to do.  indices: the images, by their index in the source.
    excluded: those of them that are better left out.  reasons: a reason for each image, or none.
    """

    name: str
    advice: str
    indices: Sequence[int]
    excluded: Sequence[int] = ()
    reasons: Sequence[str] = ()


def of_images(source: Source, looks: Looks, test: tuple[Source, Looks] | None) -> list[Finding]:
    """Return what was found, the worst first.

    test: the source's test split and what was seen of it, if there is one.
    """
    copies, near = _copies(looks)
    found = [
        Finding(
            name="unreadable",
            advice="a run replaces them, and ends if they are more than --data.max-bad",
            indices=list(looks.unreadable),
            excluded=list(looks.unreadable),
            reasons=list(looks.unreadable.values()),
        ),
        *_in_test(looks, test),
        Finding(
            name="copies, byte by byte",
            advice="all but the first are better left out",
            indices=[i for group in copies for i in group],
            excluded=[i for group in copies for i in group[1:]],
        ),
        Finding(
            name="near copies, by their looks",
            advice="the same picture saved or scaled twice; look at some of them",
            indices=[i for group in near for i in group],
            excluded=[i for group in near for i in group[1:]],
        ),
        *_odd(looks),
        *_few(source, looks),
    ]
    return [finding for finding in found if finding.indices]


def kinds(looks: Looks) -> dict[str, int]:
    """Return the number of images of each kind, the most frequent first."""
    return dict(Counter(looks.kind[looks.readable].tolist()).most_common())


def quantiles(values: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    """Return the smallest, the median and the largest of some values."""
    return int(values.min()), int(np.median(values)), int(values.max())


def _copies(looks: Looks) -> tuple[list[list[int]], list[list[int]]]:
    """Return groups of equal files, and groups of images that look alike, without the copies of a file."""
    _, first, group = np.unique(looks.digest[looks.readable], axis=0, return_index=True, return_inverse=True)
    members = dict[int, list[int]]()
    for index, one in zip(looks.readable.tolist(), group.ravel().tolist(), strict=True):
        members.setdefault(one, []).append(index)
    copies = [rows for rows in members.values() if len(rows) > 1]
    different = np.sort(looks.readable[first])
    different = different[looks.contrast[different] >= _FEATURELESS]
    near = [different[rows].tolist() for rows in similar.groups(looks.hashes[different], looks.thumbnails[different])]
    return copies, near


def _in_test(looks: Looks, test: tuple[Source, Looks] | None) -> list[Finding]:
    if test is None:
        return []
    others = test[1]
    own, theirs = (one.readable[one.contrast[one.readable] >= _FEATURELESS] for one in (looks, others))
    rows = similar.groups(
        np.concatenate([looks.hashes[own], others.hashes[theirs]]),
        np.concatenate([looks.thumbnails[own], others.thumbnails[theirs]]),
    )
    leaked = sorted(
        int(own[row]) for group in rows if any(row >= len(own) for row in group) for row in group if row < len(own)
    )
    return [
        Finding(
            name="also in the test split, or nearly",
            advice="scores on the test split count them as learned: leave them out of training",
            indices=leaked,
            excluded=leaked,
        )
    ]


def _odd(looks: Looks) -> list[Finding]:
    readable = looks.readable
    if not len(readable):
        return []
    width, height = looks.width[readable], looks.height[readable]
    shorter, num_pixels = np.minimum(width, height), width * height
    typical_side, typical_pixels = np.median(shorter), np.median(num_pixels)
    misnamed = (looks.named[readable] != "") & ~np.char.startswith(looks.kind[readable], looks.named[readable])
    featureless = readable[looks.contrast[readable] < _FEATURELESS].tolist()
    tiny = readable[shorter < max(8, typical_side / 4)].tolist()
    return [
        Finding(
            name="a single color", advice="nothing can be learned from them", indices=featureless, excluded=featureless
        ),
        Finding(
            name="tiny",
            advice="a quarter of the usual side or less: their views are blurred",
            indices=tiny,
            excluded=tiny,
        ),
        Finding(
            name="huge",
            advice="16 times the usual pixels or more: each takes as long as 16 others",
            indices=readable[num_pixels >= 16 * typical_pixels].tolist(),
        ),
        Finding(
            name="long and narrow",
            advice="4 times as long as wide or more: crops show little of them",
            indices=readable[np.maximum(width, height) >= 4 * shorter].tolist(),
        ),
        Finding(
            name="another format than their name says",
            advice="they are read as what they are",
            indices=readable[misnamed].tolist(),
            reasons=[f"a {kind}" for kind in looks.kind[readable[misnamed]]],
        ),
    ]


def _few(source: Source, looks: Looks) -> list[Finding]:
    labels, classes = source.facts.labels, source.facts.classes
    if labels is None or classes is None:
        return []
    counts = np.bincount(labels[looks.readable], minlength=len(classes))
    few = np.flatnonzero(counts < _FEW)
    names = [f"class {classes[one]} has {plural(int(counts[one]), 'image')}" for one in few.tolist()]
    indices = [int(np.flatnonzero(labels == one)[0]) for one in few.tolist() if (labels == one).any()]
    return [
        Finding(
            name=f"classes of fewer than {_FEW} images", advice="too few to probe on", indices=indices, reasons=names
        )
    ]
