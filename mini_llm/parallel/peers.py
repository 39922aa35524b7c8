"""What the ranks tell each other besides their collectives: signs of life, and who is late.

A thread of every rank talks to the key-value store that the launcher's agent (or rank 0) keeps at
MASTER_ADDR:MASTER_PORT for the process groups, over a connection of its own. It only ever waits
there itself: a network that is gone can hold it, but neither training nor the watchdog, which looks
at ``last_contact``.

A rank that asks for a report raises a flag. Every rank that sees it writes its threads' stacks to
its log and its state to the store; the rank that raised the flag first works out who is late and
publishes the sentence; every rank writes that to its log, one on every host says it; all end.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil

from . import rank_log
from .hang_report import COLLECTIVE, Frame, RankState, name_late_ranks, standing

COLLECT_SECONDS = 10.0  # for the others' states; several signs of life
CONNECT_SECONDS = 60.0
THREAD_NAME = "mini_llm-watchdog"
GONE, SUSPENDED = "its process is gone", "its process is suspended"


class Peers:
    """This rank's connection to the others.

    ``position`` says how far this rank is: its beats, step and phase.

        peers = Peers(rank, world_size, interval, position)
        peers.start()
        peers.ask_for_report()  # ends every rank, once all that can have written what they know
        peers.leave()           # before this rank ends on its own
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        interval: float,
        position: Callable[[], tuple[int, int, str]],
    ) -> None:
        # Until the first, to connect may take so long.
        self.last_contact = time.monotonic() + CONNECT_SECONDS
        self.trouble = ""  # why there is no connection, as far as it is known
        self.failed = ""  # the first rank that ended with an exception of its own, and with which
        self._rank, self._world_size = rank, world_size
        self._interval, self._position = interval, position
        self._report_is_due = self._leaving = False
        self._raised_in: tuple[Frame, ...] | None = None
        self._failure = ""
        self._failure_is_told = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def ask_for_report(self, raised_in: tuple[Frame, ...] | None = None) -> None:
        """Let every rank say where it stands and end.

        ``raised_in`` is where this rank's main thread stood, if it no longer does.
        """
        self._raised_in = raised_in
        self._report_is_due = True
        self._wake.set()

    def tell_failure(self, failure: str, seconds: float) -> None:
        """Let the others know the exception that ends this rank, within ``seconds``."""
        self._failure = failure
        self._wake.set()
        self._failure_is_told.wait(seconds)

    def leave(self, seconds: float = 5.0) -> None:
        """Stop talking. The thread must not be in the store's C++ code when Python ends."""
        self._leaving = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        from torch.distributed import DistError

        try:
            self._talk(_connect(self._rank))
        except Exception as error:
            self.trouble = str(error).strip().split("\n")[0]
            if not isinstance(error, DistError):  # that is: the store, or the way to it, is gone
                raise

    def _talk(self, store: Any) -> None:
        while not self._leaving:
            store.set(f"life/{self._rank}", json.dumps(asdict(self._state())))
            if self._failure and not self._failure_is_told.is_set():
                store.set("failed", f"{self._state()} failed: {self._failure}")
                self._failure_is_told.set()
            hangs = store.check(["hang"])
            if not self.failed and store.check(["failed"]):
                self.failed = store.get("failed").decode()
            self.last_contact = time.monotonic()
            if hangs or self._report_is_due:
                self._report(store)
            self._wake.wait(self._interval)
            self._wake.clear()

    def _state(self, **known: Any) -> RankState:
        beats, step, phase = self._position()
        return RankState(
            self._rank,
            os.uname().nodename,
            os.getpid(),
            beats,
            step,
            phase,
            f"{rank_log.now_utc():%H:%M:%S} UTC",
            failure=self._failure,
            **known,
        )

    def _report(self, store: Any) -> None:
        """Take part in a report; does not return."""
        first = store.add("hang", 1) == 1
        stacks = python_stacks()
        write_stacks(stacks)
        where, frames = _main_thread_stands(stacks, self._raised_in)
        store.set(
            f"state/{self._rank}", json.dumps(asdict(self._state(where=where, frames=frames)))
        )
        if first:
            store.set("report", json.dumps(self._work_out(store)))
        if not self._await(store, ["report"], 2 * COLLECT_SECONDS):
            say("the ranks' report did not come to its end")
            end()
        report = json.loads(store.get("report"))
        say(report["text"], aloud=self._rank in report["speakers"])
        # The launcher ends the others soon after the first has left: not before all have this.
        store.set(f"told/{self._rank}", "")
        self._await(store, [f"told/{rank}" for rank in report["living"]], COLLECT_SECONDS)
        end()

    def _await(self, store: Any, keys: list[str], seconds: float) -> bool:
        """Wait until the store has all these keys, so long at most; whether it has."""
        deadline = time.monotonic() + seconds
        while not store.check(keys):
            self.last_contact = time.monotonic()
            if self.last_contact > deadline:
                return False
            time.sleep(0.2)
        return True

    def _work_out(self, store: Any) -> dict[str, Any]:
        """Wait for the others' states and say who is late; on the rank that raised the flag."""
        ranks = range(self._world_size)
        states = _read_states(store, "life", ranks)
        fates = _fates(states)
        able = [rank for rank in ranks if fates.get(rank) not in (GONE, SUSPENDED)]
        self._await(store, [f"state/{rank}" for rank in able], COLLECT_SECONDS)
        states |= _read_states(store, "state", ranks)
        fates = _fates(states)  # again: one that was killed may have been on its way out
        living = [rank for rank in states if states[rank].where]
        lowest = {states[rank].host: rank for rank in sorted(living, reverse=True)}
        return {
            "text": "the job cannot go on: "
            + name_late_ranks(states, self._world_size, fates)
            + f"\nThe stacks of every rank that answered are in its log{_where_logs_are()}.",
            "living": living,
            "speakers": list(lowest.values()),
        }


