"""Where the time of optimizer steps goes: tokens per second, MFU, the parts of a step, memory."""

import contextlib
import math
import re
import resource
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from accelerate import Accelerator

from mini_llm.parallel.clocks import Clock, HostClock, clock_of
from mini_llm.parallel.collective_times import CollectiveTimes

from .sizes import TrainingFlops

# Dense bf16 peak of one device in FLOP/s, without sparsity, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Other devices whose names begin as one of these, and slices of one: their peaks are others.
VARIANTS = re.compile(r"\b(NVL|D|Ti|Laptop|MIG)\b")

Part = Literal["data", "forward", "backward", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "optimizer")


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of ``device``, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if VARIANTS.search(name):
        return None
    return next(
        (peak for model, peak in PEAK_FLOPS.items() if re.search(rf"{model}\b", name)), None
    )


class StepTimer:
    """Times the optimizer steps of an interval, which :meth:`read` and :meth:`restart` begin.

    ``flops`` are the model's, ``peak`` is one device's FLOP/s (None: what is known of it).

        timer = StepTimer(accelerator, flops=…, peak=None)
        for step in …:
            timer.begin_step(is_logged=…)
            with timer.part("data"): …
            with timer.part("forward"): …
            with timer.part("backward"): …
            with timer.part("optimizer"): …
            timer.end_step(tokens, targets)
            if it_is_logged:
                metrics |= timer.read()
            if something_else_was_done:
                timer.restart()

    On a GPU, which works behind the host, parts are timed by events in its stream, and the host
    waits for it in :meth:`read` and :meth:`restart` alone. Reading data is timed on the host, and
    collectives in steps that will be logged alone.
    """

    def __init__(
        self, accelerator: Accelerator, *, flops: TrainingFlops, peak: float | None
    ) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._flops = flops
        self._peak = peak or peak_flops(self._device)
        self._clock = clock_of(self._device)
        self._host = HostClock()
        self._collectives = CollectiveTimes(self._device, self._clock)
        self._times_collectives = False
        self._spans: deque[tuple[Part, Any, Any]] = deque()  # that the device has yet to do
        self.restart()

    def begin_step(self, *, is_logged: bool) -> None:
        """An optimizer step begins; if ``is_logged`` it will be read."""
        self._times_collectives = is_logged
        if is_logged:
            self._collectives.open()
        else:
            self._collectives.close()

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of what is done inside to the part ``name`` of the step."""
        clock: Clock = self._host if name == "data" else self._clock
        begin = clock.now()
        yield
        end = clock.now()
        if name == "data":
            self._seconds[name] += clock.seconds(begin, end)
        else:
            self._spans.append((name, begin, end))

    def end_step(self, tokens: int, targets: float) -> None:
        """An optimizer step is done.

        It had ``tokens`` over all ranks, padding included, and ``targets``, supervised tokens, on
        this one.
        """
        self._steps += 1
        self._tokens += tokens
        self._targets += targets
        self._add_up()

    def _add_up(self) -> None:
        """Count what the device is done with; never waits."""
        while self._spans and self._clock.has_come(self._spans[0][2]):
            name, begin, end = self._spans.popleft()
            self._seconds[name] += self._clock.seconds(begin, end)
            self._clock.release(begin)
            self._clock.release(end)
        self._collectives.time.add_up()

    def read(self) -> dict[str, float | None]:
        """The ``perf/…`` metrics of the interval; begins the next. A collective of all ranks.

        Times are those of one step, means over the interval's steps and over ranks;
        ``communication_seconds`` is that of the last step, nan if that was not announced as logged;
        ``peak_memory_bytes`` is the largest of the ranks. Raises RuntimeError without a step.
        """
        if not self._steps:
            raise RuntimeError("no step has been timed since the interval began")
        now = self._now()
        self._add_up()
        times = [now - self._began, *(self._seconds[part] for part in PARTS)]
        communication = self._collectives.time.read() if self._times_collectives else math.nan
        self._collectives.close()
        here = [*(seconds / self._steps for seconds in times), communication]
        here += [self._targets / self._steps, float(self._peak_memory())]
        found = torch.tensor([here], dtype=torch.float64, device=self._device)
        ranks: torch.Tensor = self._accelerator.gather(found)
        step_seconds, *parts, communication, _, _ = ranks.mean(0).tolist()
        tokens, targets = self._tokens / self._steps, ranks[:, -2].sum().item()
        step_seconds = max(step_seconds, 1e-9)
        utilisation = None
        if self._peak is not None:
            done = tokens * self._flops.layers + targets * self._flops.head
            utilisation = done / step_seconds / (self._peak * self._accelerator.num_processes)
        self._begin_interval(now)
        return {
            "perf/tokens_per_second": tokens / step_seconds,
            "perf/mfu": utilisation,
            "perf/step_seconds": step_seconds,
            **{f"perf/{part}_seconds": mean for part, mean in zip(PARTS, parts, strict=True)},
            "perf/communication_seconds": communication,
            "perf/peak_memory_bytes": ranks[:, -1].max().item(),
        }

    def restart(self) -> None:
        """Begin a new interval now, e.g. after an evaluation that is not training time."""
        now = self._now()
        self._add_up()
        self._begin_interval(now)

    def close(self) -> None:
        """Time no further collective."""
        self._collectives.close()

    def _begin_interval(self, now: float) -> None:
        self._began = now
        self._steps = self._tokens = 0
        self._targets = 0.0
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _now(self) -> float:
        """The host's time once the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._host.now()

    def _peak_memory(self) -> int:
        """Bytes: on a GPU the most that tensors took since the interval began, else of the process.

        What the operating system knows of a process on a CPU is the peak since it started.
        """
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
