"""mini_llm/launch/rendezvous.py: nodes meet through files; what others left there is no node."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mini_llm.command_line import UsageError
from mini_llm.launch import rendezvous
from mini_llm.launch.command import REPOSITORY
from mini_llm.launch.rendezvous import Meeting, Registration, meet

SECONDS = 30.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes look ten times a second."""
    monkeypatch.setattr(rendezvous, "LOOK_SECONDS", 0.1)


def node(number: int, nodes: int = 2, processes: int = 1) -> Registration:
    return Registration(f"host{number}", f"10.0.0.{number}", 29500 + number, nodes, processes)


class Nodes:
    """Nodes that start the same command, each in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._threads = ThreadPoolExecutor(max_workers=16)

    def start(
        self, mine: Registration, job: str = "job", seconds: float = SECONDS
    ) -> "Future[Meeting]":
        return self._threads.submit(meet, str(self.path), mine, job, seconds)

    def wait_for_files(self, count: int) -> None:
        deadline = time.monotonic() + SECONDS
        while len(self.files()) < count:
            assert time.monotonic() < deadline, self.files()
            time.sleep(0.01)

    def files(self) -> list[str]:
        return sorted(os.listdir(self.path.parent))


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path / "meet")


def test_nodes_that_start_at_once_get_different_ranks_and_the_same_list(nodes: Nodes) -> None:
    meetings = [nodes.start(node(number, nodes=6)) for number in range(6)]
    found = [meeting.result(SECONDS) for meeting in meetings]
    assert sorted(meeting.rank for meeting in found) == list(range(6))
    (registrations,) = {tuple(meeting.registrations) for meeting in found}
    for number, meeting in enumerate(found):
        assert registrations[meeting.rank] == node(number, nodes=6)


def test_the_first_node_is_node_0(nodes: Nodes) -> None:
    first = nodes.start(node(1))
    nodes.wait_for_files(1)
    second = nodes.start(node(2))
    assert (first.result(SECONDS).rank, second.result(SECONDS).rank) == (0, 1)
    assert second.result().registrations[0] == node(1)


def test_a_node_that_comes_while_another_looks_learns_that_it_is_still_there(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, later = rendezvous._Meeting._read, []

    def read_late(self: rendezvous._Meeting) -> tuple[dict[int, Registration], dict[int, float]]:
        if self._mine == node(1) and not later:  # it has touched its file, and goes on at once
            time.sleep(0.1)
            later.append(nodes.start(node(2), seconds=5))
            nodes.wait_for_files(2)
        return read(self)

    monkeypatch.setattr(rendezvous._Meeting, "_read", read_late)
    assert nodes.start(node(1)).result(SECONDS).rank == 0
    assert later[0].result(SECONDS).rank == 1


def meet_twice(nodes: Nodes, numbers: tuple[int, int]) -> tuple[Meeting, Meeting]:
    first, second = (nodes.start(node(number)) for number in numbers)
    return first.result(SECONDS), second.result(SECONDS)


def test_the_next_job_with_the_same_file_meets_anew_and_clears_up(nodes: Nodes) -> None:
    meet_twice(nodes, (1, 2))
    before = nodes.files()
    for meeting in meet_twice(nodes, (3, 4)):
        assert {other.host for other in meeting.registrations} == {"host3", "host4"}
    after = nodes.files()
    assert len(before) == len(after) == 2 and not set(before) & set(after)


def test_a_node_of_a_job_that_is_running_meets_nobody(nodes: Nodes) -> None:
    meet_twice(nodes, (1, 2))
    with pytest.raises(UsageError, match="only 1 of 2 nodes came: 0 \\(host3\\); node 1 did not"):
        nodes.start(node(3), seconds=0.5).result(SECONDS)


def leave_as_killed(nodes: Nodes, rank: int, nodes_of_job: int) -> None:
    """A registration, made a moment ago, that nobody will touch or delete any more."""
    text = json.dumps(dataclasses.asdict(node(9, nodes=nodes_of_job)))
    path = nodes.path.with_name(f"meet.job.1.{rank}")
    path.write_text(text + "\n")
    os.utime(path, (time.time() - 1, time.time() - 1))


@pytest.mark.parametrize(("count", "killed"), [(2, [0]), (3, [1]), (3, [0, 2])])
def test_nodes_that_were_killed_while_they_waited_are_not_taken_for_ones(
    nodes: Nodes, count: int, killed: list[int]
) -> None:
    for rank in killed:
        leave_as_killed(nodes, rank, count)
    meetings = [nodes.start(node(number, count)) for number in range(count - 1)]
    time.sleep(0.5)
    assert not any(meeting.done() for meeting in meetings)
    meetings.append(nodes.start(node(count - 1, count)))
    hosts = {f"host{number}" for number in range(count)}
    for meeting in meetings:
        assert {other.host for other in meeting.result(SECONDS).registrations} == hosts
    assert len(nodes.files()) == count  # the killed ones' are gone


def test_a_node_that_gives_up_or_is_interrupted_leaves_its_rank_to_others(nodes: Nodes) -> None:
    with pytest.raises(UsageError) as late:
        nodes.start(node(1, nodes=3), seconds=0.3).result(SECONDS)
    assert "within 0 s only 1 of 3 nodes came: 0 (host1); node 1, 2 did not" in str(late.value)
    assert nodes.files() == []
    assert {meeting.rank for meeting in meet_twice(nodes, (2, 3))} == {0, 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_waits_for_others_clears_up_at_a_signal(
    nodes: Nodes, number: signal.Signals
) -> None:
    flags = ["--nodes", "2", "--rendezvous_file", str(nodes.path), "--network_interface", "lo"]
    waiting = subprocess.Popen(
        [sys.executable, "-m", "mini_llm.launch", "pretrain", *flags],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
    )
    nodes.wait_for_files(1)
    waiting.send_signal(number)
    assert waiting.communicate(timeout=SECONDS)[1] == b""
    assert waiting.returncode == 128 + number
    assert nodes.files() == []


INTERRUPTED_WHILE_IT_REGISTERS = """
import os, signal, sys
from mini_llm.launch import rendezvous

