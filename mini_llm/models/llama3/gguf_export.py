"""Llama 3 in llama.cpp's terms; ``mini_llm/hub/gguf.py`` asks for these."""

from collections.abc import Iterator

import torch
from gguf import MODEL_ARCH, GGUFWriter
from transformers import LlamaConfig

ARCHITECTURE = MODEL_ARCH.LLAMA


def obstacle(config: LlamaConfig) -> str | None:
    """Why llama.cpp could not run a model of this config; None where it can."""
    return None


def add_fields(writer: GGUFWriter, config: LlamaConfig) -> None:
    """The sizes that not every architecture has."""
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)


def tensors(
    config: LlamaConfig, key: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """An entry of the state dict as llama.cpp wants it, under keys that gguf's table has.

    llama.cpp rotates neighbouring coordinates of a head, transformers its two halves: the rows of
    the projections of queries and keys change places.
    """
    if key.split(".")[-2] in ("q_proj", "k_proj"):
        halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
        weight = halves.transpose(1, 2).flatten(0, 2)
    yield key, weight
