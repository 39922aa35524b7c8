"""Running `accelerate launch`: signals reach the ranks, which save and leave; failures start again.

Signalled itself, Accelerate's launcher would give its ranks 30 seconds and end with an error. So it
runs in a session of its own, where no terminal and no scheduler's signal to this process finds it,
and SIGTERM and SIGINT are handed to the ranks alone: they save and end with 0, and so does it.

SIGUSR1 is what `sbatch --signal=USR1@SECONDS` sends before the time limit, to every process of the
step. The ranks get SIGTERM for it, from here; SIGUSR1 itself, which would kill them, they ignore.
They get SIGTERM for SIGHUP too, a terminal that is closed, unless `nohup` wants it ignored.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import psutil

from .note import FINISHED, NOTE_VARIABLE, REFUSED, SAVED, read_note

# What a rank stops for. The launcher stops for SIGUSR1 and SIGHUP too.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
USAGE_ERROR = 2
# Between two tries: what is left of the failed one lets go of devices and memory.
WAIT_SECONDS = 10.0
LOOK_SECONDS = 1.0


def supervise(
    command: Callable[[int], list[str]],
    environment: Mapping[str, str],
    *,
    max_restarts: int = 0,
    wait_seconds: float = WAIT_SECONDS,
    hint_without_ranks: str = "",
) -> int:
    """Run ``command(0)`` and, after a failure, ``command(1)`` and so on; return the exit status.

    That is 0 where the run finished or was stopped on purpose, and 2 where its arguments were
    refused. Neither starts again, nor does a run whose launcher was signalled.
    ``hint_without_ranks`` is said after a failure before any rank was there.
    """
    supervisor = _Supervisor()
    for attempt in range(max_restarts + 1):
        status = supervisor.run(command(attempt), environment)
        told = supervisor.had_ranks or supervisor.signalled
        if status and hint_without_ranks and not told:
            _say(f"no rank was started on this node: {hint_without_ranks}")
        if status in (0, USAGE_ERROR) or supervisor.signalled:
            return status
        if attempt < max_restarts:
            _say(
                f"the run failed with status {status}; restart {attempt + 1} of {max_restarts} in "
                f"{wait_seconds:.0f} s"
            )
            if not supervisor.sleep(wait_seconds):
                return status
    if max_restarts:
        _say(
            f"the run failed with status {status}; no restart is left of the {max_restarts} of "
            "--max_restarts"
        )
    return status


class _Supervisor:
    """One `accelerate launch` after the other, and the signals meant for it."""

    def __init__(self) -> None:
        self.signalled = 0  # times
        self.had_ranks = False  # in the last run
        self._launcher: subprocess.Popen[bytes] | None = None
        on_signals(self._hand_on)

    def run(self, command: list[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end and return the exit status that its ranks' note asks for."""
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / "note"
            self._launcher = subprocess.Popen(
                command,
                env={**environment, NOTE_VARIABLE: str(note)},
                start_new_session=True,
                preexec_fn=_before_the_launcher,
            )
            if self.signalled:  # between the check for it and now
                self._launcher.terminate()
            status = self._wait(self._launcher)
            self._launcher = None
            word = read_note(note)
        if word in (SAVED, FINISHED):
            return 0
        if word == REFUSED:
            return USAGE_ERROR
        return status if status >= 0 else 128 - status  # as a shell reports a signal

    def _wait(self, launcher: "subprocess.Popen[bytes]") -> int:
        """Its exit status; looks meanwhile whether it starts ranks."""
        self.had_ranks = False
        while True:
            try:
                return launcher.wait(None if self.had_ranks else LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                self.had_ranks = bool(_children(launcher.pid))

    def sleep(self, seconds: float) -> bool:
        """Wait; False at once if a signal comes."""
        end = time.monotonic() + seconds
        while not self.signalled and time.monotonic() < end:
            time.sleep(0.1)
        return not self.signalled

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.signalled += 1
        if self._launcher is None:
            return
        number = number if number in SIGNALS else signal.SIGTERM
        ranks = _children(self._launcher.pid)
        # A second one asks the ranks to leave without saving, a third the launcher to end them.
        if ranks and self.signalled <= 2:
            _signal(ranks, number)
        else:
            self._launcher.terminate()


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Let ``handler`` take every signal that a launcher stops for."""
    for number in (*SIGNALS, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, handler)


def _children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children())
    return []


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _say(text: str) -> None:
    print(f"launch.sh: {text}", file=sys.stderr, flush=True)


def _before_the_launcher() -> None:
    """In the child, before it becomes the launcher."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # its ranks inherit that
    end_with_parent()


def end_with_parent() -> None:
    """SIGTERM for this process when its parent is killed (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM)
