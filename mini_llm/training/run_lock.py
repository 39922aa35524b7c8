"""One run at a time in a run folder, also while what is left of a killed one still winds down."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"
RANKS_LOCK_NAME = ".ranks.lock"
# Longer than what is left of a killed run takes to notice that and end (parallel/watchdog.py).
PATIENCE_SECONDS = float(os.environ.get("MINI_LLM_LOCK_PATIENCE", "60"))


class RunLock:
    """A run's hold on its folder; the system lets go of it when the processes end, however they do.

    Rank 0 holds ``.lock`` alone. Every rank holds ``.ranks.lock`` together with the others, and
    rank 0 begins only when nobody holds that: then no rank of an earlier run is left to write.

        lock = RunLock(output_dir)
        lock.take(rank)     # before the folder is read; ranks other than 0 wait until rank 0 has it
        …                   # the process group starts
        lock.join()         # every rank
    """

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir
        self._files: list[IO[str]] = []

    def take(self, rank: int) -> None:
        """Take the folder for this run.

        Raises ValueError when it cannot be made, its disk has no file locks, or another run still
        has it after a minute.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output_dir {self._folder} cannot be made ({error.strerror}); name a folder on "
                "a disk that can be written to"
            ) from error
        if rank != 0:
            # Else this rank might look for checkpoints while the run before still saves one.
            reason = "rank 0 has not taken it; ranks on several nodes need one that all nodes share"
            self._wait(lambda: self._owner().endswith(_launch()), reason)
            return
        alone = self._open(LOCK_NAME)
        self._wait(lambda: _locked(alone, fcntl.LOCK_EX), "it is in use by another run")
        ranks = (self._folder / RANKS_LOCK_NAME).open("a")
        self._wait(lambda: _locked(ranks, fcntl.LOCK_EX), "a rank of an earlier run is still there")
        ranks.close()
        alone.truncate(0)
        alone.write(f"process {os.getpid()} on {os.uname().nodename}, launch {_launch()}")
        alone.flush()

    def join(self) -> None:
        """Hold the folder as one of its ranks."""
        fcntl.flock(self._open(RANKS_LOCK_NAME), fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go of it before the process ends."""
        while self._files:
            self._files.pop().close()

    def _open(self, name: str) -> IO[str]:
        self._files.append((self._folder / name).open("a"))
        return self._files[-1]

    def _owner(self) -> str:
        path = self._folder / LOCK_NAME
        return path.read_text() if path.is_file() else ""

    def _wait(self, is_ready: Callable[[], bool], why_not: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        said = False
        while not is_ready():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--output_dir {self._folder}: {why_not} ({self._owner()}); wait for it, stop "
                    "it, or choose another --output_dir"
                )
            if not said and os.environ.get("RANK", "0") == "0":
                print(
                    f"{self._folder}: {why_not} ({self._owner()}); waiting up to "
                    f"{PATIENCE_SECONDS:.0f} s",
                    flush=True,
                )
                said = True
            time.sleep(0.1)


def _locked(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Lustre without -o flock, or NFS without its lock service
        raise ValueError(
            f"--output_dir {Path(file.name).parent}: its disk has no file locks "
            f"({error.strerror}), which keep two runs out of one folder; mount it with flock, or "
            "choose a folder on another disk"
        ) from error
    return True


def _launch() -> str:
    """What the ranks of one launch have in common, and no other launch as a rule has."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return "/".join(os.environ.get(name, "-") for name in names)
