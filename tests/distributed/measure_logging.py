"""What logging costs: CPU time of steps with and without it, in turns, in one process.

    python tests/distributed/measure_logging.py [--repeats 30] [--tokens 2048]

A turn is the default --logging_steps, 10, of optimizer steps of mini_deepseekv3_tiny, timed by
parts and logged once, to metrics.jsonl, TensorBoard and W&B (offline), or neither timed nor logged.
Of W&B's own process the CPU time is shown beside it.
"""

# ruff: noqa: E402
import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mini_llm.parallel.environment import prepare_environment

prepare_environment()
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import psutil
import torch

from mini_llm import build_model
from mini_llm.bench.measure import interleaved
from mini_llm.parallel import engine
from mini_llm.training.arguments import PretrainArguments
from mini_llm.training.balancing import bias_spread, take_expert_load
from mini_llm.training.metrics import MetricsLog, TokenCounter, start_trackers
from mini_llm.training.optimizer import build_optimizer
from mini_llm.training.timing import StepTimer

STEPS = PretrainArguments(output_dir="", model="", tokenizer="").logging_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    args = PretrainArguments(folder, "mini_deepseekv3_tiny", "", report_to="tensorboard,wandb")
    accelerator = engine.build_accelerator("none", log_with=args.trackers, project_dir=folder)
    model = build_model(args.model, vocab_size=4096).train()
    optimizer = build_optimizer(
        model, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    ids = torch.randint(4096, (options.tokens // 256, 256))
    start_trackers(accelerator, args, start_step=0)
    log = MetricsLog(Path(folder), accelerator, start_step=0, max_steps=10**6)
    log.say = lambda text: None  # type: ignore[method-assign]
    tokens = TokenCounter(accelerator, sources=["a"])
    timer = StepTimer(accelerator, flops_per_token=1.0, peak=1e12)
    step = 0

    def compute(part: Any = None) -> tuple[Any, Any, Any]:
        if part is None:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(accelerator, model, loss)
            norm = engine.optimizer_step(accelerator, model, optimizer, 1.0)
        else:
            with part("data"):
                pass
            with part("forward"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            with part("backward"):
                engine.backward(accelerator, model, loss)
            with part("optimizer"):
                norm = engine.optimizer_step(accelerator, model, optimizer, 1.0)
        return loss.detach(), norm, take_expert_load(model)

    def logged() -> None:
        nonlocal step
        for _ in range(STEPS):
            step += 1
            loss, norm, load = compute(timer.part)
            timer.end_step(options.tokens)
        metrics: dict[str, Any] = {"train/loss": float(accelerator.reduce(loss, "sum"))}
        metrics |= {"train/grad_norm": float(norm), "train/lr": 1e-3} | tokens.read()
        metrics |= timer.read() | load.metrics() | bias_spread(model)
        log.write(step, metrics)

    def bare() -> None:
        for _ in range(STEPS):
            compute()
        timer.restart()

    def wandb_seconds() -> float:
        children = psutil.Process().children(recursive=True)
        return float(sum(sum(child.cpu_times()[:2]) for child in children))

    logged()
    before = wandb_seconds()
    found = interleaved({"bare": bare, "logged": logged}, options.repeats)
    aside = (wandb_seconds() - before) / (options.repeats + 1)
    difference = statistics.median(b - a for a, b in zip(*found.values(), strict=True))
    turn = statistics.median(found["bare"])
    print(
        f"a step {1e3 * turn / STEPS:.1f} ms of CPU time; logging adds {difference / turn:+.2%} "
        f"(median of {options.repeats} turns); W&B's process {aside / turn:.2%}"
    )
    engine.leave(accelerator)


if __name__ == "__main__":
    main()
