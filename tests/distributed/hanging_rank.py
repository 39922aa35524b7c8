"""The pretraining recipe with a rank 1 that sleeps for ever.

``accelerate launch hanging_rank.py PLACE CALL flags…``: it sleeps in its call number CALL (from 0)
of what PLACE names: reading_data, forward (once a micro-batch), or start, before the first step.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mini_llm.models.common import causal_lm
from mini_llm.training.arguments import PretrainArguments, parse_arguments
from recipes import pretrain

calls = 0


def sleeping_at_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does not return from a call of rank 1."""

    def sleeping(*args: Any, **kwargs: Any) -> Any:
        global calls
        if os.environ["RANK"] == "1" and calls == int(sys.argv[2]):
            sleep_for_ever()
        calls += 1
        return function(*args, **kwargs)

    return sleeping


def sleep_for_ever() -> None:
    """What the report must name."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == "reading_data":
        pretrain.collate = sleeping_at_last(pretrain.collate)
    elif sys.argv[1] == "forward":
        causal_lm.next_tokens = sleeping_at_last(causal_lm.next_tokens)
    else:
        pretrain.count_parameters = sleeping_at_last(pretrain.count_parameters)
    quickstart = "recipes/configs/quickstart/pretrain.yaml"
    pretrain.main(parse_arguments(PretrainArguments, quickstart, sys.argv[3:]))
