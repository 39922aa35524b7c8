"""How many processes this machine gets, and threads for each."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from ..nvidia import DriverError, ask_driver


def gpu_count() -> int:
    """GPUs that training can use: seen by the driver, not hidden, and torch's build has CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return 0
    try:
        seen = len(ask_driver("name"))
    except DriverError as error:
        _note(str(error))
        return 0
    if seen == 0:
        return 0
    if torch_build("cuda") is None:
        _note(
            "this machine has a GPU, but the installed torch is the CPU build: training runs on "
            "the CPU"
        )
        return 0
    return sum(1 for word in visible.split(",") if word.strip()) if visible else seen


def torch_build(kind: str) -> str | None:
    """The CUDA ("cuda") or ROCm ("hip") version that the installed torch is built for.

    Read from torch's version file: to import torch would take longer than all of the launcher.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    version = Path(torch.origin).with_name("version.py").read_text()
    found = re.search(rf"^{kind}\b[^=]*= *'(.*)'", version, re.MULTILINE)
    return found[1] if found else None


def threads_per_process(processes: int) -> int:
    """This machine's cores shared out, unless the user chose: OMP_NUM_THREADS."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // processes)


def _note(text: str) -> None:
    print(f"launch.sh: note: {text}", file=sys.stderr, flush=True)
