"""mini_llm/launch/supervise.py and fan_out.py: signals, restarts, exit statuses, with stand-ins.

The "accelerate" of these tests is a small Python program with one child, its "rank".
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PATIENCE = 60.0

# A rank: says that it is ready and waits; on a signal it says which one, does as told, and leaves.
RANK = """
import os, signal, sys, time
from mini_llm.launch.note import write_note
def on_signal(number, frame):
    print("rank got", signal.Signals(number).name, flush=True)
    write_note("saved")
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
word, _, status = os.environ.get("RANK_DOES", "").partition(" ")
if word:
    if word != "nothing":
        write_note(word)
    sys.exit(int(status))
print("rank is ready", flush=True)
time.sleep(60)
"""
# `accelerate launch` and torchrun: a failed rank is status 1, a signal an error of one's own.
ACCELERATE = f"""
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}])
def on_signal(number, frame):
    print("accelerate got", signal.Signals(number).name, flush=True)
    rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, on_signal)
sys.exit(1 if rank.wait() else 0)
"""
SUPERVISE = f"""
import os, sys
from mini_llm.launch.supervise import supervise
def command(attempt):
    print("try", attempt, flush=True)
    return [sys.executable, "-c", {ACCELERATE!r}]
restarts, seconds = int(sys.argv[1]), float(sys.argv[2])
sys.exit(supervise(command, os.environ, max_restarts=restarts, wait_seconds=seconds,
                   hint_without_ranks="they meet"))
"""


class Program:
    """A program that runs while the test looks at what it says."""

    def __init__(self, code: str, *arguments: str, log: Path, **environment: str) -> None:
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.said().count(words) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        if program.process.poll() is None:
            for child in psutil.Process(program.process.pid).children(recursive=True):
                child.kill()
            program.process.kill()
            program.process.wait()


def supervised(
    programs: list[Program],
    tmp_path: Path,
    *,
    max_restarts: int = 0,
    wait_seconds: float = 0.1,
    **env: str,
) -> Program:
    arguments = (str(max_restarts), str(wait_seconds))
    programs.append(Program(SUPERVISE, *arguments, log=tmp_path / "log", **env))
    return programs[-1]


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGINT"),
        ("SIGUSR1", "SIGTERM"),
        ("SIGHUP", "SIGTERM"),  # the terminal was closed
    ],
)
def test_a_signal_reaches_the_rank_alone_which_saves_and_the_status_is_0(
    programs: list[Program], tmp_path: Path, sent: str, received: str
) -> None:
    run = supervised(programs, tmp_path, max_restarts=3)
    run.wait_for("rank is ready")
    run.process.send_signal(signal.Signals[sent])
    assert run.wait() == 0
    assert run.said().split("\n")[1:] == ["rank is ready", f"rank got {received}", ""]


def test_under_nohup_a_closed_terminal_stops_nothing(
    programs: list[Program], tmp_path: Path
) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        run = supervised(programs, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, former)
    run.wait_for("rank is ready")
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)  # were it handed on, the rank would say so first, and get SIGTERM
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 0
    assert run.said().split("\n")[1:] == ["rank is ready", "rank got SIGINT", ""]


def test_sigusr1_to_every_process_as_slurm_sends_it_saves_too(
    programs: list[Program], tmp_path: Path
) -> None:
    run = supervised(programs, tmp_path)
    run.wait_for("rank is ready")
    processes = [psutil.Process(run.process.pid)]
    processes += processes[0].children(recursive=True)
    assert len(processes) == 3
    for process in reversed(processes):  # the rank first, which it must not kill
        process.send_signal(signal.SIGUSR1)
    assert run.wait() == 0
    assert "rank got SIGTERM" in run.said() and "accelerate got" not in run.said()


def test_a_signal_to_every_process_is_a_stop_on_purpose_and_not_started_again(
    programs: list[Program], tmp_path: Path
) -> None:
    run = supervised(programs, tmp_path, max_restarts=3)
    run.wait_for("rank is ready")
    launcher = psutil.Process(run.process.pid)
    (accelerate,) = launcher.children()
    (rank,) = accelerate.children()
    rank.send_signal(signal.SIGTERM)
    psutil.wait_procs([rank], timeout=PATIENCE)
    for process in (accelerate, launcher):
        if process.is_running():
            process.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    assert "try 1" not in run.said()


@pytest.mark.parametrize(
    ("does", "status", "tries"),
    [
        ("nothing 0", 0, 1),
        ("nothing 1", 1, 3),
        ("finished 1", 0, 1),  # past the last barrier: what fails then is no failure of the run
        ("saved 1", 0, 1),
        ("refused 2", 2, 1),  # torchrun makes it 1; the next try would end likewise
    ],
)
def test_only_a_failure_starts_again_and_so_many_times_at_most(
    programs: list[Program], tmp_path: Path, does: str, status: int, tries: int
) -> None:
    run = supervised(programs, tmp_path, max_restarts=2, RANK_DOES=does)
    assert run.wait() == status
    assert run.said().count("try ") == tries
    failed = "the run failed with status 1; restart 1 of 2 in 0 s"
    assert (failed in run.said()) == (tries == 3)
    assert ("no restart is left of the 2 of --max_restarts" in run.said()) == (tries == 3)


def test_a_signal_between_two_tries_ends_the_waiting_with_the_failure(
    programs: list[Program], tmp_path: Path
) -> None:
    run = supervised(
        programs, tmp_path, max_restarts=1, wait_seconds=PATIENCE * 2, RANK_DOES="nothing 1"
    )
    run.wait_for("restart 1 of 1")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    assert "try 1" not in run.said()


def test_a_failure_of_a_rank_is_not_blamed_on_the_meeting(
    programs: list[Program], tmp_path: Path
) -> None:
    run = supervised(programs, tmp_path)
    run.wait_for("rank is ready")
    (accelerate,) = psutil.Process(run.process.pid).children()
    (rank,) = accelerate.children()
    time.sleep(1.5)  # longer than from one look for ranks to the next
    rank.kill()
    assert run.wait() == 1
    assert "no rank was started" not in run.said()


def test_a_launcher_without_ranks_yet_ends_at_the_first_signal(
    programs: list[Program], tmp_path: Path
) -> None:
    alone = "import time; print('alone', flush=True); time.sleep(60)"
    alone = "import time; print('alone', flush=True); time.sleep(60)"
    code = SUPERVISE.replace(repr(ACCELERATE), repr(alone))
    programs.append(Program(code, "3", "0.1", log=tmp_path / "log"))
    programs[-1].wait_for("alone")
    programs[-1].process.send_signal(signal.SIGTERM)
    assert programs[-1].wait() == 128 + signal.SIGTERM
    assert "try 1" not in programs[-1].said()
    assert "no rank was started" not in programs[-1].said()


def test_a_failure_before_there_are_ranks_says_where_the_nodes_were_to_meet(
    programs: list[Program], tmp_path: Path
) -> None:
    code = SUPERVISE.replace(repr(ACCELERATE), repr("raise SystemExit(1)"))
    programs.append(Program(code, "0", "0.1", log=tmp_path / "log"))
    assert programs[-1].wait() == 1
    assert "launch.sh: no rank was started on this node: they meet" in programs[-1].said()


# ------------------------------------------------------------------ a hostfile's hosts

# `ssh HOST LINE` as it would be there: a login shell that runs the line.
FAN_OUT = """
import os, sys
from mini_llm.launch import fan_out
grace = float(os.environ["GRACE"])
hosts = dict(zip(("here", "there"), sys.argv[2:]))
sys.exit(fan_out.fan_out({host: ["sh", sys.argv[1], host, f"exec /bin/sh -c '{line}'"]
                          for host, line in hosts.items()}, grace_seconds=grace))
