"""Generating: the Generator against transformers' ``generate``, of our class and stock.

All take the likeliest token, so that all three must say the same (but where two tokens are equally
likely up to rounding, which with 32,000 entries happens now and then: on a GPU, whose kernels round
by the batch's shape, often, so that there is no such check). The prompts of a batch have
lengths from half of the given one up to it. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from ..data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from ..device import choose_device
from ..inference.generator import Generator
from ..inference.sampling import Sampling
from ..models import build_model, load_model, preset_config
from .measure import (
    device_name,
    interleaved,
    machine,
    markdown_table,
    median_and_range,
)
from .names import BenchmarkError


def run(
    models: list[str],
    batches: list[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure, print each figure when it is there, and return them all.

    On a CPU in fp32, by CPU time; on a GPU in bf16, by the clock.

    Raises ValueError for an unknown preset, and for more tokens than its context.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    place = choose_device(device)
    dtype, compared = (
        (torch.bfloat16, "clock") if place.type == "cuda" else (torch.float32, "CPU time")
    )
    print(
        f"prompts of {prompt_tokens // 2} to {prompt_tokens} tokens, {new_tokens} new ones a row; "
        f"generate ÷ Generator, {compared}"
    )
    for name in models:
        positions = preset_config(name).max_position_embeddings
        if prompt_tokens + new_tokens > positions:
            raise ValueError(
                f"--prompt_tokens {prompt_tokens} and --new_tokens {new_tokens} are more than the "
                f"{positions} positions of {name}; ask for fewer"
            )
    figures: dict[str, Any] = {}
    for name in models:
        torch.manual_seed(0)
        with TemporaryDirectory() as folder:
            build_model(name, vocab_size=len(tokenizer), pad_token_id=0).save_pretrained(folder)
            # Both from the file, so that their weights lie in memory alike.
            model = load_model(folder, dtype=dtype).to(place)
            stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place).eval()
        for batch in batches:
            figures[f"{name} batch {batch}"] = _compare(
                f"{name}, batch {batch}",
                Generator(model, tokenizer),
                stock,
                random_prompts(batch, prompt_tokens, len(tokenizer)),
                new_tokens,
                repeats,
            )
    return {
        **machine("torch", "transformers"),
        "device": device_name(place),
        "dtype": str(dtype).removeprefix("torch."),
        "compared": compared,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        **figures,
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [
        [
            name,
            f"{of['generator_tokens_per_second']:.1f}",
            f"{of['generate_over_generator']:.2f}",
            f"{of['stock_over_generator']:.2f}",
        ]
        for name, of in figures.items()
        if isinstance(of, dict)
    ]
    return (
        f"Prompts of {figures['prompt_tokens'] // 2} to {figures['prompt_tokens']} tokens, "
        f"{figures['new_tokens']} new ones a row, the likeliest each; {figures['dtype']}, ratios "
        f"by {figures['compared']}, medians of {figures['repeats']} turns; {figures['device']}\n\n"
        + markdown_table(
            ["model", "Generator, tokens/s", "generate ÷ it", "stock generate ÷ it"], rows
        )
    )


def random_prompts(batch: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Prompts whose lengths go evenly from half of ``longest`` up to it."""
    lengths = [longest - longest // 2 * row // max(1, batch - 1) for row in range(batch)]
    return [torch.randint(1, vocab_size, (length,)).tolist() for length in lengths]


def _compare(
    name: str,
    generator: Generator,
    stock: Any,
    prompts: list[list[int]],
    new_tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Time the three in turns and print a line."""
    longest, device = max(map(len, prompts)), generator.model.device
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    padding = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    mask = torch.tensor(padding, device=device)
    greedy = Sampling(temperature=0, max_new_tokens=new_tokens, stop_token_ids=())
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def of_transformers(model: Any) -> list[list[int]]:
        output = model.generate(ids, attention_mask=mask, generation_config=config)
        tokens: list[list[int]] = output[:, longest:].tolist()
        return tokens

    variants: dict[str, Callable[[], list[list[int]]]] = {
        "generator": lambda: [r.token_ids for r in generator.generate(prompts, greedy)],
        "generate": lambda: of_transformers(generator.model),
        "stock": lambda: of_transformers(stock),
    }
    ours, *others = (variant() for variant in variants.values())
    for theirs in others if device.type == "cpu" else ():
        for prompt, mine, yours in zip(prompts, ours, theirs, strict=True):
            if mine != yours and not _parts_at_a_tie(generator.model, prompt, mine, yours):
                raise BenchmarkError(f"{name}: the three differ: a mistake of this program")
    compared = "cpu" if device.type == "cpu" else "clock"
    times = interleaved(variants, repeats, device)
    seconds = {name: of[compared] for name, of in times.items()}
    figures: dict[str, float] = {}
    for variant, values in seconds.items():
        rate = len(prompts) * new_tokens / statistics.median(values)
        figures[f"{variant}_tokens_per_second"] = rate
    lines = []
    for other, called in (("generate", "generate"), ("stock", "stock generate")):
        ratios = [b / a for a, b in zip(seconds["generator"], seconds[other], strict=True)]
        figures[f"{other}_over_generator"] = statistics.median(ratios)
        lines.append(f"{called} {median_and_range(ratios)}")
    print(
        f"{name}: {', '.join(lines)}; Generator "
        f"{figures['generator_tokens_per_second']:.1f} tokens/s",
        flush=True,
    )
    return figures


@torch.inference_mode()
def _parts_at_a_tie(model: Any, prompt: list[int], one: list[int], other: list[int]) -> bool:
    """Whether the first tokens that differ are equally likely, up to what fp32 rounding does."""
    step = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    logits_V = model(torch.tensor([prompt + one[:step]])).logits[0, -1]
    gap = (logits_V[one[step]] - logits_V[other[step]]).abs()
    return bool(gap <= 1e-4 * logits_V.abs().max())
