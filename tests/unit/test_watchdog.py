"""Ranks whose loop is only a sleep, with the real watchdog and store: how they end, what they say.

Whole runs under the launcher: tests/distributed/test_interruption.py.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mini_llm.parallel import peers
from mini_llm.parallel.engine import limit_collectives
from mini_llm.parallel.hang_report import RankState
from mini_llm.parallel.watchdog import where_peer_was_missed
from tests.launching import launch_port

LIMIT = 4  # seconds, of which a busy machine may take some away
PATIENCE = 240.0  # for ranks that import torch on a busy machine
SCRIPT = """
import os, re, signal, sys, time
from pathlib import Path
import torch.distributed
from mini_llm.parallel import peers, rank_log, watchdog

peers.COLLECT_SECONDS = watchdog.COLLECT_SECONDS = 3.0
watchdog.REPORT_SECONDS = 10.0  # more than a report takes that waits for states in vain
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STUCK = WORLD_SIZE - 1

def wait_in_collective():
    while True:
        time.sleep(0.1)

def work():
    step = 0
    while RANK != STUCK or step < 5:
        step += 1
        watchdog.beat("reading data", step)
        time.sleep(0.3)  # in five steps the watchdog looks a few times
        watchdog.beat("optimizer step")
        if step == 6:
            wait_in_collective()
    watchdog.beat("reading data", 6)
    be_stuck()

def be_stuck():
    {stuck}

rank_log.open_rank_log(Path(sys.argv[1]))
watchdog.end_if_stuck({limit})
watchdog.report_exceptions()
while watchdog._peers is not None and watchdog._peers.last_contact > time.monotonic():
    time.sleep(0.05)  # until it is connected
# As the first collective would, wait for all: another may take long to import torch.
folder = Path(sys.argv[1])
(folder / f"connected-{{RANK}}").write_text(str(os.getpid()))
while len(list(folder.glob("connected-*"))) < WORLD_SIZE:
    time.sleep(0.05)
