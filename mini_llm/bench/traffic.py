"""What a rank sends in one optimizer step on more GPUs than are at hand: a table, by formula.

The formula is :mod:`mini_llm.parallel.traffic`'s, which tests hold to runs on two and four ranks;
nothing here is measured, and nothing is said of time.
"""

from __future__ import annotations

from typing import Any

from ..models import empty_model, list_models, preset_config
from ..parallel.traffic import ENGINES, GPUS_PER_NODE, StepShape, Traffic, sent, step_traffic
from ..parallel.traffic import sent_between_nodes as between_nodes
from ..training.sizes import model_shape


def run(
    models: list[str],
    gpus: list[int],
    global_batch_tokens: int,
    seq_len: int,
    largest_batch: int,
    bf16: bool,
    gradient_checkpointing: bool,
) -> dict[str, Any]:
    """Print the table, and return its figures: row -> GPUs -> bytes sent, and between nodes.

    A rank's micro-batch is as many rows as its share of the step has, but at most
    ``largest_batch``. Experts are spread over a node, or over as many ranks as there are experts
    if those are fewer. Raises ValueError, naming the flag, for what cannot be divided.
    """
    for name in models:
        if name not in list_models():
            raise ValueError(f"--model: no preset is named {name!r}; choose of {list_models()}")
    batches = {ranks: _batch(global_batch_tokens, seq_len, ranks, largest_batch) for ranks in gpus}
    figures: dict[str, Any] = {}
    for name in models:
        for label, engine, size in _engines(name, bf16):
            figures[f"{name} {label}"] = {
                str(ranks): _figures(
                    step_traffic(
                        model_shape(empty_model(preset_config(name))),
                        StepShape(
                            engine=engine,
                            world_size=ranks,
                            micro_batches=micro_batches,
                            micro_batch_tokens=rows * seq_len,
                            bf16=bf16,
                            expert_parallel_size=size,
                            gradient_checkpointing=gradient_checkpointing,
                        ),
                    )
                )
                for ranks, (rows, micro_batches) in batches.items()
            }
    divided = ", ".join(
        f"{ranks} GPUs {micro_batches} × {rows}" for ranks, (rows, micro_batches) in batches.items()
    )
    print(
        "Computed by formula for ring algorithms and evenly used experts, not measured: MB (10⁶ "
        f"bytes) that a rank sends in an optimizer step of {global_batch_tokens:,} tokens in rows "
        f"of {seq_len:,} ({'bf16' if bf16 else 'fp32'}; micro-batches × rows: {divided}), and how "
        f"much of it leaves a node of {GPUS_PER_NODE} GPUs, as a mean over the node's ranks."
    )
    print()
    print(markdown(figures))
    return figures


def _batch(tokens: int, seq_len: int, ranks: int, largest: int) -> tuple[int, int]:
    """(rows, micro-batches) of a rank's step."""
    rows, rest = divmod(tokens, seq_len * ranks)
    if rest or not rows:
        raise ValueError(
            f"--global_batch_tokens {tokens} is no multiple of {ranks} GPUs × --seq_len {seq_len}"
        )
    size = max(size for size in range(1, min(rows, largest) + 1) if rows % size == 0)
    return size, rows // size


def _engines(name: str, bf16: bool) -> list[tuple[str, str, int]]:
    """(label, engine, expert parallel size) of each row of a model's table."""
    found = [(engine, engine, 1) for engine in ENGINES if not (bf16 and engine == "zero0")]
    shape = model_shape(empty_model(preset_config(name)))
    if shape.experts:
        size = min(shape.experts[0][0], GPUS_PER_NODE)
        found += [
            (f"{engine}, experts over {size}", engine, size)
            for engine in ("zero1", "zero2", "zero3")
        ]
    return found


def _figures(traffic: list[Traffic]) -> dict[str, float]:
    return {"sent": sent(traffic), "sent_between_nodes": between_nodes(traffic)}


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    gpus = list(next(iter(figures.values())))
    lines = [
        "| model, engine | " + " | ".join(f"{ranks} GPUs | between nodes" for ranks in gpus) + " |",
        "|---" * (1 + 2 * len(gpus)) + "|",
    ]
    for row, of_gpus in figures.items():
        cells = [
            f"{of_gpus[ranks][what] / 1e6:,.0f}"
            for ranks in gpus
            for what in ("sent", "sent_between_nodes")
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)
