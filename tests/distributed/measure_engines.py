"""CPU time of an optimizer step under each engine, over that of a bare PyTorch loop.

    python tests/distributed/measure_engines.py [--repeats 3] [--steps 20]

Launches the engines in turn, ``repeats`` times, one process with one thread each, on a llama of 12
narrow layers where the engine's own work is a large part. Process CPU time, so that another
process on the machine counts little; the figures of docs/performance.md come from here.
"""

# ruff: noqa: E402
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mini_llm.parallel.environment import prepare_environment

prepare_environment()

import torch

from mini_llm import build_model
from mini_llm.parallel import engine
from mini_llm.training.optimizer import build_optimizer
from tests.launching import launch_command, launch_environment

ENGINES = ["single", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
WARMUP = 5


def model_and_optimizer() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build_model("mini_llama3_tiny", num_hidden_layers=12, vocab_size=1024)
    optimizer = build_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    return model.train(), optimizer


def measure(step: Any, steps: int) -> float:
    """Median CPU milliseconds of ``step()``."""
    taken = []
    for i in range(WARMUP + steps):
        begin = time.process_time()
        step()
        if i >= WARMUP:
            taken.append(1e3 * (time.process_time() - begin))
    return statistics.median(taken)


def measure_bare(steps: int) -> float:
    """A loop of model, loss.backward(), clipping and optimizer.step() without any engine."""
    model, optimizer = model_and_optimizer()
    ids = torch.randint(1024, (4, 128))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return measure(step, steps)


def measure_engine(steps: int) -> float:
    """The same step through :mod:`mini_llm.parallel.engine`, under the launch's engine."""
    accelerator = engine.build_accelerator(None, micro_batch_size=4)
    model, optimizer = accelerator.prepare(*model_and_optimizer())
    ids = torch.randint(1024, (4, 128))

    def step() -> None:
        with engine.accumulate(model, last=True):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(accelerator, model, loss)
        engine.optimizer_step(accelerator, model, optimizer, 1.0)

    result = measure(step, steps)
    print(engine.describe(accelerator, model), engine.offload(model), file=sys.stderr)
    return result


def launched(name: str, steps: int) -> float:
    """One launch of this script under ``accelerate_configs/<name>.yaml``, or of the bare loop."""
    command = [sys.executable]
    if name != "bare":
        command = launch_command(config=name, processes=1)[:-1]
    done = subprocess.run(
        [*command, str(Path(__file__)), "--measure", name, "--steps", str(steps)],
        cwd=REPOSITORY,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure is not None:
        bare = args.measure == "bare"
        print(json.dumps(measure_bare(args.steps) if bare else measure_engine(args.steps)))
        return
    found: dict[str, list[float]] = {name: [] for name in ["bare", *ENGINES]}
    for _ in range(args.repeats):
        for name, taken in found.items():
            taken.append(launched(name, args.steps))
    bare = statistics.median(found["bare"])
    for name, taken in found.items():
        median = statistics.median(taken)
        print(
            f"{name:14} {median / bare:5.2f}  {median:7.1f} ms  of {[round(x, 1) for x in taken]}"
        )


if __name__ == "__main__":
    main()
