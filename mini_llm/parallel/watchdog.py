"""A rank ends when it should: with its launcher, and when it no longer gets on.

A launcher that is killed cannot tell its ranks. So a thread in every rank sees that its parent has
changed and sends the rank SIGTERM, upon which it saves and leaves; a rank that is stuck, because
its peers are gone too, is ended after some seconds.

A rank that waits for a peer which hangs would wait for long: DeepSpeed's process groups have
torch's own time-out, half an hour, whatever the first group was given. So a second thread ends a
rank whose loop has not got on for ``--ddp_timeout``, with the stacks of all its threads; the
launcher then ends the others.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LOOK_SECONDS = 0.5
GRACE_SECONDS = 30.0

_last_beat: float | None = None


def end_with_launcher() -> None:
    """Start the first thread, in a process that a launcher started."""
    if _is_launched():
        _start(_watch_launcher, os.getppid())


def end_if_stuck(seconds: float) -> None:
    """Start the second thread there: from now on :func:`beat` must be called so often."""
    beat()
    if _is_launched():
        _start(_watch_beats, seconds)


def beat() -> None:
    """This rank gets on."""
    global _last_beat
    _last_beat = time.monotonic()


def rest() -> None:
    """What comes now may take as long as it takes."""
    global _last_beat
    _last_beat = None


def _is_launched() -> bool:
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _start(watch: Callable[[Any], None], argument: Any) -> None:
    threading.Thread(
        target=watch,
        args=(argument,),
        name="mini_llm-watchdog",
        daemon=True,
    ).start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_SECONDS)
    _say(
        f"the launcher (process {launcher}) is gone; saving and leaving, within "
        f"{GRACE_SECONDS:.0f} s"
    )
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _watch_beats(seconds: float) -> None:
    while _last_beat is None or time.monotonic() - _last_beat < seconds:
        time.sleep(min(LOOK_SECONDS, seconds / 10))
    _say(
        f"nothing has got done for {seconds:.0f} s (--ddp_timeout): this rank hangs, or waits for "
        "one that does; it ends. Where its threads are:"
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)


def _say(text: str) -> None:
    print(f"rank {os.environ.get('RANK', '0')}: {text}", file=sys.stderr, flush=True)
