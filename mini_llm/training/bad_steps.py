"""Steps that went wrong: a gradient that is not finite, or a loss that jumps.

A step whose gradient norm is not finite changes nothing under any engine (`engine.optimizer_step`).
What follows is `--bad_step_policy`:

- ``stop``: the run ends there with an error; its checkpoints are untouched.
- ``skip``: the run goes on with the next rows; the step counts as done.
- ``rewind``: the run goes back to its newest checkpoint and on from there with the rows that come
  next, so that it does not meet the same ones again (PaLM, Chowdhery et al. 2022, section 5.1).

With ``--max_loss_jump`` so does a step whose loss lies that far above the mean of the last ones.
It has been made when that is known, so it cannot be skipped.

On a GPU the host learns what is wrong with a step while the next one is computed, or at once where
it waits for the device anyway, to log or to save: so no checkpoint is written before it is known.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from mini_llm.parallel.transfer import OnTheWay

from .arguments import RunArguments

LAST_LOSSES = 50
FEWEST_LOSSES = 10
MOST_REWINDS = 10


@dataclass(frozen=True)
class Fault:
    """What went wrong with which step."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step} went wrong: {self.reason}"


class BadSteps:
    """Finds the bad steps of a run and counts them."""

    def __init__(self, args: RunArguments, accelerator: Accelerator) -> None:
        self.policy = args.bad_step_policy
        self.count = 0
        self.rewinds = 0
        self._max_jump = args.max_loss_jump
        self._accelerator = accelerator
        self._losses: deque[float] = deque(maxlen=LAST_LOSSES)
        self._steps: deque[tuple[int, OnTheWay]] = deque()  # that nobody has looked at yet
        self._looks_later = accelerator.device.type == "cuda"

    def fault(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | float, *, now: bool
    ) -> Fault | None:
        """What is wrong with the last steps up to ``step``, None as a rule; the same on all ranks.

        Without ``now`` a GPU's last step is left to the next call. ``loss`` is this rank's share of
        the step's loss; it is summed over ranks only where jumps are looked for.
        """
        total = self._accelerator.reduce(loss, "sum") if self._max_jump else torch.zeros_like(loss)
        # Not values[0] = …: a number that is written into a tensor on a GPU makes the host wait.
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=loss.device)
        self._steps.append((step, OnTheWay(torch.stack([norm, total.double()]))))
        first = None
        while len(self._steps) > (self._looks_later and not now):
            number, on_the_way = self._steps.popleft()
            reason = self._look_at(*on_the_way.read())
            if reason is not None:
                first = first or Fault(number, reason)
        return first

    def _look_at(self, grad_norm: float, loss: float) -> str | None:
        if not math.isfinite(grad_norm):
            self.count += 1
            return f"its gradient norm is {grad_norm}"
        if not self._max_jump:
            return None
        mean = sum(self._losses) / len(self._losses) if self._losses else loss
        if len(self._losses) >= FEWEST_LOSSES and loss - mean > self._max_jump:
            self.count += 1
            return f"its loss {loss:.3f} is {loss - mean:.3f} above the mean of the last ones"
        self._losses.append(loss)
        return None

    def rewind(self) -> None:
        """Count a rewind; RuntimeError when there have been so many that nothing is gained."""
        self.rewinds += 1
        self._losses.clear()
        self._steps.clear()  # of a GPU's last one, which the run has left behind
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
