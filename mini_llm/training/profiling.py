"""``--profile_steps first:last``: where the time and the memory of a few steps go, rank by rank.

Every rank writes into ``output_dir/profile/rank-<r>/``:

- ``trace.json.gz``: operators, kernels and their shapes, for https://ui.perfetto.dev;
- ``memory.pickle``, on a CUDA device only: each block that torch's allocator gave out in those
  steps, with the stack that asked for it, for https://docs.pytorch.org/memory_viz. Blocks of a CPU
  are in the trace (torch records no snapshot of them).

A run that fails in those steps, out of memory for one, writes what it has recorded first.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from mini_llm.parallel.environment import rank
from mini_llm.parallel.watchdog import beat, where_peer_was_missed

from .arguments import profiled_steps

MOST_MEMORY_EVENTS = 1_000_000


class StepProfiler:
    """Profiles, once, this rank's steps ``first`` to ``last``; with ``steps`` None, nothing.

    Of these, those that lie in the run, which makes the steps from ``start_step`` + 1 to
    ``last_step``. That nothing is left of them is said (rank 0).
    """

    def __init__(
        self,
        steps: str | None,
        output_dir: Path,
        device: torch.device,
        *,
        start_step: int,
        last_step: int,
    ) -> None:
        self.first, self.last = profiled_steps(steps) if steps else (0, 0)
        self.folder = output_dir / "profile" / f"rank-{rank()}"
        self.on_gpu = device.type == "cuda"
        self._profile: Any = None
        self._recorded = (0, 0)  # the first step, and the last that has begun
        self._is_done = steps is None
        is_outside = self.last <= start_step or self.first > last_step
        if steps and is_outside and start_step < last_step:
            _say(
                f"--profile_steps {steps}: nothing is profiled, for the run goes from step "
                f"{start_step + 1} to {last_step}"
            )

    def begin_step(self, step: int) -> bool:
        """Optimizer step ``step`` comes now; whether time went by that is none of its own."""
        is_wanted = self.first <= step <= self.last
        if self._profile is not None and not is_wanted:
            self.close()
            return True
        if self._profile is None and is_wanted and not self._is_done:
            self._start()
            self._recorded = (step, step)
            return True
        if self._profile is not None:
            self._recorded = (self._recorded[0], step)
        return False

    def close(self) -> None:
        """Write what was recorded, if anything, and say where (rank 0).

        A profile that cannot be written is said too; it is no reason to end the run.
        """
        if self._profile is None:
            return
        beat("writing the profile")
        self._write()

    def _write(self) -> None:
        profile, self._profile, self._is_done = self._profile, None, True
        sys.excepthook = self._report_failure
        profile.__exit__(None, None, None)
        what = "trace (no memory snapshot: torch makes them on CUDA devices only)"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_trace(profile, self.folder / "trace.json.gz")
            if self.on_gpu:
                snapshot = self.folder / "memory.pickle"
                torch.cuda.memory._dump_snapshot(f"{snapshot}.part")
                Path(f"{snapshot}.part").replace(snapshot)
                what = "trace and memory snapshot"
        except OSError as error:
            print(f"the profile could not be written to {self.folder}: {error}", flush=True)
            return
        finally:
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
        first, last = self._recorded
        _say(f"profiled steps {first} to {last}: {what}; each rank's is in {self.folder.parent}")

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it notes each start on stderr
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.on_gpu:
            torch.cuda.synchronize()  # else the trace holds the last kernels of the step before
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.__enter__()
        self._report_failure = sys.excepthook
        sys.excepthook = self._write_and_report

    def _write_and_report(self, kind: Any, error: BaseException, where: Any) -> None:
        """Say what has failed, write what was recorded, then let it be reported.

        No beat here: other ranks make none at this place. Nor does a rank write that only misses
        another one: it is to say whom, and has seconds to do it.
        """
        report = self._report_failure
        if where_peer_was_missed(error) is None:
            print(f"{kind.__name__}: {error}; writing the profile first", flush=True)
            try:
                self._write()
            except Exception as second:  # of a broken device, say
                print(f"the profile could not be written to {self.folder}: {second}", flush=True)
        report(kind, error, where)


def _write_trace(profile: Any, path: Path) -> None:
    """Write the trace, whole or not at all. Raises OSError.

    torch itself would write a .gz by way of the system's temporary folder, and does not notice
    where that is full.
    """
    plain, packed = path.with_suffix(""), path.with_suffix(".part")
    try:
        profile.export_chrome_trace(str(plain))
        with plain.open("rb") as trace:
            trace.seek(max(0, plain.stat().st_size - 16))
            if not trace.read().rstrip().endswith(b"}"):
                raise OSError("torch's profiler has left it incomplete; is the disk full?")
            trace.seek(0)
            with gzip.open(packed, "wb", compresslevel=6) as file:
                shutil.copyfileobj(trace, file, 1 << 20)
        packed.replace(path)
    finally:
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
