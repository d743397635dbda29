"""AdamW that starts to count the steps of an initially frozen parameter at its first gradient."""

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
    """Return torch's fused AdamW (arXiv 1711.05101), in which ``late`` parameters start when they thaw.

    late: parameters whose gradient is zero at first, because they are frozen.  AdamW would count those steps, so its
      bias correction would be used up at the thaw while the second moment is still near 0, and the first steps would
      be several times too long.  Published code avoids this with a gradient of None, but that needs a decision on the
      host, and DDP would wait for the gradient.  Here the count goes back to 0 after each step that leaves the second
      moment at 0.  The device decides that, without a host sync.
    """
    # foreach=True would read back every parameter's step counter, one by one, on a CPU.
    optimizer = torch.optim.AdamW(params, lr, betas=betas, weight_decay=weight_decay, fused=True)
    late_parameters = tuple(late)

    def restart_count(*_: object) -> None:
        for parameter in late_parameters:
            state: dict[str, Tensor] = optimizer.state[parameter]
            if state:
                state["step"].mul_(state["exp_avg_sq"].any())

    if late_parameters:
        optimizer.register_step_post_hook(restart_count)
    return optimizer
