"""A training step with experts spread over the ranks, against one where each rank has them all.

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \\
        -m mini_llm.bench experts --experts 64

Both train the same model on the same batches under the same engine, in the same processes, and take
turns. Time is this rank's CPU time and the clock's, each the larger of the ranks'.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import set_seed

from ..models import build_model, preset_config
from ..parallel import engine
from ..parallel.environment import prepare_environment, rank, world_size
from ..parallel.expert_parallel import find_wire, spread_experts
from ..training.optimizer import build_optimizer
from .measure import machine, markdown_table, median_and_range
from .names import BenchmarkError

VOCABULARY = 320
EXPERT_COUNTS = ("n_routed_experts", "num_experts")  # what configs call it


def run(
    model: str, overrides: dict[str, Any], experts: int, rows: int, seq_len: int, repeats: int
) -> dict[str, Any]:
    """Measure `repeats` steps of `rows` rows a rank; every rank calls it and gets the figures.

    Raises ValueError unless it was launched on several processes.
    """
    if world_size() < 2:
        raise ValueError(
            "experts: spreading takes several processes; start it with accelerate launch "
            "--config_file accelerate_configs/zero2.yaml --num_processes 2 -m mini_llm.bench "
            "experts"
        )
    prepare_environment()
    size = world_size()
    accelerator = engine.build_accelerator(micro_batch_size=rows, expert_parallel_size=size)
    set_seed(0)
    names = [name for name in EXPERT_COUNTS if hasattr(preset_config(model), name)]
    if not names:
        raise ValueError(f"--model: {model} has no routed experts; give another preset")
    fields = {"vocab_size": VOCABULARY, names[0]: experts, **overrides}
    whole = build_model(model, **fields)
    spread = copy.deepcopy(whole)
    spread_experts(spread, size, rank())
    steps: dict[str, Callable[[], float]] = {}
    for name, variant in {"whole": whole, "spread": spread}.items():
        steps[name] = _step(accelerator, variant, rows, seq_len)
    clock: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 2):  # the first two of each are not counted
        for name, step in steps.items():
            accelerator.wait_for_everyone()
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[name].append(step())
            taken = [time.perf_counter() - started, time.process_time() - cpu_started]
            most = accelerator.gather(torch.tensor([taken], dtype=torch.float64)).amax(0)
            if i >= 2:
                clock[name].append(most[0].item())
                cpu[name].append(most[1].item())
    for ours, theirs in zip(losses["spread"], losses["whole"], strict=True):
        if abs(ours - theirs) > 1e-4 * theirs:
            raise BenchmarkError(f"the two train differently: losses {losses}")
    figures = {
        **machine("torch", "deepspeed", "accelerate"),
        "engine": f"{engine.describe(accelerator, accelerator._models[0])}",
        "model": model,
        "overrides": fields,
        "rows_per_rank": rows,
        "seq_len": seq_len,
        "repeats": repeats,
        "clock_seconds": {name: statistics.median(values) for name, values in clock.items()},
        "cpu_seconds": {name: statistics.median(values) for name, values in cpu.items()},
        "spread_over_whole_clock": _median_ratio(clock),
        "spread_over_whole_cpu": _median_ratio(cpu),
    }
    if accelerator.is_main_process:
        print(
            f"{model} with {fields[names[0]]} experts, {figures['engine']}, {size} × {rows} rows "
            f"of {seq_len} tokens, median of {repeats} steps (minimum to maximum)"
        )
        for name in steps:
            print(
                f"{name:7} clock {median_and_range(clock[name])} s, CPU "
                f"{median_and_range(cpu[name])} s"
            )
        print(
            f"spread ÷ whole: clock {figures['spread_over_whole_clock']:.3f}, CPU "
            f"{figures['spread_over_whole_cpu']:.3f} (median of the ratios of neighbouring steps)"
        )
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [
        [
            what,
            f"{figures[key]['whole']:.3g} / {figures[key]['spread']:.3g}",
            f"{figures[ratio]:.3f}",
        ]
        for what, key, ratio in (
            ("CPU time", "cpu_seconds", "spread_over_whole_cpu"),
            ("clock", "clock_seconds", "spread_over_whole_clock"),
        )
    ]
    return (
        f"{figures['model']} {figures['overrides']}, {figures['engine']}, "
        f"{figures['rows_per_rank']} rows of {figures['seq_len']} tokens a rank, medians of "
        f"{figures['repeats']} steps\n\n"
        + markdown_table(["time", "whole / spread, s", "spread ÷ whole"], rows)
    )


def _median_ratio(seconds: dict[str, list[float]]) -> float:
    pairs = zip(seconds["spread"], seconds["whole"], strict=True)
    return statistics.median(spread / whole for spread, whole in pairs)


def _step(accelerator: Any, model: Any, rows: int, seq_len: int) -> Callable[[], float]:
    """One optimizer step on random tokens, the next at each call; it returns the loss."""
    optimizer: Any = build_optimizer(
        model.to(accelerator.device),
        learning_rate=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    wire = find_wire(model)
    random = torch.Generator().manual_seed(rank())

    def step() -> float:
        tokens = torch.randint(VOCABULARY, (rows, seq_len), generator=random)
        tokens = tokens.to(accelerator.device)
        positions = torch.arange(seq_len, device=accelerator.device).expand(rows, -1)
        with engine.accumulate(model, last=True):
            outputs = model(
                input_ids=tokens,
                position_ids=positions,
                labels=tokens,
                num_items_in_batch=torch.tensor(float(tokens.numel() * world_size())),
                use_cache=False,
            )
            engine.backward(accelerator, model, outputs.loss)
        engine.optimizer_step(model, optimizer, 1.0)
        if wire is not None:
            wire.read()
        return float(accelerator.reduce(outputs.loss.detach(), "sum"))

    return step
