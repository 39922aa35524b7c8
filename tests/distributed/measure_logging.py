"""What logging costs: its CPU time beside that of the steps it is for, in turns, in one process.

    python tests/distributed/measure_logging.py [--repeats 20] [--tokens 512]

A turn computes as many optimizer steps of mini_deepseekv3_tiny as the default --logging_steps; the
next does all that timing their parts and logging them once adds, to metrics.jsonl, TensorBoard and
W&B (offline), and computes nothing. So the small figure is no difference of two large ones. The
CPU time of W&B's own process is shown beside it.
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
from mini_llm.training.sizes import TrainingFlops
from mini_llm.training.timing import PARTS, StepTimer

STEPS = PretrainArguments(output_dir="", model="", tokenizer="").logging_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
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
    timer = StepTimer(accelerator, flops=TrainingFlops(1.0, 0.0), peak=1e12)
    step = 0
    loss: Any = None
    norm: Any = None
    load: Any = None

    def compute() -> None:
        nonlocal norm, load, loss
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(accelerator, model, loss)
            norm = engine.optimizer_step(model, optimizer, 1.0)
            load = take_expert_load(model)

    def time_and_log() -> None:
        nonlocal step
        for _ in range(STEPS):
            step += 1
            timer.begin_step(is_logged=step % STEPS == 0)
            for part in PARTS:
                with timer.part(part):
                    pass
            timer.end_step(options.tokens, options.tokens)
        metrics = {"train/loss": float(accelerator.reduce(loss.detach(), "sum"))}
        metrics |= {"train/grad_norm": float(norm), "train/lr": 1e-3} | tokens.read()
        metrics |= timer.read() | load.metrics() | bias_spread(model)
        log.write(step, metrics)

    def wandb_seconds() -> float:
        children = psutil.Process().children(recursive=True)
        return float(sum(sum(child.cpu_times()[:2]) for child in children))

    before = wandb_seconds()
    found = interleaved({"steps": compute, "logging": time_and_log}, options.repeats)
    aside = (wandb_seconds() - before) / (options.repeats + 1)
    steps, logging = (statistics.median(taken) for taken in found.values())
    print(
        f"a step {1e3 * steps / STEPS:.1f} ms of CPU time; timing and logging {STEPS} of them "
        f"{1e3 * logging:.2f} ms ({1e3 * min(found['logging']):.2f} to "
        f"{1e3 * max(found['logging']):.2f}), {logging / steps:.2%} of theirs; W&B's process "
        f"{1e3 * aside:.2f} ms"
    )
    engine.leave(accelerator)


if __name__ == "__main__":
    main()
