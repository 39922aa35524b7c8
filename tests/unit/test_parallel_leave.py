"""A rank that has done everything ends with status 0, whatever the interpreter's teardown does."""

import subprocess
import sys

# What a rank's teardown may meet: a thread that aborts the process, here certain and not rare.
SCRIPT = """
import atexit, os
from accelerate import Accelerator
from mini_llm.parallel.engine import leave

class Tracker:
    def finish(self):
        print("tracker finished")

accelerator = Accelerator(cpu=True)
accelerator.trackers = [Tracker()]
atexit.register(os.abort)
print("trained", end="")
{end}
"""


def run(end: str) -> subprocess.CompletedProcess[str]:
    """Run SCRIPT with this as its last line."""
    command = [sys.executable, "-c", SCRIPT.format(end=end)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_teardown_that_aborts_does_not_fail_a_finished_run() -> None:
    assert run("accelerator.end_training()").returncode != 0
    done = run("leave(accelerator)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trainedtracker finished\n"  # finished, and nothing in a buffer was lost


def test_a_teardown_that_aborts_does_not_change_the_status_of_a_refusal() -> None:
    refuse = """
from mini_llm.parallel.environment import free_port
from mini_llm.training.arguments import stop
import torch
address = f"tcp://127.0.0.1:{free_port()}"
torch.distributed.init_process_group("gloo", address, rank=0, world_size=1)
stop("--model: no")
"""
    done = run(refuse)
    assert (done.returncode, done.stdout) == (2, "trained"), done.stderr
    assert done.stderr.endswith("error: --model: no\n")
