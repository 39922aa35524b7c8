"""DeepSpeed alone, one process, a model of two numbers: what AdamW has done before the first step.

    python tests/distributed/engine_reproductions.py

prints a JSON object; test_engine_bugs.py reads it. Nothing of this project but the start-up is
used, so this is also what a bug report would show.
"""

# ruff: noqa: E402
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.parallel.engine import spare_cpu_the_extension_build
from mini_llm.parallel.environment import (
    end_process,
    join_as_single_process,
    prepare_environment,
)

prepare_environment()
join_as_single_process()
spare_cpu_the_extension_build()

import deepspeed
import torch
from torch import nn

LR = 0.5  # and w = 1 becomes 1 − LR · WEIGHT_DECAY = 0.75 by one step without a gradient
WEIGHT_DECAY = 0.5


def fresh(stage: int, bf16: bool) -> dict[str, Any]:
    """What an engine that has just been made holds: AdamW's step count and the fp32 weights."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2147483647,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    (master,) = optimizer.param_groups[0]["params"]  # the engine put its own in
    steps = [int(state["step"]) for state in optimizer.state.values()]
    return {"steps": max(steps, default=0), "weights": master.flatten()[:2].tolist()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):  # deepspeed prints there too
        facts = {
            f"ZeRO-{stage} {'bf16' if bf16 else 'fp32'}": fresh(stage, bf16)
            for stage in (0, 1, 2)
            for bf16 in (False, True)
        }
    print(json.dumps(facts))
    end_process()
