"""Schedules for learning rates, momentum and temperatures, as pure functions of progress in [0, 1]."""

import math


def cosine(progress: float, start: float, end: float) -> float:
    """Return a value that goes from ``start`` at progress 0 to ``end`` at progress 1 along half a cosine.

    Progress outside [0, 1] gives the value at the nearer end.  Sources: arXiv 1608.03983, equation 5, with one cycle;
    the momentum of BYOL, arXiv 2006.07733 §3.1.
    """
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(progress: float, *, warmup: float, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: linear from 0 to 1, then along half a cosine to ``final``.

    warmup: fraction of training that the linear part takes, in [0, 1].  final: the factor at the end, in [0, 1].
    This is SimCLR's schedule (arXiv 2002.05709 §2.2: warm-up in 10 of 100 epochs, then a cosine without restarts).
    """
    if progress < warmup:
        return max(progress, 0.0) / warmup
    return cosine((progress - warmup) / (1 - warmup), 1.0, final) if warmup < 1 else 1.0
