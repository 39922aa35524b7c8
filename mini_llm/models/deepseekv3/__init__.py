"""DeepSeek-V3 (latent attention, routed experts, multi-token prediction): presets and classes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

    from .modeling import MiniDeepseekV3ForCausalLM

# Vocabulary size and pad/eos ids come from the run's tokenizer; bos does not exist.
_COMMON: dict[str, Any] = {
    "vocab_size": 32_004,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "num_key_value_heads": None,  # as many as num_attention_heads, which an override may change
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Routing: the top 2 of 8 experts, taken from the best 2 of 4 groups, beside one shared expert.
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    # The stock config has no field for these two, and vLLM reads them: without them it would route
    # by softmax and drop the correction bias.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

PRESETS: dict[str, dict[str, Any]] = {
    "mini_deepseekv3": {  # 181 M parameters with the MTP module, 103 M active without it
        **_COMMON,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 3,
        "num_attention_heads": 12,
        "q_lora_rank": 384,
        "kv_lora_rank": 256,  # with the 64 rotary dimensions: the 320 that vLLM has a kernel for
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "intermediate_size": 3_072,
        "moe_intermediate_size": 512,
    },
    "mini_deepseekv3_tiny": {  # for tests
        **_COMMON,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,  # not the size of a key: nothing may mix the two up
        "intermediate_size": 352,
        "moe_intermediate_size": 64,
    },
}


def mixing_flops_per_token(config: "DeepseekV3Config", seq_len: int) -> float:
    """Forward and backward of q kᵀ (keys of d_nope + d_rope) and of weights · v, MTP layers too.

    The model's own products: the zeros that fill a value up to a key's size do not count.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    key_and_value = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 6.0 * layers * config.num_attention_heads * key_and_value * seq_len


def config_class() -> "type[DeepseekV3Config]":
    """The stock config class: a checkpoint's config.json is transformers' own."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config


def model_class() -> "type[MiniDeepseekV3ForCausalLM]":
    """The class that trains and loads this architecture."""
    from .modeling import MiniDeepseekV3ForCausalLM

    return MiniDeepseekV3ForCausalLM