def _connect(rank: int) -> Any:
    """The store of this launch, as torch itself finds it, with a corner for this attempt."""
    from torch.distributed import PrefixStore, TCPStore

    agent_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not agent_has_it,
        timeout=timedelta(seconds=CONNECT_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,  # in rank 0's process, torch's own store shares the port
    )
    return PrefixStore(f"mini_llm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _read_states(store: Any, kind: str, ranks: Iterable[int]) -> dict[int, RankState]:
    found = {}
    for rank in ranks:
        if store.check([f"{kind}/{rank}"]):
            fields = json.loads(store.get(f"{kind}/{rank}"))
            fields["frames"] = tuple(Frame(**frame) for frame in fields["frames"])
            found[rank] = RankState(**fields)
    return found


def _fates(states: dict[int, RankState]) -> dict[int, str]:
    """By rank, what became of the processes on this host."""
    here = os.uname().nodename
    return {s.rank: _fate(s.pid) for s in states.values() if s.host == here}


def _fate(pid: int) -> str:
    """What became of a process on this host that is silent."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return GONE
    if status == psutil.STATUS_ZOMBIE:
        return GONE
    if status == psutil.STATUS_STOPPED:
        return SUSPENDED
    return f"its process is there, {status}, but cannot run Python"


def python_stacks() -> dict[str, tuple[Frame, ...]]:
    """The stack of every Python thread but the watchdog's, innermost call last; the main first."""
    frames = sys._current_frames()
    threads = sorted(threading.enumerate(), key=lambda t: t is not threading.main_thread())
    return {
        f"{thread.name} ({thread.ident})": _frames(frames.get(thread.ident or 0))
        for thread in threads
        if thread.name != THREAD_NAME
    }


def _frames(frame: FrameType | None) -> tuple[Frame, ...]:
    summary = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
    return (
        tuple(Frame(f.filename, f.lineno or 0, f.name) for f in reversed(summary)) if frame else ()
    )


def _main_thread_stands(
    stacks: dict[str, tuple[Frame, ...]], raised_in: tuple[Frame, ...] | None
) -> tuple[str, tuple[Frame, ...]]:
    """Where this rank stands, and the innermost calls of its main thread."""
    main, *others = stacks.values()
    main = raised_in or main
    # On a GPU, backward hooks and their collectives run in threads of autograd's.
    waits = any(standing(stack) == COLLECTIVE for stack in others)
    return COLLECTIVE if waits else standing(main), main[-4:]


def write_stacks(stacks: dict[str, tuple[Frame, ...]]) -> None:
    """To this rank's log; to stderr where it has none."""
    lines = ["the stacks of all Python threads, the innermost call last:"]
    for name, stack in stacks.items():
        lines += [f"  thread {name}"]
        lines += [f'    File "{f.path}", line {f.line}, in {f.function}' for f in stack]
    text = "\n".join(lines)
    if rank_log.log_file() is None:
        say(text)
    else:
        rank_log.note(text)


def say(text: str, *, aloud: bool = True) -> None:
    """On stderr and in this rank's log, or in the log alone."""
    line = f"rank {os.environ.get('RANK', '0')}: {text}"
    if aloud:
        print(line, file=sys.stderr, flush=True)
    else:
        rank_log.note(line)


def _where_logs_are() -> str:
    file = rank_log.log_file()
    return "" if file is None else f", {os.path.dirname(file.name)}/rank-<r>.log"


def end() -> None:
    """End this process now, with status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
