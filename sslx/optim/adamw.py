"""AdamW that starts to count a frozen parameter's steps when its first gradient comes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def adamw(
    params: Iterable[dict[str, Any]],
    lr: float,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    late: Iterable[Tensor] = (),
) -> torch.optim.AdamW:
    """torch's fused AdamW (arXiv 1711.05101), in which ``late`` parameters start when they thaw.

    late: parameters whose gradient is zero at first, because they are frozen.  AdamW would count those steps, so that
      of its bias correction nothing is left at the thaw, while the second moment is still near 0: the first steps
      would be several times too long.  Published code avoids it by a gradient of None, which is the host's to decide
      and for which DDP would wait.  Here the count goes back to 0 after each step in which the second moment is still
      0; that is decided on the device, and nothing waits for it.
    """
    # Not foreach: on a CPU it reads every parameter's step counter back, one by one.
    optimizer = torch.optim.AdamW(params, lr, betas=betas, weight_decay=weight_decay, fused=True)
    frozen_at_first = tuple(late)

    def restart_count(*_: object) -> None:
        for parameter in frozen_at_first:
            state: dict[str, Tensor] = optimizer.state[parameter]
            if state:
                state["step"].mul_(state["exp_avg_sq"].any())

    if frozen_at_first:
        optimizer.register_step_post_hook(restart_count)
    return optimizer
