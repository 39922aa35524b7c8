"""Qwen3-Next in llama.cpp's terms; ``mini_llm/hub/gguf.py`` asks for these."""

from collections.abc import Iterator

import torch
from gguf import MODEL_ARCH, GGUFWriter
from transformers import Qwen3NextConfig

from .modeling import has_experts

ARCHITECTURE = MODEL_ARCH.QWEN3NEXT


def full_attention_interval(config: Qwen3NextConfig) -> int:
    """n where every n-th layer is full attention; more than there are layers where none is."""
    types = [*config.layer_types, "full_attention"]
    return types.index("full_attention") + 1


def obstacle(config: Qwen3NextConfig) -> str | None:
    """Why llama.cpp could not run a model of this config; None where it can."""
    interval = full_attention_interval(config)
    full = [layer_type == "full_attention" for layer_type in config.layer_types]
    if full != [(layer + 1) % interval == 0 for layer in range(len(full))]:
        return "llama.cpp wants every n-th layer to be full attention, which layer_types is not"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return (
            "llama.cpp has one size for the delta nets' heads; linear_key_head_dim is "
            f"{config.linear_key_head_dim}, linear_value_head_dim {config.linear_value_head_dim}"
        )
    if not config.num_experts:
        return "llama.cpp has no Qwen3-Next without experts"
    if not config.norm_topk_prob:
        return "llama.cpp always normalises the experts' weights, and norm_topk_prob is false"
    if config.attention_bias:
        return "llama.cpp has no biases in its attention"
    return None


def add_fields(writer: GGUFWriter, config: Qwen3NextConfig) -> None:
    """The sizes that not every architecture has."""
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    rotary_factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config.head_dim * rotary_factor))
    writer.add_full_attention_interval(full_attention_interval(config))
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    # A layer's shared expert has this size where no size for all of them is given.
    writer.add_feed_forward_length(
        [
            config.shared_expert_intermediate_size
            if has_experts(config, layer)
            else config.intermediate_size
            for layer in range(config.num_hidden_layers)
        ]
    )


def tensors(
    config: Qwen3NextConfig, key: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """An entry of the state dict as llama.cpp wants it, under keys that gguf's table has."""
    if key.endswith("in_proj_qkvz.weight"):
        yield from _ungrouped(config, key, weight)
    elif key.endswith("conv1d.weight"):
        yield key, weight.squeeze(1)
    elif key.endswith("dt_bias"):
        yield key.replace("dt_bias", "dt_proj.bias"), weight
    elif key.endswith("A_log"):
        yield key, -weight.exp()
    elif key.endswith("shared_expert_gate.weight"):
        yield key, weight.squeeze(0)
    elif key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        yield key, 1.0 + weight  # zero-centred
    elif ".mlp." in key and not has_experts(config, int(key.split(".")[2])):
        yield from _dense_as_expert(config, key, weight)
    else:
        yield key, weight


def _ungrouped(
    config: Qwen3NextConfig, key: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """[q, k, its v's, its z's] of each key head -> all q, all k, all v; and all z."""
    K, k = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // K * config.linear_value_head_dim
    q, key_, value, z = weight.unflatten(0, (K, -1)).split([k, k, values, values], dim=1)
    qkv = torch.cat([part.flatten(0, 1) for part in (q, key_, value)])
    yield key.replace("in_proj_qkvz", "in_proj_qkv"), qkv
    yield key.replace("in_proj_qkvz", "in_proj_z"), z.flatten(0, 1)


def _dense_as_expert(
    config: Qwen3NextConfig, key: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """A dense layer's matrix as the shared expert's: llama.cpp has experts in every layer.

    The shared expert's gate is σ(0) = ½, so twice its output comes out as it went in, to the bit;
    the routed experts are zeros.
    """
    mlp, name, _ = key.rsplit(".", 2)
    yield f"{mlp}.shared_expert.{name}.weight", weight * 2.0 if name == "down_proj" else weight
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    shape = (E, D, F) if name == "down_proj" else (E, F, D)
    yield f"{mlp}.experts.{name}.weight", weight.new_zeros(shape)
    if name == "gate_proj":
        yield f"{mlp}.gate.weight", weight.new_zeros(E, D)
        yield f"{mlp}.shared_expert_gate.weight", weight.new_zeros(D)
