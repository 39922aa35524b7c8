"""The model card: facts of the run, nothing else."""

import math
from pathlib import Path
from typing import Any

from mini_llm.parallel.engine import describe

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mini-llm]
---

# {name}

A `{model}` ({architecture}) of {parameters:,} parameters, pretrained with mini-llm.

| | |
|---|---|
| optimizer steps | {steps:,} |
| tokens seen | {tokens:,} |
| tokens per step | {global_batch_tokens:,} |
| sequence length | {seq_len:,} |
| vocabulary | {vocab_size:,} |
| data (weight) | {data} |
| peak learning rate | {learning_rate} |
| engine | {engine} |
{evaluation}
The checkpoint is a stock transformers one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def card_facts(
    args: Any, accelerator: Any, model: Any, *, tokens: int, evaluation: dict[str, float]
) -> dict[str, Any]:
    """The fields of the card, from a run's arguments, engine and results."""
    unwrapped = accelerator.unwrap_model(model)
    shapes = (getattr(p, "ds_shape", p.shape) for p in unwrapped.parameters())  # ZeRO-3 splits them
    return {
        "name": args.run_name or Path(args.output_dir).name,
        "model": args.model,
        "architecture": unwrapped.stock_architecture,
        "parameters": sum(math.prod(shape) for shape in shapes),
        "steps": args.max_steps,
        "tokens": tokens,
        "global_batch_tokens": args.global_batch_tokens,
        "seq_len": args.seq_len,
        "vocab_size": unwrapped.config.vocab_size,
        "data": ", ".join(f"{name} ({s.get('weight', 1)})" for name, s in args.data.items()),
        "learning_rate": args.learning_rate,
        "engine": describe(accelerator, model),
        "evaluation": evaluation,
    }


def write_model_card(folder: Path, run: dict[str, Any]) -> None:
    """Write README.md from ``run``: the card's fields, ``evaluation`` being a mapping."""
    rows = [f"| {name} | {value:.4f} |" for name, value in run["evaluation"].items()]
    text = CARD.format(**{**run, "evaluation": "\n".join(rows) + "\n" if rows else ""})
    (folder / "README.md").write_text(text)
