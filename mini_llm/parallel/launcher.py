"""`accelerate launch` as launch.sh starts it: a signal reaches the ranks, which save and leave.

    python -m mini_llm.parallel.launcher accelerate launch … recipes/pretrain.py …

Signalled itself, Accelerate's launcher would give its ranks 30 seconds and end with an error. So it
runs in a session of its own, where no terminal and no scheduler's signal to this process finds it,
and SIGTERM and SIGINT are handed to the ranks alone: they save and end with 0, and so does it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Names a file that a rank makes when the run stopped on purpose, whatever its launcher makes of it.
STOP_NOTE_VARIABLE = "MINI_LLM_STOP_NOTE"


def main(command: list[str]) -> int:
    """Run the command to its end and return its exit status; 0 if it stopped on purpose."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "stopped"
        environment = {**os.environ, STOP_NOTE_VARIABLE: str(note)}
        launcher = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
        )
        signals = 0

        def hand_on(number: int, frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            if signals <= 2:  # a second one asks the ranks to leave without saving
                _signal_children(launcher.pid, number)
            else:
                launcher.terminate()

        for number in SIGNALS:
            signal.signal(number, hand_on)
        status = launcher.wait()
        # Where a scheduler signals every process, the launcher too ends with an error of its own.
        return 0 if note.exists() else status


def _signal_children(pid: int, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


def _end_with_parent() -> None:
    """In the child, before it becomes the launcher: SIGTERM for it when this process is killed."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
