"""Sizes that can be known before a run: parameters, FLOPs, memory per rank."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

GIB = 1 << 30


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters, a tied weight once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(config: PreTrainedConfig, parameters: int, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass in a dense decoder.

    6 per weight that multiplies (Kaplan et al. 2020, §2.1; the input embedding is a look-up, the
    output head multiplies), and 6·T·H·d a layer for causal attention scores and values.
    """
    embedding = config.vocab_size * config.hidden_size
    multiplied = parameters if config.tie_word_embeddings else parameters - embedding
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
    return 6.0 * multiplied + 6.0 * attention


def memory_per_rank(parameters: int, *, world_size: int, bf16: bool) -> dict[str, float]:
    """GiB of weights, gradients and AdamW state per rank at each ZeRO stage (no activations).

    ZeRO (Rajbhandari et al. 2020, fig. 1) with fp32 gradients: stage 1 splits the optimizer state
    (two moments and the fp32 master weights), 2 the gradients too, 3 the weights too.
    """
    weights, gradients = parameters * (2 if bf16 else 4), parameters * 4
    moments, master = parameters * 8, parameters * 4
    plain_master = master if bf16 else 0
    stages = {
        "zero0": weights + gradients + moments + plain_master,
        "zero1": weights + gradients + (moments + master) / world_size,
        "zero2": weights + (gradients + moments + master) / world_size,
        "zero3": (weights + gradients + moments + master) / world_size,
    }
    return {stage: size / GIB for stage, size in stages.items()}


def dry_run_report(
    args: Any, config: PreTrainedConfig, parameters: int, *, world_size: int, micro_batches: int
) -> str:
    """The sizes of a run as text, for ``--dry_run``."""
    memory = memory_per_rank(parameters, world_size=world_size, bf16=args.bf16)
    lines = [
        f"parameters            {parameters:,} (all active)",
        f"training FLOPs/token  {training_flops_per_token(config, parameters, args.seq_len):.3e}",
        f"tokens per step       {args.global_batch_tokens:,} = {world_size} rank(s) × "
        f"{micro_batches} micro-batch(es) × {args.per_device_train_batch_size} row(s) × "
        f"{args.seq_len} tokens",
        f"tokens of the run     {args.global_batch_tokens * args.max_steps:,}",
        "memory per rank       "
        + ", ".join(f"{stage} {gib:.3f} GiB" for stage, gib in memory.items())
        + " (weights, gradients, optimizer state; activations come on top)",
    ]
    return "\n".join(lines)