work()
"""


class Ranks:
    """Processes that share a store as ranks of one launch do; the last one gets stuck."""

    def __init__(self, folder: Path, stuck: str, world_size: int = 2) -> None:
        self.folder = folder
        port = str(launch_port())  # rank 0 takes it only when it has imported torch
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT.format(stuck=stuck, limit=LIMIT), str(folder)],
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")},
                    **{"RANK": str(rank), "WORLD_SIZE": str(world_size)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]

    def wait(self) -> list[tuple[int, str, str]]:
        """Status, stderr and log of every rank."""
        ended = []
        for rank, process in enumerate(self.processes):
            _, stderr = process.communicate(timeout=PATIENCE)
            log = (self.folder / "logs" / f"rank-{rank}.log").read_text()
            ended.append((process.returncode, stderr, log))
        return ended

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(stuck: str, **options) -> Ranks:
        started.append(Ranks(tmp_path, stuck, **options))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


@pytest.mark.slow  # under the launcher, test_interruption.py shows the same of two ranks
def test_all_ranks_write_their_stacks_and_the_same_report_which_one_prints(start):
    ended = start("wait_for_a_disk = time.sleep; wait_for_a_disk(600)", world_size=3).wait()
    assert [status for status, _, _ in ended] == [1, 1, 1]
    for rank, (_, stderr, log) in enumerate(ended):
        assert "rank 2 (host " in log and ") is late at step 6, reading data" in log
        assert ("is late" in stderr) == (rank == 0)
        own = "be_stuck" if rank == 2 else "wait_in_collective"
        stacks = log[log.index("the stacks of all") : log.index("is late")]
        assert f"in {own}\n" in stacks and "in work\n" in stacks


def test_a_suspended_rank_is_named_by_its_silence(start):
    ranks = start("os.kill(os.getpid(), signal.SIGSTOP)")
    _, stderr = ranks.processes[0].communicate(timeout=PATIENCE)
    assert ranks.processes[0].returncode == 1
    assert "rank 1 (host " in stderr and "its process is suspended" in stderr


def test_a_killed_process_that_is_still_on_its_way_out_at_first_is_reported_gone(monkeypatch):
    store = dist.HashStore()
    for rank in (0, 1):
        state = RankState(rank, os.uname().nodename, 100 + rank, 1, 1, "forward", "12:00:00 UTC")
        store.set(f"life/{rank}", json.dumps(asdict(state)))
    answered = replace(state, rank=0, pid=100, where="elsewhere")
    store.set("state/0", json.dumps(asdict(answered)))
    looks = iter(["its process is there, running, but cannot run Python", peers.GONE])
    monkeypatch.setattr(peers, "_fate", lambda pid: next(looks) if pid == 101 else "alive")
    monkeypatch.setattr(peers, "COLLECT_SECONDS", 0.3)
    report = peers.Peers(0, 2, 1.0, lambda: (1, 1, "forward"))._work_out(store)
    assert "rank 1" in report["text"] and f"({peers.GONE})" in report["text"]


@pytest.mark.slow
def test_a_rank_in_a_call_that_never_lets_go_of_python_is_named_and_still_leaves_its_stack(start):
    ranks = start("re.match('(a+)+$', 'a' * 60 + 'b')")
    (_, stderr, _), (status, _, log) = ranks.wait()
    assert "rank 1 (host " in stderr and "cannot run Python" in stderr
    assert status == 1 and "Timeout" in log and "in be_stuck" in log


def test_a_rank_that_fails_is_named_with_its_exception_by_those_that_wait_for_it(start):
    (_, stderr, _), (status, own, _) = start("raise ValueError('row 7 is broken')").wait()
    assert status == 1 and own.rstrip().endswith("ValueError: row 7 is broken")
    assert "failed at step 6, reading data: ValueError: row 7 is broken" in stderr


def test_a_rank_that_cannot_reach_the_main_node_says_so_and_ends(start):
    # Rank 0 holds the store, as the launcher of the main node does.
    kill = "os.kill(int((folder / 'connected-0').read_text()), signal.SIGKILL)"
    ranks = start(f"watchdog.rest('saving'); {kill}; time.sleep(600)")
    (killed, _, _), (status, stderr, log) = ranks.wait()
    assert killed == -signal.SIGKILL
    assert status == 1 and "lost contact with 127.0.0.1, the main node" in stderr
    assert "in be_stuck" in log


def test_a_rest_is_no_hang_and_what_is_none_is_one_also_without_other_ranks(start):
    rests = f"watchdog.rest('finishing'); time.sleep({2 * LIMIT}); watchdog.beat('stuck')"
    ((status, stderr, log),) = start(f"{rests}; time.sleep(600)", world_size=1).wait()
    assert status == 1 and f"nothing has got done for {LIMIT} s (--ddp_timeout)" in stderr
    assert "(stuck)" in stderr and "in be_stuck" in log


def raised(message: str, where: str) -> RuntimeError:
    """An error that a function of the file ``where`` raised."""
    try:
        exec(compile(f"raise RuntimeError({message!r})", where, "exec"))
    except RuntimeError as error:
        return error
    raise AssertionError


def test_only_a_collective_that_lost_its_peer_is_taken_for_anothers_fault():
    in_collective, elsewhere = "/v/torch/distributed/distributed_c10d.py", "/x/stream.py"
    gone = raised("Connection closed by peer", in_collective)
    (*_, call) = where_peer_was_missed(gone) or ()
    assert call.path == in_collective
    try:
        raise OSError("the checkpoint could not be written") from gone
    except OSError as error:
        assert where_peer_was_missed(error) is not None
    assert where_peer_was_missed(raised("invalid tensor size", in_collective)) is None
    assert where_peer_was_missed(raised("connection to the hub timed out", elsewhere)) is None


def test_every_process_group_leaves_the_watchdog_the_time_to_speak_first():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]  # the second as DeepSpeed makes its own
        limit_collectives(700)
        for group in groups:
            limit = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            assert limit > 700 + 10  # which a report may take
    finally:
        dist.destroy_process_group()