"""
MARK = "echo mini_llm launcher process $$; "
LIVES_ON = MARK + 'trap "echo told; exit 0" TERM INT USR1; echo up; while :; do sleep 0.1; done'


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    (tmp_path / "ssh").write_text('shift\nexec sh -c "$1"\n')
    return tmp_path / "ssh"


def fanned_out(
    programs: list[Program], ssh: Path, *lines: str, grace_seconds: float = 30.0
) -> Program:
    environment = {"GRACE": str(grace_seconds)}
    programs.append(Program(FAN_OUT, str(ssh), *lines, log=ssh.with_name("log"), **environment))
    return programs[-1]


def fails_after(up: Path) -> str:
    """A line that ends with status 7 a second after the other host has made the file ``up``."""
    return MARK + f"while [ ! -e {up} ]; do sleep 0.1; done; sleep 1; exit 7"


def test_output_comes_with_the_hosts_name_and_all_succeed(
    programs: list[Program], ssh: Path
) -> None:
    run = fanned_out(programs, ssh, MARK + "echo one; echo two >&2", MARK + "echo three")
    assert run.wait() == 0
    assert sorted(run.said().splitlines()) == ["here: one", "here: two", "there: three"]


def test_when_one_host_fails_the_others_are_ended_and_its_status_is_kept(
    programs: list[Program], ssh: Path
) -> None:
    up = ssh.with_name("up")
    lives_on = LIVES_ON.replace("echo up;", f"touch {up};")
    run = fanned_out(programs, ssh, lives_on, fails_after(up))
    assert run.wait() == 7
    assert "launch.sh: there ended with status 7; ending the others" in run.said()
    assert "here: told" in run.said()


def test_a_host_that_does_not_end_when_told_is_killed(programs: list[Program], ssh: Path) -> None:
    up = ssh.with_name("up")
    deaf = MARK + f'trap "" TERM; touch {up}; while :; do sleep 0.1; done'
    run = fanned_out(programs, ssh, deaf, fails_after(up), grace_seconds=1.0)
    assert run.wait() == 7
    assert "launch.sh: here has not ended; killing its launcher" in run.said()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_every_host(programs: list[Program], ssh: Path, sent: int) -> None:
    run = fanned_out(programs, ssh, LIVES_ON, LIVES_ON)
    run.wait_for(": up", times=2)
    run.process.send_signal(sent)
    assert run.wait() == 0
    assert "here: told" in run.said() and "there: told" in run.said()


def test_a_signal_while_a_connection_is_being_made_ends_it(
    programs: list[Program], ssh: Path
) -> None:
    run = fanned_out(programs, ssh, "echo no process yet; exec sleep 60")
    run.wait_for("here: no process yet")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
