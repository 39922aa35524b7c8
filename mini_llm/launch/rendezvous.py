"""Nodes that start with the same command meet through files beside `--rendezvous_file PATH`.

Every node registers by a file of its own, `PATH.JOB.ROUND.RANK`: the lowest free rank, made with
O_EXCL, which a shared file system gives to one of two that try. When all ranks of a round are
there, node 0's registration tells the others its address and port.

What an earlier job left must not be taken for this one's:

- JOB is the batch system's job id with the number of its restart, where there is one, so two of its
  jobs never look at each other's files.
- A round that is full is over: its job has begun, and may have died since. Whoever comes later
  opens the next round, and node 0 of a full round deletes the older ones.
- A round that is not full belongs to nodes that wait, and those touch their files every second.
  One that gives up or is interrupted deletes its file, and the rank is free again. One that was
  killed does not, so a node takes another for alive only if that one has touched its file since it
  made its own. A dead one's rank is one too few for all: the last node to come opens the next
  round, and those that wait follow it there.
- All of these times are the file server's, so the nodes' clocks do not matter.

So the one thing that is not seen through is a node that is started twice, or nodes of two jobs
that have one PATH and no batch system. They differ in --nodes or the number of processes, which is
refused; or they do not, and then give them different files.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mini_llm.command_line import UsageError

LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Registration:
    """What a node tells the others; ``port`` is used of node 0's alone."""

    host: str
    address: str
    port: int
    nodes: int
    processes: int


@dataclass(frozen=True)
class Meeting:
    """All nodes of a job in the order of their ranks, and this node's rank."""

    rank: int
    registrations: list[Registration]


def meet(path: str, mine: Registration, job: str, seconds: float) -> Meeting:
    """Wait until ``mine.nodes`` nodes are here. Raises UsageError if they do not come in time."""
    return _Meeting(Path(path), mine, job).wait(seconds)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """What would interrupt this thread does so at the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Meeting:
    def __init__(self, path: Path, mine: Registration, job: str) -> None:
        if not path.parent.is_dir():
            raise UsageError(
                f"--rendezvous_file {path}: there is no folder {path.parent}; give a path on a "
                "file system that all nodes share"
            )
        self._path = path
        self._mine = mine
        self._job = job
        self._round = self._rank = -1
        self._since = 0.0  # when this registration was made, by the file server's clock

    def wait(self, seconds: float) -> Meeting:
        deadline = time.monotonic() + seconds
        try:
            self._register(max(self._rounds(), default=1))
            while True:
                if not self._touch():  # deleted, with an older round
                    self._register(max(self._rounds(), default=self._round))
                registrations, touched = self._read()
                self._check_agree(registrations)
                alive = all(moment >= self._since for moment in touched.values())
                if len(registrations) == self._mine.nodes and alive:
                    break
                newest = max(self._rounds(), default=self._round)
                if newest > self._round:
                    self._withdraw()
                    self._register(newest)
                    continue
                if time.monotonic() > deadline:
                    raise self._too_late(registrations, seconds)
                time.sleep(LOOK_SECONDS)
            self._touch()  # for the one that came last: this node was still here
        except BaseException:
            self._withdraw()
            raise
        if self._rank == 0:
            self._delete_rounds_before(self._round)
        return Meeting(self._rank, [registrations[rank] for rank in range(self._mine.nodes)])

    # -------------------------------------------------------------- files

    def _file(self, round_: int, rank: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{self._job}.{round_}.{rank}")

    def _files(self) -> list[tuple[int, int]]:
        """(round, rank) of every registration of this job."""
        pattern = re.compile(rf"{re.escape(self._path.name)}\.{self._job}\.(\d+)\.(\d+)")
        found = (pattern.fullmatch(name) for name in os.listdir(self._path.parent))
        return [(int(match[1]), int(match[2])) for match in found if match]

    def _rounds(self) -> set[int]:
        return {round_ for round_, _ in self._files()}

    def _register(self, round_: int) -> None:
        """Take the lowest free rank of this round or of a later one."""
        content = (json.dumps(dataclasses.asdict(self._mine)) + "\n").encode()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        self._round = self._rank = -1
        while True:
            for rank in range(self._mine.nodes):
                with contextlib.suppress(FileExistsError):
                    with _signals_wait():  # from here on this node knows what to delete
                        file = os.open(self._file(round_, rank), flags, 0o644)
                        self._round, self._rank = round_, rank
                    os.write(file, content)
                    os.close(file)
                    self._since = self._own_file().stat().st_mtime
                    return
            round_ += 1

    def _own_file(self) -> Path:
        return self._file(self._round, self._rank)

    def _touch(self) -> bool:
        """Show that this node is alive; False if its file is gone."""
        try:
            os.utime(self._own_file())  # to the file server's time
        except FileNotFoundError:
            return False
        return True

    def _withdraw(self) -> None:
        self._own_file().unlink(missing_ok=True)

    def _read(self) -> tuple[dict[int, Registration], dict[int, float]]:
        """This round's registrations by rank, and when each was touched last."""
        registrations, touched = {}, {self._rank: self._since}
        for rank in sorted(rank for of, rank in self._files() if of == self._round):
            with contextlib.suppress(FileNotFoundError):  # withdrawn meanwhile
                # An open file is looked at afresh, also where the file system caches.
                with self._file(self._round, rank).open() as file:
                    text = file.read()
                    touched[rank] = os.fstat(file.fileno()).st_mtime
                if text.endswith("\n"):  # else it is still being written
                    registrations[rank] = Registration(**json.loads(text))
        return registrations, touched

    def _delete_rounds_before(self, round_: int) -> None:
        for old, rank in self._files():
            if old < round_:
                self._file(old, rank).unlink(missing_ok=True)

    # -------------------------------------------------------------- sentences

    def _check_agree(self, registrations: dict[int, Registration]) -> None:
        for rank, other in sorted(registrations.items()):
            for flag, ours, theirs in (
                ("--nodes", self._mine.nodes, other.nodes),
                ("--procs_per_node", self._mine.processes, other.processes),
            ):
                if ours != theirs:
                    raise UsageError(
                        f"--rendezvous_file {self._path}: node {rank} ({other.host}) has {flag} "
                        f"{theirs} but this one {ours}; give all nodes the same, or two jobs two "
                        "files"
                    )

    def _too_late(self, registrations: dict[int, Registration], seconds: float) -> UsageError:
        here = ", ".join(f"{rank} ({other.host})" for rank, other in sorted(registrations.items()))
        missing = [str(r) for r in range(self._mine.nodes) if r not in registrations]
        return UsageError(
            f"--rendezvous_file {self._path}: within {seconds:.0f} s only {len(registrations)} of "
            f"{self._mine.nodes} nodes came: {here}; node {', '.join(missing)} did not: start the "
            "same command there, and check that it sees this file"
        )
