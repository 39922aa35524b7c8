"""Moments of a run and the time between them, without making the host wait for the device.

:class:`HostClock` reads the time. :class:`DeviceClock` puts a mark into the work that a GPU is
given, a CUDA event, which the GPU passes in its turn; only what it has passed can be read.
"""

import time
from collections import deque
from typing import Any

import torch


class HostClock:
    """Moments are seconds of the host's clock: right where the host computes."""

    def now(self) -> float:
        """This moment."""
        return time.perf_counter()

    def has_come(self, moment: float) -> bool:
        """Always: a moment of the host has come when it is asked for."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """From ``begin`` to ``end``, negative if ``end`` is the earlier one."""
        return end - begin

    def release(self, moment: float) -> None:
        """``moment`` is needed no longer."""


class DeviceClock:
    """Moments are CUDA events in the stream that is current when they are asked for.

    May be used from several threads. Events are made once and used again.
    """

    def __init__(self) -> None:
        self._free: deque[Any] = deque()

    def now(self) -> Any:
        """The moment when the device has done what it was given so far; the host does not wait."""
        try:
            event = self._free.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_come(self, moment: Any) -> bool:
        """Whether the device has passed ``moment``; only then may it be read. Does not wait."""
        return bool(moment.query())

    def seconds(self, begin: Any, end: Any) -> float:
        """From ``begin`` to ``end``, negative if ``end`` is the earlier one; both have come."""
        return float(begin.elapsed_time(end)) / 1e3

    def release(self, moment: Any) -> None:
        """``moment`` is needed no longer: its event may be used again."""
        self._free.append(moment)


Clock = HostClock | DeviceClock


def clock_of(device: torch.device) -> Clock:
    """The clock that times work of ``device``."""
    return DeviceClock() if device.type == "cuda" else HostClock()
