"""How long a checkpoint keeps training waiting, and what writing it costs the steps meanwhile.

The recipe's own save (engine state, stock weights, checksums, flushed to disk) into a temporary
folder, with steps while it is written and steps without; by the clock, because what a save waits
for is the disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from ..data import load_tokenizer
from ..data.tokenizer import DEFAULT_TOKENIZER
from ..device import choose_device
from ..models import build_model
from ..parallel import engine
from ..parallel.compile import compile_layers, wants_compile
from ..parallel.environment import prepare_environment
from ..parallel.transfer import to_device
from ..training.arguments import REPOSITORY
from ..training.optimizer import build_optimizer
from ..training.saving import CheckpointWriter
from .measure import device_name, machine, markdown_table, median_and_range


def run(
    model: str,
    overrides: dict[str, Any],
    *,
    engine_name: str,
    precision: str,
    rows: int,
    seq_len: int,
    repeats: int,
    device: str,
) -> dict[str, Any]:
    """Measure `repeats` saves, the steps while each is written and as many without.

    Prints the table and returns the figures. Raises ValueError for a device that cannot compute.
    """
    asked = choose_device(device)
    prepare_environment()
    config = "none" if engine_name == "none" else str(REPOSITORY / f"ds_configs/{engine_name}.json")
    accelerator = engine.build_accelerator(config, micro_batch_size=rows, bf16=precision == "bf16")
    if accelerator.device.type != asked.type:
        raise ValueError(
            f"--device {device}: the engine sees {accelerator.device} and takes it; hide it with "
            "CUDA_VISIBLE_DEVICES="
        )
    disable_progress_bar()
    set_seed(0)
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    built: Any = build_model(model, vocab_size=len(tokenizer), **overrides)
    stage = engine.asked_zero_stage(accelerator)
    if wants_compile(None, accelerator.device, zero_stage=stage, expert_parallel_size=1):
        compile_layers(built, accelerator.device)
    optimizer: Any = build_optimizer(
        built.to(accelerator.device),
        learning_rate=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    prepared, optimizer = accelerator.prepare(built, optimizer)
    vocab_size = built.config.vocab_size
    tokens = torch.randint(vocab_size, (rows, seq_len), device=accelerator.device)

    def step() -> None:
        with engine.accumulate(prepared, last=True):
            loss = prepared(input_ids=tokens, labels=tokens, use_cache=False).loss
            engine.backward(accelerator, prepared, loss)
        engine.optimizer_step(prepared, optimizer, 1.0)

    names = ("step", "waits", "complete", "step during")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    completed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        saving = CheckpointWriter(
            accelerator,
            Path(folder),
            total_limit=2,
            announce=lambda _: completed.append(time.perf_counter()),
        )

        def timed(call: Callable[[], None]) -> float:
            begin = time.perf_counter()
            call()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        def step_and_look() -> None:
            sums = to_device(torch.tensor(saving.progress()), accelerator.device)
            saving.agree(accelerator.reduce(sums, "sum"))
            step()

        def save() -> None:
            saving.save(prepared, tokenizer, step=len(completed) + 1, state={})

        timed(step)  # warm
        for number in range(repeats + 1):
            found_now: dict[str, list[float]] = {name: [] for name in names}
            begin = time.perf_counter()
            found_now["waits"].append(timed(save))
            while len(completed) == number:
                found_now["step during"].append(timed(step_and_look))
            found_now["complete"].append(completed[-1] - begin)
            for _ in found_now["step during"]:
                found_now["step"].append(timed(step_and_look))
            if number:  # the first of each is not counted
                for name in names:
                    seconds[name] += found_now[name]
        checkpoint = Path(folder, "checkpoints", f"step-{repeats + 1}")
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        **machine("torch", "deepspeed", "accelerate"),
        "device": device_name(accelerator.device),
        "engine": engine.describe(accelerator, prepared),
        "model": model,
        "overrides": overrides,
        "precision": precision,
        "rows": rows,
        "seq_len": seq_len,
        "repeats": repeats,
        "checkpoint_bytes": size,
        "step_seconds": medians["step"],
        "wait_seconds": medians["waits"],
        "complete_seconds": medians["complete"],
        "step_during_seconds": medians["step during"],
        "step_range": median_and_range(seconds["step"]),
        "wait_range": median_and_range(seconds["waits"]),
        "complete_range": median_and_range(seconds["complete"]),
        "step_during_range": median_and_range(seconds["step during"]),
        "wait_over_step": medians["waits"] / medians["step"],
        "step_during_over_step": medians["step during"] / medians["step"],
    }
    print(markdown(found), flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, with the line that says on what."""
    return (
        f"{found['model']} {found['overrides'] or ''} in {found['precision']}, {found['engine']}: "
        f"a step of {found['rows']} rows of {found['seq_len']} tokens and a checkpoint of "
        f"{found['checkpoint_bytes'] / 2**20:,.0f} MiB, by the clock, medians (minimum to maximum) "
        f"of {found['repeats']} saves; {found['device']}\n\n"
        + markdown_table(
            [
                "step, s",
                "training waits for a save, s",
                "wait ÷ step",
                "until the checkpoint is complete, s",
                "step while it is written, s",
                "that ÷ step",
            ],
            [
                [
                    found["step_range"],
                    found["wait_range"],
                    f"{found['wait_over_step']:.2f}",
                    found["complete_range"],
                    found["step_during_range"],
                    f"{found['step_during_over_step']:.2f}",
                ]
            ],
        )
        + "\n\nWhere the steps are computed by the CPU, writing takes some of it from them."
    )
