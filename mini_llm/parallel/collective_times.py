"""How long collectives of this rank are under way, measured beside them.

Every collective passes torch's dispatcher once, whoever begins it: DeepSpeed, Accelerate, a recipe,
or DDP's reducer in C++. There its begin is noted, and its future notes the end, on a GPU in a
stream that waits for it. So it does not matter who waits for the collective, when, or what is
computed meanwhile, and nothing waits for the measurement.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .clocks import Clock

# The dispatcher's names of what process groups offer.
COLLECTIVES = (
    *("allreduce_", "allreduce_coalesced_", "reduce_", "broadcast_"),
    *("allgather_", "allgather_coalesced_", "_allgather_base_", "allgather_into_tensor_coalesced_"),
    *("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
    *("alltoall_", "alltoall_base_", "gather_", "scatter_"),
)
# Gloo has no reduce-scatter; what torch makes of an all-reduce there has no future.
WITHOUT_FUTURE = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")


@dataclass
class Span:
    """From one moment to another, None until that has been noted."""

    begin: Any
    end: Any = None


class CoveredTime:
    """Seconds in which at least one of several spans was open, of ``clock``'s moments."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._spans: deque[Span] = deque()  # in the order of their begins
        self._latest_end: Any = None  # of the spans counted so far
        self._seconds = 0.0

    def begin(self) -> Span:
        """A span opens now."""
        span = Span(self._clock.now())
        self._spans.append(span)
        return span

    def end(self, span: Span) -> None:
        """``span`` closes now; it may be called from another thread."""
        span.end = self._clock.now()

    def add_up(self) -> None:
        """Count the spans that have ended, up to the first that has not; never waits."""
        clock = self._clock
        while self._spans and self._spans[0].end is not None:
            span = self._spans[0]
            if not clock.has_come(span.end):
                return
            self._spans.popleft()
            seconds, further = clock.seconds(span.begin, span.end), None
            if self._latest_end is not None:
                further = clock.seconds(self._latest_end, span.end)
                seconds = min(seconds, further)  # what no earlier span covers
            self._seconds += max(seconds, 0.0)
            clock.release(span.begin)
            if further is None:
                self._latest_end = span.end
            elif further > 0:
                clock.release(self._latest_end)
                self._latest_end = span.end
            else:
                clock.release(span.end)

    def read(self) -> float:
        """The seconds since the last call."""
        self.add_up()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class CollectiveTimes:
    """Notes in ``time``, from :meth:`open` to :meth:`close`, how long collectives are under way.

    A collective is under way from the moment that this rank begins it, on a GPU in the stream that
    does, until it has its result: sending, and waiting for ranks that begin it later. There are
    none in a process that has no others. To note one costs up to half a millisecond of CPU time
    with gloo, whose thread then asks for Python.
    """

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.time = CoveredTime(clock)
        self._device = device
        self._library: Any = None

    def open(self) -> None:
        """Note the collectives from now on; what was noted before is forgotten."""
        self.close()
        self.time.read()
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        key = f"Autograd{self._device.type.upper()}"  # passed first, and no collective uses it
        self._library = torch.library.Library("c10d", "IMPL")
        for name in COLLECTIVES:
            waits = self._device.type == "cpu" and name in WITHOUT_FUTURE
            collective = getattr(torch.ops.c10d, name).default
            self._library.impl(name, self._timed(collective, waits), key)

    def _timed(self, collective: Any, waits: bool) -> Any:
        def timed(*args: Any) -> Any:
            span = self.time.begin()
            with torch._C._AutoDispatchBelowAutograd():
                results = collective(*args)
            handle = results[-1] if isinstance(results, (tuple, list)) else results
            work = dist.Work.unbox(handle)
            if waits:  # as its caller is about to; a second time costs nothing
                work.wait()
                self.time.end(span)
            else:
                work.get_future().then(lambda _: self.time.end(span))
            return results

        return timed

    def close(self) -> None:
        """Note no further collective."""
        if self._library is not None:
            self._library._destroy()
            self._library = None
