"""How figures are taken, interleaved and as medians, and how a program that is measured is run."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models import preset_config
from ..training.arguments import REPOSITORY

if TYPE_CHECKING:
    import torch


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def interleaved(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of `repeats` calls of each variant, after one call that is not timed.

    The variants take turns, so that what else the machine does meets all of them alike. ``cpu`` is
    the CPU time of this process with all its threads: other processes do not count. ``clock`` is
    real time; on a CUDA device the call waits for it.
    """
    cuda = device is not None and device.type == "cuda"

    def wait() -> None:
        if cuda:
            import torch

            torch.cuda.synchronize(device)

    seconds: dict[str, dict[str, list[float]]] = {
        name: {"cpu": [], "clock": []} for name in variants
    }
    for variant in variants.values():
        variant()
    for _ in range(repeats):
        for name, variant in variants.items():
            wait()
            cpu, clock = time.process_time(), time.perf_counter()
            variant()
            wait()
            seconds[name]["cpu"].append(time.process_time() - cpu)
            seconds[name]["clock"].append(time.perf_counter() - clock)
    return seconds


def run_to_its_end(command: Sequence[str], *, log: Path, environment: dict[str, str]) -> int:
    """Run ``command`` in the repository with what it says in ``log``; returns its status.

    Whatever keeps this process from waiting that long ends the command and all that it started.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def without_mtp(preset: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """``overrides`` that leave multi-token prediction out, as transformers and other loops do.

    Raises ValueError where they ask for it.
    """
    layers = "num_nextn_predict_layers"
    if not getattr(preset_config(preset, **overrides), layers, 0):
        return overrides
    if overrides.get(layers):
        raise ValueError(
            f"--model_overrides: {layers} must be 0, because what it is compared with has no "
            "multi-token prediction and would do less work"
        )
    return {**overrides, layers: 0}


def median_and_range(values: list[float]) -> str:
    """Return the median with minimum and maximum, for a table."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def allocations(call: Callable[[], Any]) -> list[int]:
    """Return the bytes of each block that torch takes on the CPU during `call`, frees negative.

    They are in order, and include what kernels take for themselves. A block that was there before
    does not count when it is freed, unless it was taken while this function looked another time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it notes each start on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    blocks = [event for event in events if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(blocks, key=lambda event: event["ts"])]


def peak_memory(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the most bytes that torch held during `call`, beyond those before it.

    On a CUDA `device` those that its allocator gave out there, else those on the CPU.
    """
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return max(accumulate(allocations(call)), default=0)


def threads(device: str) -> str:
    """OMP_NUM_THREADS of a program that this one starts: on a CPU one, if it is not given."""
    return os.environ.get("OMP_NUM_THREADS") or ("1" if device == "cpu" else "not set")


def machine(*packages: str, threads: str | None = None) -> dict[str, Any]:
    """Return what a figure depends on besides the code: cores, threads, versions.

    ``threads`` are those of the programs that were measured, if it was not this one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{platform.machine()}, {cores} cores",
        "threads": threads or os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
