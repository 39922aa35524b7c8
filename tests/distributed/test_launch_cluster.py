"""A hostfile and SLURM, with stand-ins for pdsh, srun and scontrol that run things on this machine.

Two "nodes" on 127.0.0.1, each with its own launch.sh and one rank, really train.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import TinyData
from tests.launching import (
    REPOSITORY,
    TINY_RUN,
    facts,
    launch,
    launch_environment,
    launch_port,
    metrics,
    series,
)

STEPS = 3
PATIENCE = 600.0

# pdsh -S -N -R ssh -w HOST LINE
PDSH = """#!/bin/sh
[ "$1 $2 $3 $4 $5" = "-S -N -R ssh -w" ] || exit 9
echo "$6" >> "$CALLS"
exec sh -c "$7"
"""
# srun FLAGS ./launch.sh …: one task a node, with what SLURM tells it; ends with the highest status.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
pids=()
for node in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=$node \
    SLURM_PROCID=$node SLURM_STEP_NODELIST='made-up[1-2]' "$@" >"$LOGS/node$node.log" 2>&1 &
  pids+=($!)
done
echo "${pids[*]}" >"$LOGS/step"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) printf '127.0.0.1\\nmade-up2\\n' ;;
  *) echo "$@" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with these tools."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (("pdsh", PDSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    mine = {"PATH": path, "MINI_LLM_VENV": sys.prefix, "CALLS": str(tmp_path / "calls")}
    return launch_environment({**mine, "LOGS": str(tmp_path)})


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def test_arguments_that_ranks_refuse_end_with_one_sentence_and_status_2_and_are_not_tried_again(
    machine: dict[str, str],
) -> None:
    words = ["./launch.sh", "pretrain", "--procs_per_node", "2", "--max_restarts", "3"]
    done = subprocess.run(
        [*words, "--max_stepz", "3"],
        cwd=REPOSITORY,
        env=machine,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 1 and said[0].startswith("error: unknown flag --max_stepz"), done.stderr


@pytest.mark.slow
def test_a_hostfile_trains_on_its_hosts_as_on_one_node_and_shows_who_says_what(
    tiny_data: TinyData, tmp_path: Path, machine: dict[str, str]
) -> None:
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    flags = [*TINY_RUN, *tiny_data.flags, "--max_steps", str(STEPS)]
    done = subprocess.run(
        [
            *("./launch.sh", "pretrain", "--hostfile", str(tmp_path / "hosts")),
            *("--config_file", "accelerate_configs/zero2.yaml", "--main_ip", "127.0.0.1"),
            *("--main_port", str(launch_port())),
            *(*flags, "--output_dir", str(tmp_path / "run")),
        ],
        cwd=REPOSITORY,
        env=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "calls").read_text().splitlines() == ["first", "second"]
    assert "first:      node  0 of 2" in done.stdout and "second:      node  1 of 2" in done.stdout
    assert f"first: the trained model is in {tmp_path}/run/final" in done.stdout
    launch(*flags, "--output_dir", str(tmp_path / "alone"), config="zero2")
    found = facts(tmp_path / "run")
    assert (found["world_size"], found["zero_stage"]) == (2, 2)
    losses = series(tmp_path / "run", "train/loss")
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, series(tmp_path / "alone", "train/loss"), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_limit_is_requeued_and_finishes(
    tiny_data: TinyData,
    tmp_path: Path,
    machine: dict[str, str],
    started: list["subprocess.Popen[bytes]"],
) -> None:
    run = tmp_path / "run"
    job = {
        **{"SLURM_JOB_ID": str(launch_port()), "SLURM_JOB_NUM_NODES": "2", "OUTPUT_DIR": str(run)},
        **{
            "SLURM_JOB_NODELIST": "made-up[1-2]",
            "CONFIG": "recipes/configs/quickstart/pretrain.yaml",
        },
    }

    def sbatch(max_steps: int) -> "subprocess.Popen[bytes]":
        flags = [*TINY_RUN, *tiny_data.flags, "--max_steps", str(max_steps)]
        words = ["bash", "examples/pretrain.sbatch", "--main_port", str(launch_port()), *flags]
        with (tmp_path / "batch.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    words, cwd=REPOSITORY, env={**machine, **job}, stdout=log, stderr=log
                )
            )
        return started[-1]

    def said() -> str:
        return "".join((tmp_path / f"node{node}.log").read_text() for node in (0, 1))

    batch = sbatch(max_steps=5000)
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 5:
        assert time.monotonic() < deadline and batch.poll() is None, said()
        time.sleep(0.1)
    # As sbatch --signal=USR1@600 does: to every process of the step, not to the batch script.
    for pid in (tmp_path / "step").read_text().split():
        launcher = psutil.Process(int(pid))
        for process in [*reversed(launcher.children(recursive=True)), launcher]:
            process.send_signal(signal.SIGUSR1)
    assert batch.wait(PATIENCE) == 0, said()
    assert said().count("by SLURM, job") == 2 and "SIGTERM was received" in said()
    assert (tmp_path / "calls").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    stopped = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped}").is_dir() and not (run / "final").exists()

    (tmp_path / "calls").unlink()
    assert sbatch(max_steps=stopped + 3).wait(PATIENCE) == 0, said()
    assert f"resumed at step {stopped}" in said()
    assert [step["step"] for step in metrics(run)] == list(range(1, stopped + 4))
    assert (run / "final").is_dir() and not (tmp_path / "calls").exists()


@pytest.mark.slow
def test_nodes_of_which_one_lost_its_rank_meet_again_and_go_on(
    tiny_data: TinyData,
    tmp_path: Path,
    machine: dict[str, str],
    started: list["subprocess.Popen[bytes]"],
) -> None:
    run, port = tmp_path / "run", launch_port()
    last = 350  # so far from the checkpoint that is waited for that the rank dies before it
    for node in (0, 1):
        words = ["./launch.sh", "pretrain", "--max_restarts", "1", "--nodes", "2"]
        words += ["--node_rank", str(node), "--main_ip", "127.0.0.1", "--main_port", str(port)]
        words += [*TINY_RUN, *tiny_data.flags, "--max_steps", "400", "--save_steps", "50"]
        words += ["--stop_at_step", str(last)]
        with (tmp_path / f"node{node}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*words, "--output_dir", str(run)],
                    cwd=REPOSITORY,
                    env=machine,
                    stdout=log,
                    stderr=log,
                )
            )

    def said(node: int) -> str:
        return (tmp_path / f"node{node}.log").read_text()

    deadline = time.monotonic() + PATIENCE
    while "checkpoints/step-50" not in said(0):
        assert time.monotonic() < deadline and started[0].poll() is None, said(0)
        time.sleep(0.05)
    (accelerate,) = psutil.Process(started[1].pid).children()
    (rank,) = accelerate.children()
    rank.kill()
    assert [process.wait(PATIENCE) for process in started] == [0, 0], said(0) + said(1)
    for node in (0, 1):
        assert said(node).count("the run failed with status 1; restart 1 of 1 in 10 s") == 1
    assert "resumed at step " in said(0)
    assert [step["step"] for step in metrics(run)] == list(range(1, last + 1))
