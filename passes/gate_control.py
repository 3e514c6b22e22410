"""Training a delete gate to a rate: the regulariser's weight follows the share of tokens that the gate deletes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ElisionError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GateController:
    """A proportional-integral controller of the deletion rate (Kallini et al., MrT5, ICLR 2025).

    Every step, with `rate` the share of tokens whose gate is below `threshold`, and e = target - rate:

        p <- 0.9 p + 0.1 kp e,   i <- i + ki e,   alpha = max(0, p + i)

    and alpha times the mean of the gate is added to the loss. `target`: the share to delete, 0 to 1. `threshold`: half
    of the gate's lower end k. kp and ki default to the paper's, which are for thousands of steps."""

    target: float
    threshold: float = -15.0
    kp: float = 0.5
    ki: float = 1e-5
    alpha: float = field(default=0.0, init=False)
    rate: float = field(default=0.0, init=False)
    proportional: float = field(default=0.0, init=False)
    integral: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise ElisionError(f"target is a share of the tokens, from 0 to 1, not {self.target}")

    def __call__(self, gate: Tensor, mask: Tensor | None = None) -> Tensor:
        """One step. gate [B, N] of a soft graph, mask [B, N] (other than 0: no padding) -> what to add to the loss, a
        scalar with gradients in the gate. Raises ElisionError where the mask leaves nothing."""
        real = gate.new_ones(gate.shape) if mask is None else (mask != 0).to(gate.dtype).expand(gate.shape)
        count = float(real.sum())
        if not count:
            raise ElisionError("the mask leaves no token")
        self.step(float(((gate.detach() < self.threshold).to(gate.dtype) * real).sum()) / count)
        return self.alpha * (gate * real).sum() / count

    def step(self, rate: float) -> float:
        """Take in the share of tokens that was deleted; the new alpha."""
        error = self.target - rate
        self.rate = rate
        self.proportional = 0.9 * self.proportional + 0.1 * self.kp * error
        self.integral += self.ki * error
        self.alpha = max(0.0, self.proportional + self.integral)
        return self.alpha
