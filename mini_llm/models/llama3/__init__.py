"""Llama 3 (dense, grouped-query attention): presets and, on request, the classes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from .modeling import MiniLlama3ForCausalLM

# Vocabulary size and pad/eos ids come from the run's tokenizer; bos does not exist.
_COMMON: dict[str, Any] = {
    "vocab_size": 32_004,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    "mini_llama3": {  # 100.5 M parameters with the 32,004-entry vocabulary
        **_COMMON,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2_064,
    },
    "mini_llama3_tiny": {  # for tests and the quickstart
        **_COMMON,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 352,
    },
}


def mixing_flops_per_token(config: "LlamaConfig", seq_len: int) -> float:
    """Forward and backward of q kᵀ and of weights · v: 6 products of 2·T·H·d FLOPs a layer."""
    heads = config.num_attention_heads * config.head_dim
    return 12.0 * config.num_hidden_layers * heads * seq_len


def config_class() -> "type[LlamaConfig]":
    """The stock config class: a checkpoint's config.json is transformers' own."""
    from transformers import LlamaConfig

    return LlamaConfig


def model_class() -> "type[MiniLlama3ForCausalLM]":
    """The class that trains and loads this architecture."""
    from .modeling import MiniLlama3ForCausalLM

    return MiniLlama3ForCausalLM
