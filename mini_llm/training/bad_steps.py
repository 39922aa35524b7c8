"""Steps that went wrong: a gradient that is not finite, or a loss that jumps.

A step whose gradient norm is not finite changes nothing under any engine (`engine.optimizer_step`).
What follows is `--bad_step_policy`:

- ``stop``: the run ends there with an error; its checkpoints are untouched.
- ``skip``: the run goes on with the next rows; the step counts as done.
- ``rewind``: the run goes back to its newest checkpoint and on from there with the rows that come
  next, so that it does not meet the same ones again (PaLM, Chowdhery et al. 2022, section 5.1).

With ``--max_loss_jump`` so does a step whose loss lies that far above the mean of the last ones.
It has been made when that is known, so it cannot be skipped.
"""

import math
from collections import deque

import torch
from accelerate import Accelerator

from .arguments import RunArguments

LAST_LOSSES = 50
FEWEST_LOSSES = 10
MOST_REWINDS = 10


class BadSteps:
    """Finds the bad steps of a run and counts them."""

    def __init__(self, args: RunArguments, accelerator: Accelerator) -> None:
        self.policy = args.bad_step_policy
        self.count = 0
        self.rewinds = 0
        self._max_jump = args.max_loss_jump
        self._accelerator = accelerator
        self._losses: deque[float] = deque(maxlen=LAST_LOSSES)

    def fault(self, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> str | None:
        """What is wrong with the step, None as a rule; the same on all ranks.

        ``loss`` is this rank's share of the step's loss; it is summed over ranks, and so read from
        the device, only where jumps are looked for.
        """
        if not math.isfinite(grad_norm):
            self.count += 1
            return f"its gradient norm is {float(grad_norm)}"
        if not self._max_jump:
            return None
        value = float(self._accelerator.reduce(loss, "sum"))
        mean = sum(self._losses) / len(self._losses) if self._losses else value
        if len(self._losses) >= FEWEST_LOSSES and value - mean > self._max_jump:
            self.count += 1
            return f"its loss {value:.3f} is {value - mean:.3f} above the mean of the last ones"
        self._losses.append(value)
        return None

    def rewind(self) -> None:
        """Count a rewind; RuntimeError when there have been so many that nothing is gained."""
        self.rewinds += 1
        self._losses.clear()
        if self.rewinds > MOST_REWINDS:
            raise RuntimeError(
                f"the run was rewound {MOST_REWINDS} times; lower --learning_rate or mend the data"
            )

    def state_dict(self) -> dict[str, int]:
        """Counts to save in a checkpoint."""
        return {"count": self.count, "rewinds": self.rewinds}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint's counts."""
        self.count, self.rewinds = state["count"], state["rewinds"]
