"""The pretraining recipe with one micro-batch of rank 1 whose loss is not finite, or jumps.

``accelerate launch bad_gradient.py CALL FACTOR flags…``: the loss of call number CALL (from 0) of a
rank's forward passes is multiplied by FACTOR (nan, inf, 1e3).
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.training.arguments import PretrainArguments, parse_arguments
from recipes import pretrain

calls = 0
combine_losses = pretrain.combine_losses


def with_a_bad_one(outputs: Any, **weights: Any) -> Any:
    """combine_losses, spoilt once."""
    global calls
    objective, parts = combine_losses(outputs, **weights)
    if calls == int(sys.argv[1]) and os.environ["RANK"] == "1":
        objective = objective * float(sys.argv[2])
        parts = {name: part * float(sys.argv[2]) for name, part in parts.items()}
    calls += 1
    return objective, parts


if __name__ == "__main__":
    pretrain.combine_losses = with_a_bad_one  # type: ignore[assignment]
    quickstart = "recipes/configs/quickstart/pretrain.yaml"
    pretrain.main(parse_arguments(PretrainArguments, quickstart, sys.argv[3:]))
