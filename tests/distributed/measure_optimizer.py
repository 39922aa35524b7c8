"""CPU time of AdamW's update of a preset's parameters, fused and as torch's loop of operations.

    python tests/distributed/measure_optimizer.py [--model mini_llama3] [--steps 20]

Both update the same shapes in turns, in one process with one thread; process CPU time. The figures
of docs/performance.md come from here.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from mini_llm import build_model
from mini_llm.training.optimizer import build_optimizer, describe_optimizer

WARMUP = 3


def optimizer_of(name: str, *, fused: bool) -> torch.optim.AdamW:
    """AdamW of a preset with 32,004 entries, with gradients that never change."""
    torch.manual_seed(0)
    model = build_model(name, vocab_size=32_004)
    optimizer = build_optimizer(
        model, learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8
    )
    for group in optimizer.param_groups:
        group["fused"] = fused or None
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini_llama3")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    optimizers = [optimizer_of(args.model, fused=fused) for fused in (False, True)]
    size = sum(p.numel() for group in optimizers[0].param_groups for p in group["params"])
    taken: list[list[float]] = [[], []]
    for i in range(WARMUP + args.steps):
        for optimizer, times in zip(optimizers, taken, strict=True):
            begin = time.process_time()
            optimizer.step()
            if i >= WARMUP:
                times.append(1e9 * (time.process_time() - begin) / size)
    print(f"{args.model}, {size:,} parameters, torch {torch.__version__}, {args.steps} steps")
    for optimizer, times in zip(optimizers, taken, strict=True):
        print(
            f"{describe_optimizer(optimizer):14} {statistics.median(times):5.2f} ns a parameter "
            f"({min(times):.2f} to {max(times):.2f})"
        )
    ratios = [plain / fused for plain, fused in zip(*taken, strict=True)]
    print(
        f"ratio of each pair {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
