"""A rank ends when it should: with its launcher, and when the job no longer gets on.

A launcher that is killed cannot tell its ranks. So a thread in every rank sees that its parent has
changed and sends the rank SIGTERM, upon which it saves and leaves; a rank that is stuck, because
its peers are gone too, is ended after some seconds.

A rank that waits for a peer which hangs cannot tell whose fault it is. So each part of the work
says :func:`beat`, and a second thread looks whether a rank has not for ``--ddp_timeout`` seconds.
Then all ranks work out together who is late, write it down with their stacks, and end (peers.py,
hang_report.py). A rank that cannot reach the others for so long ends by itself.

Collectives have a longer time limit (:func:`collective_seconds`), so that the report comes first:
gloo's would raise on the ranks that wait, NCCL's would kill them. Where one breaks all the same,
because a peer's process is gone, its exception leads to the same report before this rank ends.
"""

import atexit
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from . import rank_log
from .environment import rank, world_size
from .hang_report import ELSEWHERE, Frame, standing
from .peers import COLLECT_SECONDS, THREAD_NAME, Peers, end, python_stacks, say, write_stacks

LOOK_SECONDS = 0.5
GRACE_SECONDS = 30.0
# Before the first step, imports and weights from a shared disk may take so long in any case.
START_SECONDS = 60.0
# How long the ranks may take to write their report.
REPORT_SECONDS = 3 * COLLECT_SECONDS
# What is left to a rank that gets nothing done once another has failed.
SECONDS_AFTER_FAILURE = 30.0

_PEER_IS_GONE = re.compile(r"connection|timed? ?out|peer|socket|broken pipe|nccl|gloo", re.I)


class _Progress:
    """How far this rank is."""

    def __init__(self) -> None:
        self.at: float | None = None  # the time of the last beat; None: no limit now
        self.beats = 0
        self.step = 0
        self.phase = "starting"

    def position(self) -> tuple[int, int, str]:
        return self.beats, self.step, self.phase


_progress = _Progress()
_peers: Peers | None = None
_over = False


def end_with_launcher() -> None:
    """Start the first thread, in a process that a launcher started."""
    if _is_launched():
        _start_thread(_watch_launcher, os.getppid())


def end_if_stuck(seconds: float) -> None:
    """Start the second thread there: from the next :func:`beat` on, it must be called so often.

    With more than one rank it also starts to talk to the others.
    """
    global _peers
    if not _is_launched():
        return
    if world_size() > 1:
        interval = min(2.0, seconds / 20)
        _peers = Peers(rank(), world_size(), interval, _progress.position)
        _peers.start()
        atexit.register(finish)
    _start_thread(_watch_beats, seconds)


def beat(phase: str | None = None, step: int | None = None) -> None:
    """This rank gets on; ``phase`` says what comes now, ``step`` which optimizer step it is in.

    To be called at the same places on all ranks: the one with the fewest calls is the late one.
    """
    _progress.at = time.monotonic()
    _progress.beats += 1
    if phase is not None:
        _progress.phase = phase
    if step is not None:
        _progress.step = step


def rest(phase: str) -> None:
    """What comes now may take as long as it takes."""
    beat(phase)
    _progress.at = None


def finish() -> None:
    """The ranks part: from now on none waits for another."""
    global _over
    _over = True
    if _peers is not None:
        _peers.leave()


def collective_seconds(seconds: float) -> float:
    """The time limit of a collective that leaves the watchdog the time to speak first."""
    return max(seconds, START_SECONDS) + REPORT_SECONDS


def _is_launched() -> bool:
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _start_thread(watch: Callable[[Any], None], argument: Any) -> None:
    threading.Thread(target=watch, args=(argument,), name=THREAD_NAME, daemon=True).start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_SECONDS)
    say(
        f"the launcher (process {launcher}) is gone; saving and leaving, within "
        f"{GRACE_SECONDS:.0f} s"
    )
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _watch_beats(seconds: float) -> None:
    while not _over:
        limit = seconds if _progress.step else max(seconds, START_SECONDS)
        if _peers is not None and _peers.failed:
            limit = min(limit, SECONDS_AFTER_FAILURE)
        at = _progress.at
        if at is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            # Where a call never lets go of Python, this thread does not run; then C code speaks.
            faulthandler.dump_traceback_later(
                limit + REPORT_SECONDS, exit=True, file=rank_log.log_file() or 2
            )
        if at is not None and time.monotonic() - at >= limit:
            say(
                f"nothing has got done for {limit:.0f} s (--ddp_timeout): this rank hangs, or "
                f"waits for one that does ({_progress.phase})",
                aloud=_peers is None,
            )
            _end_with_report()
        if _peers is not None and time.monotonic() - _peers.last_contact >= limit:
            _end_without_contact()
        time.sleep(min(LOOK_SECONDS, seconds / 10))
    faulthandler.cancel_dump_traceback_later()


def _end_with_report(raised_in: tuple[Frame, ...] | None = None) -> None:
    """Ask for the ranks' report, which ends this process; end it without where none comes.

    ``raised_in`` is where the main thread stood when an exception took it out of there.
    """
    if _peers is not None:
        _peers.ask_for_report(raised_in)
        while not _peers.trouble and time.monotonic() - _peers.last_contact < COLLECT_SECONDS:
            time.sleep(0.1)
        _end_without_contact()
    write_stacks(python_stacks())
    end()


def _end_without_contact() -> None:
    assert _peers is not None
    seconds = max(time.monotonic() - _peers.last_contact, 0)
    cause = "".join(f" ({known})" for known in (_peers.trouble, _peers.failed) if known)
    say(
        f"lost contact with {os.environ['MASTER_ADDR']}, the main node, {seconds:.0f} s ago: that "
        f"node, its launcher or the network is gone{cause}; this rank ends"
    )
    write_stacks(python_stacks())
    end()


def where_peer_was_missed(error: BaseException) -> tuple[Frame, ...] | None:
    """The stack of the collective that broke because a peer is gone; None if it was not that."""
    while error.__cause__ is not None:
        error = error.__cause__
    calls = traceback.extract_tb(error.__traceback__)
    stack = tuple(Frame(f.filename, f.lineno or 0, f.name) for f in calls)
    is_symptom = isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error))
    return stack if is_symptom and standing(stack) != ELSEWHERE else None


def report_exceptions() -> None:
    """Let the other ranks know of the exception that ends this one; once the first group is there.

    If it only says that a peer is gone, find out who, and end with the report.
    """
    print_it = sys.excepthook  # torch's own by now, which puts the rank before every line

    def last_words(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        print_it(kind, error, where)
        if _peers is None:
            return
        waited_in = where_peer_was_missed(error)
        if waited_in is not None:
            _end_with_report(waited_in)
        _peers.tell_failure(f"{kind.__name__}: {str(error).strip()[:300]}", seconds=2)

    sys.excepthook = last_words
