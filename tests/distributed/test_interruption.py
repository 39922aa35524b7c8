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
PATIENCE = 90.0


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
    assert not any(psutil.pid_exists(rank.pid) for rank in ranks)


@pytest.mark.slow  # the launcher takes 30 seconds to give a hanging rank up
def test_rank_that_hangs_ends_the_job_within_the_stated_time(start):
    run = start("--ddp_timeout", "5")
    run.wait_for_step(3)
    hanging = run.ranks()[1]
    hanging.suspend()
    started = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - started < 5 + 60
    assert not psutil.pid_exists(hanging.pid)
    # The other rank says first that it waits: by its watchdog, or gloo where that was faster.
    words = ("nothing has got done for 5 s (--ddp_timeout)", "Timed out waiting 5000ms")
    assert any(word in run.output() for word in words), run.output()
    # And where: in whichever collective of the step the other was stopped before.
    assert re.search(r"recipes/pretrain.py\", line \d+,? in ", run.output()), run.output()


def test_time_limit_saves_and_ends_with_status_0(tiny_data: TinyData, tmp_path: Path) -> None:
    flags = [*TINY_RUN, *tiny_data.flags, "--output_dir", str(tmp_path / "run")]
    done = launch(
        *flags, "--max_steps", "100000", "--max_hours", "0.0005", "--save_minutes", "0.01"
    )
    assert "the allotted time is over (--max_hours)" in done.stdout
    last = metrics(tmp_path / "run")[-1]["step"]
    steps = saved_steps(tmp_path / "run")
    assert steps[-1] == last < 100_000
    assert len(steps) == 2  # those of --save_minutes were rotated
    assert len(series(tmp_path / "run", "train/loss")) == last
    assert os.access(tmp_path / "run/checkpoints" / f"step-{last}" / "files.json", os.R_OK)
