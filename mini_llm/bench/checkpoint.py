"""How long a checkpoint keeps training waiting, beside the time of a step.

The recipe's own save (engine state, stock weights, checksums, flushed to disk) into a temporary
folder, and steps between the saves; by the clock, because what a save waits for is the disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from ..data import load_tokenizer
from ..data.tokenizer import DEFAULT_TOKENIZER
from ..models import build_model
from ..parallel import engine
from ..parallel.environment import prepare_environment
from ..training.arguments import REPOSITORY
from ..training.checkpoint import save_checkpoint
from ..training.optimizer import build_optimizer
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
) -> dict[str, Any]:
    """Measure `repeats` saves with a step before each; print the table and return the figures."""
    prepare_environment()
    config = "none" if engine_name == "none" else str(REPOSITORY / f"ds_configs/{engine_name}.json")
    accelerator = engine.build_accelerator(config, micro_batch_size=rows, bf16=precision == "bf16")
    disable_progress_bar()
    set_seed(0)
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    built: Any = build_model(model, vocab_size=len(tokenizer), **overrides)
    optimizer: Any = build_optimizer(
        built.to(accelerator.device),
        learning_rate=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
    )
    prepared, optimizer = accelerator.prepare(built, optimizer)
    tokens = torch.randint(len(tokenizer), (rows, seq_len), device=accelerator.device)

    def step() -> None:
        with engine.accumulate(prepared, last=True):
            loss = prepared(input_ids=tokens, labels=tokens, use_cache=False).loss
            engine.backward(accelerator, prepared, loss)
        engine.optimizer_step(accelerator, prepared, optimizer, 1.0)

    seconds: dict[str, list[float]] = {"step": [], "save": []}
    with tempfile.TemporaryDirectory() as folder:

        def save(number: int) -> None:
            save_checkpoint(
                accelerator,
                prepared,
                tokenizer,
                Path(folder),
                step=number,
                state={},
                total_limit=2,
            )

        for i in range(repeats + 1):  # the first of each is not counted
            for name, call in (("step", step), ("save", lambda i=i: save(i + 1))):
                begin = time.perf_counter()
                call()
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                if i:
                    seconds[name].append(time.perf_counter() - begin)
        checkpoint = Path(folder, "checkpoints", f"step-{repeats + 1}")
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
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
        "step_seconds": statistics.median(seconds["step"]),
        "save_seconds": statistics.median(seconds["save"]),
        "step_range": median_and_range(seconds["step"]),
        "save_range": median_and_range(seconds["save"]),
        "save_over_step": statistics.median(seconds["save"]) / statistics.median(seconds["step"]),
    }
    print(markdown(found), flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, with the line that says on what."""
    return (
        f"{found['model']} {found['overrides'] or ''} in {found['precision']}, {found['engine']}: "
        f"a step of {found['rows']} rows of {found['seq_len']} tokens and a checkpoint of "
        f"{found['checkpoint_bytes'] / 2**20:,.0f} MiB, by the clock, medians (minimum to maximum) "
        f"of {found['repeats']}; {found['device']}\n\n"
        + markdown_table(
            ["step, s", "training waits for a save, s", "save ÷ step"],
            [[found["step_range"], found["save_range"], f"{found['save_over_step']:.2f}"]],
        )
    )
