"""A rank of verify with something wrong, see broken_verify.py: ``broken_rank.py FAULT FLAGS``."""

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

fault, *words = sys.argv[1:]

if fault == "preflight":
    from mini_llm.verify import preflight

    if os.environ["RANK"] == "1":
        matmul, facts = preflight.matmul_seconds, preflight.rank_facts
        preflight.matmul_seconds = lambda job, kind: 5 * matmul(job, kind)
        preflight.rank_facts = lambda: facts() | {"torch": "0.1"}
    preflight.main(words)
else:
    from mini_llm.parallel import engine
    from mini_llm.training.arguments import PretrainArguments, parse_arguments
    from recipes import pretrain

    backward = engine.backward

    def broken(accelerator: Any, model: Any, loss: Any) -> None:
        """Of a step's gradient a quarter is lost."""
        if fault == "stuck" and os.environ["RANK"] == "1":
            time.sleep(1000)
        backward(accelerator, model, loss * 0.75)

    engine.backward = broken
    default = "recipes/configs/quickstart/pretrain.yaml"
    pretrain.main(parse_arguments(PretrainArguments, default, words))
