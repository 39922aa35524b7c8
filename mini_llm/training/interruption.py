"""Stopping on purpose: a signal or the end of the allotted time saves and leaves with status 0.

All ranks must leave after the same step, or those that go on wait for the others for ever. So no
rank acts on what it alone knows: its wish travels in the all-reduce that every optimizer step makes
anyway, and all ranks see the sum.
"""

import signal
import time
from collections import deque
from dataclasses import dataclass
from types import FrameType

import torch

from mini_llm.launch.note import SAVED, write_note
from mini_llm.launch.supervise import SIGNALS
from mini_llm.parallel.transfer import OnTheWay

from .arguments import RunArguments


class Interruption:
    """This rank's wishes to save or to stop, and what all ranks agreed on.

    ``max_hours`` (None: no limit) and ``save_minutes`` (0: never) are counted from here on.

        interruption = Interruption(max_hours=…, save_minutes=…)
        for step in …:
            sums = all_reduce([num_targets, *interruption.wishes(), …])
            …
            interruption.agree(sums[1:3])
            if interruption.save_now or interruption.stop_now: …
        interruption.close()  # the signals mean what they meant before
    """

    def __init__(self, *, max_hours: float | None, save_minutes: float) -> None:
        self.stop_now = False
        self.save_now = False
        self.reason = "the allotted time is over (--max_hours)"
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._save_seconds = 60 * save_minutes
        self._saved = time.monotonic()
        self._signal: int | None = None
        self._sums: deque[OnTheWay] = deque()
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice at the keyboard: at once, without saving
        self._signal = number
        self.reason = f"{signal.Signals(number).name} was received"

    def wishes(self) -> tuple[float, float]:
        """(stop, save), each 1 where this rank wishes it, to be summed over ranks this step."""
        now = time.monotonic()
        out_of_time = self._deadline is not None and now >= self._deadline
        save = bool(self._save_seconds) and now - self._saved >= self._save_seconds
        return float(self._signal is not None or out_of_time), float(save)

    def agree(self, sums: torch.Tensor) -> None:
        """Take this step's summed wishes; ``stop_now`` and ``save_now`` then hold on all ranks.

        On a GPU the sums of the step before are read, which have arrived as a rule: to read this
        step's would make the host wait for the device.
        """
        self._sums.append(OnTheWay(sums))
        if sums.is_cuda and len(self._sums) < 2:
            return
        stop, save = self._sums.popleft().read()
        self.stop_now = stop > 0
        self.save_now = save > 0

    def saved(self) -> None:
        """A checkpoint was begun: the time to the next one counts from now."""
        self._saved = time.monotonic()
        self.save_now = False
        # A wish that was summed before the save is fulfilled by it.
        self._sums.clear()


@dataclass(frozen=True)
class Due:
    """What follows an optimizer step besides the next one, the same on all ranks."""

    log: bool
    evaluate: bool
    sample: bool
    save: bool

    @property
    def anything(self) -> bool:
        """Whether the host will wait for the device anyway."""
        return self.log or self.evaluate or self.sample or self.save


def what_is_due(args: RunArguments, step: int, *, is_last: bool, save_now: bool = False) -> Due:
    """What ``args`` ask for after step ``step`` (from 1); the first and the last are logged too."""
    evaluate = args.eval_steps > 0 and (step % args.eval_steps == 0 or step in (1, args.max_steps))
    return Due(
        log=is_last or step == 1 or step % args.logging_steps == 0,
        evaluate=evaluate,
        sample=bool(args.sample_prompts) and (evaluate or step == args.max_steps),
        save=is_last or save_now or (args.save_steps > 0 and step % args.save_steps == 0),
    )


def note_the_stop() -> None:
    """Tell the launcher of launch.sh that the run stopped on purpose, whatever else it is told."""
    write_note(SAVED)
