"""The pretraining recipe whose checkpoints are written only once the run waits for them.

``accelerate launch held_write.py CALL FACTOR flags…``, with one bad micro-batch as in
bad_gradient.py (CALL -1: none). Rank 1's threads hold back, whatever time the steps take.
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.snapshot import Snapshot
from mini_llm.training.arguments import PretrainArguments, parse_arguments
from mini_llm.training.saving import CheckpointWriter
from recipes import pretrain
from tests.distributed import bad_gradient

write, wait = Snapshot.write, CheckpointWriter.wait
is_waited_for = threading.Event()


def held_write(self: Snapshot) -> None:
    """Snapshot.write, not yet."""
    if os.environ["RANK"] == "1":
        is_waited_for.wait()
    write(self)


def releasing_wait(self: CheckpointWriter) -> None:
    """CheckpointWriter.wait, for which a thread holds back."""
    is_waited_for.set()
    wait(self)
    is_waited_for.clear()


if __name__ == "__main__":
    Snapshot.write = held_write  # type: ignore[method-assign]
    CheckpointWriter.wait = releasing_wait  # type: ignore[method-assign]
    pretrain.combine_losses = bad_gradient.with_a_bad_one  # type: ignore[assignment]
    quickstart = "recipes/configs/quickstart/pretrain.yaml"
    pretrain.main(parse_arguments(PretrainArguments, quickstart, sys.argv[3:]))
