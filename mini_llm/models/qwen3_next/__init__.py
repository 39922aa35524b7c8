"""Qwen3-Next (gated delta nets, routed experts): presets and, on request, the classes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen3NextConfig

    from .modeling import MiniQwen3NextForCausalLM

# Vocabulary size and pad/eos ids come from the run's tokenizer; bos does not exist. Every 4th layer
# is full attention: the config derives ``layer_types`` from the number of layers.
_COMMON: dict[str, Any] = {
    "vocab_size": 32_004,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "linear_conv_kernel_dim": 4,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    "mini_qwen3_next": {  # 162.2 M parameters, 98.5 M active a token, with 32,004 entries
        **_COMMON,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "mlp_only_layers": [0, 1, 2],
        "intermediate_size": 2_112,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "mini_qwen3_next_tiny": {  # for tests and the quickstart
        **_COMMON,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 24,
        "mlp_only_layers": [0],
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
}


def mixing_flops_per_token(config: "Qwen3NextConfig", seq_len: int) -> float:
    """Forward and backward of attention's two products and of the chunked delta rule.

    Of the delta rule: K Kᵀ and Q Kᵀ (a key head), W S, Q S and the write (k × v a token and value
    head), the scores times u, the inverse times βV and βγK, and the inverse itself, whose backward
    is two products.
    """
    full = config.layer_types.count("full_attention")
    attention = 12.0 * config.num_attention_heads * config.head_dim * seq_len
    C = min(64, seq_len)  # delta_net.CHUNK_SIZE, not imported to spare --help from loading torch
    K, H = config.linear_num_key_heads, config.linear_num_value_heads
    k, v = config.linear_key_head_dim, config.linear_value_head_dim
    products = 2.0 * (2 * C * K * k + 3 * H * k * v + C * H * v + C * H * (k + v))
    inverse = C * C * H
    linear = len(config.layer_types) - full
    return full * attention + linear * (3.0 * products + 5.0 * inverse)


def config_class() -> "type[Qwen3NextConfig]":
    """The stock config class: a checkpoint's config.json is transformers' own."""
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig


def model_class() -> "type[MiniQwen3NextForCausalLM]":
    """The class that trains and loads this architecture."""
    from .modeling import MiniQwen3NextForCausalLM

    return MiniQwen3NextForCausalLM


def kernels_in_use(
    half_precision: bool = True, *, device_type: str | None = None
) -> dict[str, str]:
    """What computes the delta rule and the short convolution here, for the start banner.

    ``{"delta_rule": "fla" | "pytorch", "short_convolution": "causal_conv1d" | "pytorch"}`` for a
    run in bf16 or fp16, or in fp32 with ``half_precision=False``, on a GPU where there is one or on
    ``device_type``. Raises ValueError for a package that is installed and broken.
    """
    from ..common.delta_net import find_kernels

    kernels = find_kernels()
    return kernels.names(half_precision, device_type or kernels.device_type)
