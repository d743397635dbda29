"""AdamW that starts to count a parameter's steps when its first gradient comes."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (arXiv 1711.05101), in which ``late`` parameters start when they thaw.

    late: parameters whose gradient is zero at first, because they are frozen.  AdamW would count those steps, so that
      of its bias correction nothing is left at the thaw, while the second moment is still near 0: the first steps
      would be several times too long.  Published code avoids it by a gradient of None, which is the host's to decide
      and for which DDP would wait.  Here the count goes back to 0 after each step in which the second moment is still
      0; that is decided on the device, and nothing waits for it.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        late: Iterable[Tensor] = (),
    ) -> None:
        # Not foreach: on a CPU it reads every parameter's step counter back, one by one.
        super().__init__(params, lr, betas=betas, weight_decay=weight_decay, fused=True)
        self._late = tuple(late)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; closure as in torch's optimizers."""
        loss = super().step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for parameter in self._late:
            state = self.state.get(parameter)
            if state:
                state["step"].mul_(state["exp_avg_sq"].any())
        return loss
