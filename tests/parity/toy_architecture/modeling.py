"""The toy: Qwen3's dense decoder, whose queries and keys are normalised head by head."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..common.attention import attend, prepare_attention
from ..common.base import MiniPreTrainedModel
from ..common.causal_lm import CausalLM
from ..common.mlp import SwiGLU
from ..common.norm import RMSNorm
from ..common.rope import RotaryEmbedding, apply_rotary_pos_emb, positions_after


class ToyAttention(nn.Module):
    is_causal = True

    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        D, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)
        self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos_sin: Any, mask: Any, cache: Cache | None, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(B, T, -1, self.config.head_dim)

        q = self.q_norm(heads(self.q_proj(x))).transpose(1, 2)
        k = self.k_norm(heads(self.k_proj(x))).transpose(1, 2)
        v = heads(self.v_proj(x)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        output, weights = attend(self, q, k, v, mask, scaling=self.config.head_dim**-0.5, **kwargs)
        return self.o_proj(output.reshape(B, T, -1)), weights


class ToyLayer(GradientCheckpointingLayer):
    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ToyAttention(config, layer_idx)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, *attention: Any) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class ToyPreTrainedModel(MiniPreTrainedModel):
    config_class = Qwen3Config
    base_model_prefix = "model"
    stock_architecture = "Qwen3ForCausalLM"
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": ToyLayer, "attentions": ToyAttention}


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ToyLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        x = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask, kwargs = prepare_attention(
            self.config, x, attention_mask, position_ids, past_key_values
        )
        if position_ids is None:
            position_ids = positions_after(x, past_key_values)
        cos_sin = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, cos_sin, mask, past_key_values, kwargs)
        return BaseModelOutputWithPast(self.norm(x), past_key_values)


class ToyForCausalLM(CausalLM, ToyPreTrainedModel, GenerationMixin):
    decoder_class = ToyModel
