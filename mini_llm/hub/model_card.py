"""The model card: facts of the run, nothing else."""

import math
from pathlib import Path
from typing import Any

from mini_llm.parallel.engine import describe
from mini_llm.parallel.expert_parallel import expert_parallel_size

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mini-llm]
---

# {name}

{origin}

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
{chat}```
"""

PRETRAINED = "A `{model}` ({architecture}) of {parameters:,} parameters, pretrained with mini-llm."
FINE_TUNED = (
    "A chat model ({architecture}) of {parameters:,} parameters, fine-tuned from `{model}` with "
    "mini-llm."
)
CHAT = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=256)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def card_facts(
    args: Any,
    accelerator: Any,
    model: Any,
    *,
    tokens: int,
    evaluation: dict[str, float],
    fine_tuned: bool = False,
) -> dict[str, Any]:
    """The fields of the card, from a run's arguments, engine and results.

    ``fine_tuned``: a chat model, whose weights come from ``args.model``.
    """
    unwrapped = accelerator.unwrap_model(model)
    size = expert_parallel_size(unwrapped)
    parameters = 0
    for parameter in unwrapped.parameters():
        whole = math.prod(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 splits them
        parameters += whole * (1 if getattr(parameter, "allreduce", True) else size)
    return {
        "name": args.run_name or Path(args.output_dir).name,
        "model": args.model,
        "fine_tuned": fine_tuned,
        "architecture": unwrapped.stock_architecture,
        "parameters": parameters,
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
    fine_tuned = run["fine_tuned"]
    filled = {
        "origin": (FINE_TUNED if fine_tuned else PRETRAINED).format(**run),
        "chat": CHAT if fine_tuned else "",
        "evaluation": "\n".join(rows) + "\n" if rows else "",
    }
    text = CARD.format(**{**run, **filled})
    (folder / "README.md").write_text(text)