real_open = os.open

def open_and_interrupt(path, *arguments):
    file = real_open(path, *arguments)
    if "meet" in str(path):
        os.kill(os.getpid(), signal.SIGTERM)
    return file

os.open = open_and_interrupt
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
rendezvous.meet(sys.argv[1], rendezvous.Registration("h", "a", 1, 2, 1), "job", 5)
"""


def test_a_signal_in_the_moment_of_registering_leaves_no_file(nodes: Nodes) -> None:
    command = [sys.executable, "-c", INTERRUPTED_WHILE_IT_REGISTERS, str(nodes.path)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=SECONDS, check=False).returncode == 7
    assert nodes.files() == []


def test_jobs_of_a_batch_system_do_not_meet_each_other(nodes: Nodes) -> None:
    ours, theirs = nodes.start(node(1), job="7_0"), nodes.start(node(8), job="8_0")
    nodes.wait_for_files(2)
    more = nodes.start(node(2), job="7_0"), nodes.start(node(9), job="8_0")
    assert [other.host for other in ours.result(SECONDS).registrations] == ["host1", "host2"]
    assert [other.host for other in theirs.result(SECONDS).registrations] == ["host8", "host9"]
    assert all(meeting.result(SECONDS).rank == 1 for meeting in more)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (node(2, nodes=3), "--nodes"),
        (node(2, processes=8), "--procs_per_node"),
    ],
)
def test_nodes_that_differ_are_refused_with_what_differs(
    nodes: Nodes, other: Registration, sentence: str
) -> None:
    waiting = nodes.start(node(1))
    nodes.wait_for_files(1)
    with pytest.raises(UsageError, match=f"node . \\(host.\\) has {sentence} . but this one ."):
        nodes.start(other).result(SECONDS)
    with pytest.raises(UsageError):  # it may have seen the other, or waits in vain
        Nodes(nodes.path).start(node(3, nodes=1, processes=5)).result(SECONDS)
        waiting.result(SECONDS)


def test_a_registration_that_is_still_being_written_is_waited_for(nodes: Nodes) -> None:
    half = nodes.path.with_name("meet.job.1.0")
    half.write_text('{"host": "host1", "addr')
    ours = nodes.start(node(2))
    stop = threading.Event()
    alive = keep_touching(half, stop)
    time.sleep(0.5)
    assert not ours.done()
    with half.open("w") as file:
        file.write('{"host": "host1", "address": "a", "port": 1, "nodes": 2, "processes": 1}\n')
    assert ours.result(SECONDS).registrations[0].host == "host1"
    stop.set()
    alive.join()


def keep_touching(path: Path, stop: threading.Event) -> threading.Thread:
    def touch() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    return thread


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="there is no folder /no/such"):
        meet("/no/such/file", node(1), "job", 1)
