"""A run that is killed again and again ends with the losses of one that nobody touched."""

import contextlib
import random
import re
import time
from pathlib import Path

import psutil
import pytest

from mini_llm.training.checkpoint_files import list_checkpoints
from tests.conftest import TinyData
from tests.distributed.test_interruption import Run
from tests.launching import TINY_RUN, launch, series

KILLS = 20
STEPS = 240
SAVE_STEPS = 3  # so often that many a kill falls into a save


def newest_step(run_dir: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in list_checkpoints(run_dir)), default=0)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing_but_the_time(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    flags = [*TINY_RUN, *tiny_data.flags, "--max_steps", str(STEPS)]
    flags += ["--save_steps", str(SAVE_STEPS)]
    launch(*flags, "--output_dir", str(tmp_path / "whole"))
    draw = random.Random(0)
    run_dir = tmp_path / "run"
    killed_alive = killed_saving = 0
    for kill in range(KILLS):
        saved = newest_step(run_dir)
        run = Run(run_dir, *flags)
        # Counted in steps, for machines of any speed; some kills fall into the start, before any.
        run.wait_for("step ", times=draw.choice([0, *range(1, 9)]))
        time.sleep(draw.uniform(0.0, 0.1))
        killed_alive += run.process.poll() is None
        everything = [run.process.pid, *(rank.pid for rank in run.ranks())]
        # The whole tree, the launcher alone, one rank alone, the other one.
        victims = (everything, everything[:1], everything[1:2], everything[2:])[kill % 4]
        for pid in victims or everything:  # there are no ranks yet
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        killed_saving += any((run_dir / "checkpoints").glob(".step-*"))
        # What was saved when it began is not lost; the next run begins at once, and waits for
        # what is left of this one.
        resumed = re.search(r"resumed at step (\d+)", run.output())
        assert resumed is None or int(resumed[1]) >= saved, run.output()
        assert "damaged" not in run.output() and "warning" not in run.output(), run.output()
    assert killed_alive == KILLS and killed_saving >= 2
    last = Run(run_dir, *flags)
    assert last.process.wait(600) == 0, last.output()
    for key in ("train/loss", "train/grad_norm", "train/tokens"):
        assert series(run_dir, key) == series(tmp_path / "whole", key), key
    final = (run_dir / "final" / "model.safetensors").read_bytes()
    assert final == (tmp_path / "whole" / "final" / "model.safetensors").read_bytes()
    assert not list((run_dir / "checkpoints").glob(".step-*"))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in str(p.info)]
