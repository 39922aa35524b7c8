"""Llama 3: a dense decoder with grouped-query attention, RoPE, SwiGLU and RMSNorm.

Read from the bottom up: the language model, the decoder, one layer, its attention. State-dict keys
and config are those of transformers' LlamaForCausalLM. Shapes: see ``models/common/__init__.py``;
``README.md`` beside this file walks from the papers' equations to these lines.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..common.attention import attend, prepare_attention, query_groups
from ..common.base import MiniPreTrainedModel
from ..common.causal_lm import CausalLM
from ..common.documents import Documents
from ..common.mlp import SwiGLU
from ..common.norm import RMSNorm
from ..common.rope import RotaryEmbedding, apply_rotary_pos_emb, positions_after


class Llama3Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K ≤ H key/value heads."""

    is_causal = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = query_groups(
            config.num_attention_heads, config.num_key_value_heads
        )
        self.scaling = self.head_dim**-0.5
        D, bias = config.hidden_size, config.attention_bias
        H_d = config.num_attention_heads * self.head_dim
        K_d = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, H_d, bias=bias)
        self.k_proj = nn.Linear(D, K_d, bias=bias)
        self.v_proj = nn.Linear(D, K_d, bias=bias)
        self.o_proj = nn.Linear(H_d, D, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights if the implementation gives them."""
        B, T, _ = hidden_states.shape

        def heads(x: torch.Tensor) -> torch.Tensor:  # (B, T, heads·d) -> (B, heads, T, d)
            return x.view(B, T, -1, self.head_dim).transpose(1, 2)

        q = heads(self.q_proj(hidden_states))
        k = heads(self.k_proj(hidden_states))
        v = heads(self.v_proj(hidden_states))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.o_proj(output.reshape(B, T, -1)), weights


class Llama3DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm residual blocks."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Llama3Attention(config, layer_idx)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MiniLlama3PreTrainedModel(MiniPreTrainedModel):
    """Names that transformers looks for on the class."""

    config: LlamaConfig
    config_class = LlamaConfig
    base_model_prefix = "model"
    stock_architecture = "LlamaForCausalLM"
    _no_split_modules = ["Llama3DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": Llama3DecoderLayer,
        "attentions": Llama3Attention,
    }


class MiniLlama3Model(MiniLlama3PreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Llama3DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
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
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens (B, T) -> last_hidden_state (B, T, D).

        ``position_ids`` (B, T) that restart at 0, without an ``attention_mask``, are a packed row:
        its documents do not see each other. ``documents`` are those, from who knows them already:
        finding them makes the host wait.
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask, attention_kwargs = prepare_attention(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, documents
        )
        if position_ids is None:
            position_ids = positions_after(inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **(kwargs | attention_kwargs),
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class MiniLlama3ForCausalLM(CausalLM, MiniLlama3PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head; its forward is :meth:`CausalLM.forward`."""

    decoder_class = MiniLlama3Model
