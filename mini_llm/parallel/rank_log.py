"""Every rank's own log: ``output_dir/logs/rank-<r>.log`` holds whatever the rank prints, and more.

What goes through Python's stdout and stderr still reaches the terminal, and is written to the file
line by line by the thread that prints it: a rank that dies loses nothing, and one whose terminal is
closed goes on to its save. What libraries write past Python (NCCL, a C++ abort) is on the terminal
alone.
"""

import faulthandler
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from mini_llm.launch.terminal import go_on_without

_file: TextIO | None = None


def open_rank_log(output_dir: Path) -> None:
    """From now on this rank's output goes to its log as well; every start adds to the file.

    Called once the run folder is this run's (``RunLock.take``): a run that is refused before leaves
    no line in what may be another's log.
    """
    global _file
    path = rank_log_path(output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    _file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    note(
        f"=== {now_utc():%Y-%m-%d %H:%M:%S} UTC: rank {rank} of {world_size} starts on "
        f"{os.uname().nodename} as process {os.getpid()}"
    )
    former = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, _Tee(stream)) for stream in former)
    _redirect_loggers(dict(zip(former, (sys.stdout, sys.stderr), strict=True)))
    faulthandler.enable(file=_file)  # the Python stacks of a segmentation fault


def rank_log_path(output_dir: Path) -> Path:
    """This rank's log."""
    return output_dir / "logs" / f"rank-{os.environ.get('RANK', '0')}.log"


def log_file() -> TextIO | None:
    """This rank's open log, None before :func:`open_rank_log`."""
    return _file


def note(text: str) -> None:
    """A line (or more) for this rank's log alone; nothing where there is none, as in a dry run."""
    if _file is not None:
        _write(f"{text}\n")


def now_utc() -> datetime:
    """The time in UTC, by this machine's clock."""
    return datetime.now(UTC)


class _Tee:
    """A terminal stream whose text goes to the log too; everything else is the stream's own."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        if "\r" not in text:  # a progress bar that is drawn again
            _write(text)
        try:
            return self._terminal.write(text)
        except OSError as error:
            self._go_on_without(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._terminal.flush()
        except OSError as error:
            self._go_on_without(error)

    def _go_on_without(self, error: OSError) -> None:
        go_on_without(self._terminal, error)
        note(f"\nnobody reads {self._terminal.name} any more ({error}): this log alone goes on")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


def _write(text: str) -> None:
    """To the log alone. A full disk under it does not end the run: it is said once instead."""
    global _file
    if _file is None:
        return
    try:
        _file.write(text)
    except OSError as error:
        name, _file = _file.name, None
        print(f"{name} cannot be written any more ({error})", file=sys.stderr, flush=True)


def _redirect_loggers(streams: dict[TextIO, TextIO]) -> None:
    """Let the libraries' loggers, which keep the stream that was there at import, write on."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                handler.setStream(streams[handler.stream])
