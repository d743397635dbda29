"""Parameter groups: what weight decay and LARS adaptation apply to."""

from collections.abc import Iterable
from typing import Any

from torch import nn

Groups = list[dict[str, Any]]


def split(module: nn.Module, groups: Iterable[dict[str, Any]] | None = None) -> Groups:
    """Cut every group in two: tensors of two axes or more, and the others (biases, norms, temperatures).

    groups: as for torch's optimizers, or None for all of the module; any other key of a group goes to both
      of its halves.  Parameters that need no gradient are left out, and so are empty halves.
    The second half gets ``weight_decay=0`` and ``adapt=False`` (arXiv 1708.03888 and SimCLR's code: decay and
    LARS pull these towards 0 for nothing).
    """
    given = list(groups) if groups is not None else [{"params": module.parameters()}]
    halves: Groups = []
    for group in given:
        params = [p for p in group["params"] if p.requires_grad]
        decayed, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        halves.append({**group, "params": decayed, "adapt": True})
        halves.append({**group, "params": plain, "adapt": False, "weight_decay": 0.0})
    grouped = {id(p) for half in halves for p in half["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in grouped]
    assert not missing, f"in no parameter group: {', '.join(missing)}"
    return [half for half in halves if half["params"]]
