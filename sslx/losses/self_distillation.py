"""Cross-entropy between a teacher's distributions of some views and a student's of all others (arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def self_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy of each teacher's view with each other student's view (arXiv 2104.14294, equation 3).

    Deviation from equation 3, as in the paper's code: the mean over pairs of views, not their sum.  Log-probabilities
    are summed over views once, and each teacher's own view is subtracted, so that no pair needs a (B, K) matrix.

    student: V logits (B, K), of any float dtype; teacher: probabilities (B, K) of the first T of these views, without
      a gradient.  Computed in fp32 (fp64 for fp64), in autocast too.
    temperature: of the student's softmax, positive.
    Returns the mean over this rank's B samples and the T (V - 1) pairs, a scalar.  For equal B, the mean over ranks
    of the loss and of every parameter gradient is the full batch's.
    Raises ValueError for invalid shapes, dtypes, numbers of views or temperature.
    """
    shapes = [tuple(z.shape) for z in (*student, *teacher)]
    if not 1 <= len(teacher) <= len(student) or len(student) < 2:
        raise ValueError(
            f"expected 2 views or more, and 1 of them or more of the teacher, got {len(student)} and {len(teacher)}"
        )
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"expected logits and probabilities of one shape (B, K), got {', '.join(map(str, shapes))}")
    if not all(z.is_floating_point() for z in (*student, *teacher)):
        raise ValueError(f"expected logits and probabilities of floats, got {student[0].dtype} and {teacher[0].dtype}")
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    logs = [F.log_softmax(z.to(dtype) / temperature, dim=1) for z in student]
    total = sum(logs[1:], logs[0])
    pairs = [-(p.detach() * (total - own)).sum(1).mean() for p, own in zip(teacher, logs, strict=False)]
    return torch.stack(pairs).sum() / (len(teacher) * (len(student) - 1))
