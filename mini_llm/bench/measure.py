"""How figures are taken: interleaved, in CPU time of this process, as medians."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the CPU seconds of `repeats` calls of each variant, after one call that is not timed.

    The variants take turns, so that what else the machine does meets all of them alike. CPU time
    is that of this process with all its threads: other processes do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for _ in range(repeats):
        for name, variant in variants.items():
            started = time.process_time()
            variant()
            seconds[name].append(time.process_time() - started)
    return seconds


def median_and_range(values: list[float]) -> str:
    """Return the median with minimum and maximum, for a table."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def machine(*packages: str) -> dict[str, Any]:
    """Return what a figure depends on besides the code: cores, threads, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{platform.machine()}, {cores} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
