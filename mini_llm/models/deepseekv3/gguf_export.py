"""DeepSeek-V3 in llama.cpp's terms; ``mini_llm/hub/gguf.py`` asks for these."""

from collections.abc import Iterator

import torch
from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter
from transformers import DeepseekV3Config

ARCHITECTURE = MODEL_ARCH.DEEPSEEK2

# With so many layers llama.cpp takes a model for DeepSeek-V2-Lite, which has no q_lora_rank.
LAYERS_OF_LITE = (26, 27)


def obstacle(config: DeepseekV3Config) -> str | None:
    """Why llama.cpp could not run a model of this config; None where it can."""
    if (config.q_lora_rank is None) != (config.num_hidden_layers in LAYERS_OF_LITE):
        return (
            "llama.cpp takes models of 26 and 27 layers, and no others, for ones without a "
            f"q_lora_rank; this one has {config.num_hidden_layers} layers and q_lora_rank "
            f"{config.q_lora_rank}"
        )
    if not config.rope_interleave:
        return "llama.cpp rotates neighbouring coordinates, and its rope_interleave is false"
    if config.rms_norm_eps != 1e-6:
        return (
            "llama.cpp has one epsilon for all norms; the latent ones have 1e-6, the others "
            f"rms_norm_eps {config.rms_norm_eps}"
        )
    if config.attention_bias:
        return "llama.cpp has no biases in its attention"
    return None


def add_fields(writer: GGUFWriter, config: DeepseekV3Config) -> None:
    """The sizes that not every architecture has.

    To llama.cpp, which never expands the latent vectors, all heads share one key of c + r and one
    value of c; the sizes of a head's own key and value are the fields with "mla".
    """
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_kv_lora_rank(latent)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_rope_dimension_count(rope)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)


def tensors(
    config: DeepseekV3Config, key: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """An entry of the state dict as llama.cpp wants it, under keys that gguf's table has.

    The MTP layers, which only training uses, are left out.
    """
    if key.startswith("model.layers.") and int(key.split(".")[2]) >= config.num_hidden_layers:
        return
    if key.endswith("kv_b_proj.weight"):  # (H (n + v), c) -> W_UKᵀ (H, c, n) and W_UV (H, v, c)
        n, v = config.qk_nope_head_dim, config.v_head_dim
        w_uk, w_uv = weight.unflatten(0, (-1, n + v)).split([n, v], dim=1)
        yield key.replace("kv_b_proj", "k_b_proj"), w_uk.transpose(1, 2)
        yield key.replace("kv_b_proj", "v_b_proj"), w_uv
    elif key.endswith(".e_score_correction_bias"):
        yield key.replace("_bias", ".bias"), weight
    else:
        yield key, weight
