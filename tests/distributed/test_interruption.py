"""Stopping a run on purpose or by force: what it leaves, how it ends, and that it goes on."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import TinyData
from tests.launching import (
    REPOSITORY,
    TINY_RUN,
    launch,
    launch_command,
    launch_environment,
    metrics,
    series,
)

STEPS = 20_000  # more than any of these runs lives to see
PATIENCE = 300.0  # for what must come; a busy machine takes a minute to start a run


class Run:
    """A launched run of 2 ranks under ZeRO-1 that goes on while the test looks at it."""

    def __init__(self, output_dir: Path, *flags: str, **options: Any) -> None:
        self.output_dir = output_dir
        # One of its own for every launch: what is left of an earlier one may still write.
        name = f"{output_dir.name}-{len(list(output_dir.parent.glob('*.log')))}.log"
        self._log = (output_dir.parent / name).open("w+")
        self.process = subprocess.Popen(
            launch_command("--output_dir", str(output_dir), *flags, **options),
            cwd=REPOSITORY,
            env=launch_environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """The processes of the recipe that are alive, in no order."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line
                    if "recipes/pretrain.py" in " ".join(child.cmdline()):
                        found.append(child)
        return found

    def output(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self.output_dir / "metrics.jsonl").exists() or (
            max((m["step"] for m in metrics(self.output_dir)), default=0) < step
        ):
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.05)

    def wait_for(self, words: str, times: int = 1) -> None:
        """Until that many lines of its output hold these words."""
        deadline = time.monotonic() + PATIENCE
        while sum(words in line for line in self.output().splitlines()) < times:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tiny_data: TinyData, tmp_path: Path) -> Iterator[Any]:
    runs = []

    def start(*flags: str, **options: Any) -> Run:
        flags = (*TINY_RUN, *tiny_data.flags, "--max_steps", str(STEPS), *flags)
        runs.append(Run(tmp_path / "run", *flags, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def saved_steps(run: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*"))


def test_sigterm_to_the_ranks_saves_and_ends_with_status_0_and_the_same_command_goes_on(start):
    run = start()
    run.wait_for_step(5)
    # Only one is told: the others must stop after the same step all the same.
    run.ranks()[1].send_signal(signal.SIGTERM)
    assert run.wait() == 0, run.output()
    (step,) = saved_steps(run.output_dir)
    assert 5 <= step < STEPS and metrics(run.output_dir)[-1]["step"] == step
    assert f"stopping at step {step}: " in run.output()
    assert not (run.output_dir / "final").exists()
    again = start("--stop_at_step", str(step + 5))
    assert again.wait() == 0, again.output()
    steps = [m["step"] for m in metrics(run.output_dir)]
    assert steps == list(range(1, step + 6))


def test_signal_to_launch_sh_saves_and_ends_with_status_0(tiny_data: TinyData, tmp_path: Path):
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["./launch.sh", "pretrain", *flags, "--max_steps", str(STEPS)],
            cwd=REPOSITORY,
            env=launch_environment({"MINI_LLM_VENV": sys.prefix}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        while "step     5/" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    assert "SIGINT was received; the same command goes on" in (tmp_path / "log").read_text()
    assert len(saved_steps(tmp_path / "run")) == 1


@pytest.mark.slow
def test_launcher_that_is_killed_takes_its_ranks_with_it_and_they_save(start):
    run = start()
    run.wait_for_step(5)
    ranks = run.ranks()
    assert len(ranks) == 2
    run.process.send_signal(signal.SIGKILL)
    # A second run waits for them, then goes on where they stopped.
    again = start()
    again.wait_for("resumed at step ")
    assert not any(psutil.pid_exists(rank.pid) for rank in ranks)
    (step,) = saved_steps(run.output_dir)
    assert step >= 5 and f"resumed at step {step}" in again.output()
    assert "the launcher" in run.output() and "is gone" in run.output()


@pytest.mark.slow
def test_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(start, monkeypatch):
    run = start()
    run.wait_for_step(2)
    monkeypatch.setenv("MINI_LLM_LOCK_PATIENCE", "1")
    second = start()
    assert second.wait() == 2 or second.wait() == 1
    assert "in use by another run (process" in second.output()
    assert run.process.poll() is None


def test_rank_that_is_killed_ends_the_job_and_the_launcher_names_it(start):
    run = start()
    run.wait_for_step(3)
    ranks = run.ranks()
    killed = ranks[1]
    killed.kill()
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 60
    assert "SIGKILL" in run.output() and str(killed.pid) in run.output()
    # So does the rank that lost it, whose own error only says that a connection is gone.
    (words,) = re.findall(rf"rank \d \(host \S+, process {killed.pid}\) is late.*", run.output())
    assert "its process is gone" in words
    assert not any(psutil.pid_exists(rank.pid) for rank in ranks)


def log_of(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize(
    ("place", "frame", "phase"),
    [
        ("reading_data", "hanging_rank.py:", "reading data"),
        ("forward", "causal_lm.py:", "forward and backward"),
    ],
)
@pytest.mark.slow
def test_rank_that_hangs_is_named_with_its_stack_and_all_ranks_end(
    tiny_data: TinyData, tmp_path: Path, place: str, frame: str, phase: str
) -> None:
    run = tmp_path / "run"
    *launcher, _ = launch_command()
    command = [*launcher, "tests/distributed/hanging_rank.py", place, "6", *TINY_RUN]
    command += [*tiny_data.flags, "--output_dir", str(run), "--ddp_timeout", "10"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0, done.stdout
    # Call number 6 is of step 4: two micro-batches a step.
    found = re.findall(r"rank 1 \(host (\S+), process \d+\) is late at step 4, (.*)", done.stdout)
    assert len(found) == 1, done.stdout  # one rank of the host says it
    ((host, why),) = found
    assert host == os.uname().nodename and why.startswith(f"{phase}: it is behind rank 0")
    assert frame in why and "sleep_for_ever" in why
    for rank in (0, 1):
        log = log_of(run, rank)
        assert f"is late at step 4, {why}" in log
        stacks = log[log.index("the stacks of all Python threads") :]
        assert ("in sleep_for_ever" in stacks) == (rank == 1)
        assert re.search(r"recipes/pretrain.py\", line \d+, in main", stacks)
    assert "distributed_c10d.py" in log_of(run, 0)  # where rank 0 waits


@pytest.mark.slow  # the launcher takes 30 seconds to give a suspended rank up
def test_rank_that_is_suspended_is_named_and_ends_the_job_within_the_stated_time(start):
    run = start("--ddp_timeout", "10")
    run.wait_for_step(3)
    hanging = run.ranks()[1]
    hanging.suspend()
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 10 + 60
    assert not psutil.pid_exists(hanging.pid)
    (words,) = re.findall(rf"rank \d \(host \S+, process {hanging.pid}\) is late.*", run.output())
    assert "no sign of life since" in words and "its process is suspended" in words
    # The other's log says where it waits: in whichever collective of the step came next.
    logs = [log_of(run.output_dir, rank) for rank in (0, 1)]
    (waiting,) = [log for log in logs if "the stacks of all Python threads" in log]
    assert re.search(r"recipes/pretrain.py\", line \d+, in main", waiting) and words in waiting


@pytest.mark.slow
def test_time_limit_saves_and_ends_with_status_0(tiny_data: TinyData, tmp_path: Path) -> None:
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
    # 11 s for what a second is enough for: on a busy machine the first step takes long.
    done = launch(*flags, "--max_steps", "100000", "--max_hours", "0.003", "--save_minutes", "0.01")
    assert "the allotted time is over (--max_hours)" in done.stdout
    last = metrics(tmp_path / "run")[-1]["step"]
    steps = saved_steps(tmp_path / "run")
    assert steps[-1] == last < 100_000
    assert len(steps) == 2  # those of --save_minutes were rotated
    assert len(series(tmp_path / "run", "train/loss")) == last
    assert os.access(tmp_path / "run/checkpoints" / f"step-{last}" / "files.json", os.R_OK)
