"""Runs of a recipe whose reads of tensors are noted: ``accelerate launch watched_steps.py FILE``.

FILE is as for several_runs.py. Each rank writes ``watched-RANK.json`` into the run's folder: for
every optimizer step the lines of this project that made the host wait for a tensor's value, as a
GPU would make it; and, by a clock of its own, when each interval of the throughput was read and how
many tokens had been collated until then.
"""

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mini_llm.training.interruption import Interruption
from mini_llm.training.timing import StepTimer
from recipes import pretrain
from tests.distributed import several_runs

REPOSITORY = Path(__file__).resolve().parents[2]
READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
NOT_COUNTED = (
    # It reads what it copied a step ago, so the device has work while the host waits, if it does.
    "mini_llm/parallel/transfer.py",
    # What a model reads on a CPU it does not on a GPU: tests/parity looks at that.
    "mini_llm/models/",
)


class Watch:
    """What a rank did, step by step."""

    def __init__(self) -> None:
        self.step = 0
        self.reads: dict[int, list[str]] = defaultdict(list)
        self.tokens = 0
        self.intervals: list[tuple[int, float, int]] = []  # step, seconds, tokens so far

    def note_read(self, method: str) -> None:
        """Note the line of this project, if it is one, that calls a tensor's ``method``."""
        frame = sys._getframe(2)
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(REPOSITORY / ours) for ours in ("mini_llm", "recipes")):
            where = str(path.relative_to(REPOSITORY))
            if not where.startswith(NOT_COUNTED):
                self.reads[self.step].append(f"{where}:{frame.f_lineno} {method}")

    def write(self, folder: Path) -> None:
        """``watched-RANK.json``."""
        content = {"reads": self.reads, "intervals": self.intervals}
        (folder / f"watched-{os.environ['RANK']}.json").write_text(json.dumps(content))


@contextlib.contextmanager
def watched(flags: list[str]) -> Iterator[None]:
    """Watch the run with these flags."""
    watch = Watch()
    folder = Path(flags[flags.index("--output_dir") + 1])

    def reading(method: str, original: Any) -> Any:
        def read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            watch.note_read(method)
            return original(self, *args, **options)

        return read

    for method in READS:
        setattr(torch.Tensor, method, reading(method, getattr(torch.Tensor, method)))

    wishes, read, collate = Interruption.wishes, StepTimer.read, pretrain.collate

    def begin_step(self: Any) -> Any:
        watch.step += 1
        return wishes(self)

    def read_interval(self: Any) -> Any:
        watch.intervals.append((watch.step, time.monotonic(), watch.tokens))
        found = read(self)
        watch.write(folder)
        return found

    def count_tokens(rows: Any, device: Any) -> Any:
        watch.tokens += sum(len(row["input_ids"]) for row in rows)
        return collate(rows, device)

    Interruption.wishes = begin_step  # type: ignore[method-assign]
    StepTimer.read = read_interval  # type: ignore[method-assign]
    pretrain.collate = count_tokens
    yield


if __name__ == "__main__":
    several_runs.run_all(Path(sys.argv[1]), watched)
