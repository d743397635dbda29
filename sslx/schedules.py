"""Schedules of learning rate, momentum and temperature: pure functions of progress in [0, 1]."""

import math


def cosine(progress: float, start: float, end: float) -> float:
    """From start at progress 0 to end at progress 1 along half a cosine (arXiv 1608.03983, equation 5, one
    cycle; BYOL's momentum, arXiv 2006.07733 §3.1).  Progress outside [0, 1] gives the nearer end."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(progress: float, *, warmup: float, final: float = 0.0) -> float:
    """A factor of the peak learning rate: 0 to 1 in a line, then along half a cosine to ``final``.

    warmup: share of training that the line takes, in [0, 1].  final: the factor at the end, in [0, 1].
    As SimCLR's (arXiv 2002.05709 §2.2: warm-up in 10 of 100 epochs, then cosine without restarts).
    """
    if progress < warmup:
        return max(progress, 0.0) / warmup
    return cosine((progress - warmup) / (1 - warmup), 1.0, final) if warmup < 1 else 1.0
