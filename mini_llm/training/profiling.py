"""``--profile_steps first:last``: where the time and the memory of a few steps go, rank by rank.

Every rank writes into ``output_dir/profile/rank-<r>/``:

- ``trace.json.gz``: operators, kernels and their shapes, for https://ui.perfetto.dev;
- ``memory.pickle``, on a CUDA device only: each block that torch's allocator gave out in those
  steps, with the stack that asked for it, for https://docs.pytorch.org/memory_viz. Blocks of a CPU
  are in the trace (torch records no snapshot of them).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mini_llm.parallel.environment import rank
from mini_llm.parallel.watchdog import beat

from .arguments import profiled_steps

MOST_MEMORY_EVENTS = 1_000_000


class StepProfiler:
    """Profiles this rank's steps ``first`` to ``last`` of a run; with ``steps`` None, nothing."""

    def __init__(self, steps: str | None, output_dir: Path, device: torch.device) -> None:
        self.first, self.last = profiled_steps(steps) if steps else (0, 0)
        self.folder = output_dir / "profile" / f"rank-{rank()}"
        self.on_gpu = device.type == "cuda"
        self._profile: Any = None

    def begin_step(self, step: int) -> None:
        """Optimizer step ``step`` comes now."""
        if step > self.last:
            self.close()
        if step == self.first and self._profile is None:
            self._start()

    def close(self) -> None:
        """Write what was recorded, if anything, and say where (rank 0)."""
        if self._profile is None:
            return
        beat("writing the profile")
        self._profile.__exit__(None, None, None)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        self._profile = None
        what = "trace (no memory snapshot: torch makes them on CUDA devices only)"
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            what = "trace and memory snapshot"
        if rank() == 0:
            where = f"each rank's is in {self.folder.parent}"
            print(f"profiled steps {self.first} to {self.last}: {what}; {where}", flush=True)

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
