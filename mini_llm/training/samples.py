"""Completions of fixed prompts by the model that a run has just saved."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from mini_llm.models import load_model


def print_samples(output_dir: Path, prompts: list[str], max_new_tokens: int, seed: int) -> None:
    """Complete ``prompts`` with the model in ``final/``; print them and write samples.txt.

    Sampling follows the saved generation config and ``seed``.
    """
    if not prompts:
        return
    final = output_dir / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = load_model(final).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
    )
    blocks = [
        f"--- sample {number}\n{tokenizer.decode(ids, skip_special_tokens=True)}"
        for number, ids in enumerate(generated, start=1)
    ]
    text = "\n".join(blocks) + "\n"
    (output_dir / "samples.txt").write_text(text)
    print(text, end="", flush=True)
