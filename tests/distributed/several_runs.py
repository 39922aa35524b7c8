"""Several runs of a recipe in one launch: ``accelerate launch several_runs.py FILE``.

A launch of two ranks is mostly imports. This script imports the recipes once and forks a process
for each run of FILE (JSON, see ``tests.launching.launch_several``), so that every run begins as a
freshly started rank that has just imported: what one run leaves behind (process group, engine,
caches of Accelerate and DeepSpeed) dies with its process and no other can see it.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# The recipe and its libraries import these when they first need them; here once for all runs.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import matplotlib.figure  # noqa: F401

from mini_llm import build_model, list_models
from mini_llm.parallel.watchdog import end_with_launcher
from mini_llm.training.arguments import PretrainArguments, SftArguments, parse_arguments
from recipes import pretrain, sft


def run(recipe: str, flags: list[str], port: int) -> int:
    """What a rank of ``accelerate launch recipes/RECIPE.py flags`` does; returns its status."""
    # The launcher's own store still holds the addresses of the last run's ranks: let rank 0 hold
    # one for this run alone.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = str(port)
    end_with_launcher()  # threads do not survive a fork
    try:
        config = f"recipes/configs/quickstart/{recipe}.yaml"
        if recipe == "sft":
            sft.main(parse_arguments(SftArguments, config, flags))
        else:
            pretrain.main(parse_arguments(PretrainArguments, config, flags))
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_all(
    plan: Path,
    around: Callable[[list[str]], contextlib.AbstractContextManager[object]] | None = None,
) -> None:
    """Fork a process for each run of ``plan``; leave with an error if one of them fails.

    ``around`` makes of a run's flags a context that its process runs in.
    """
    for name in list_models():
        if name.endswith("_tiny"):
            build_model(name, vocab_size=320)
    for item in json.loads(plan.read_text()):
        child = os.fork()
        if child == 0:
            os.environ.update(item["env"])
            with around(item["flags"]) if around else contextlib.nullcontext():
                status = run(item["recipe"], item["flags"], item["port"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            sys.exit(f"rank {os.environ.get('RANK', '0')}: status {status} from {item['flags']}")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
