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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..common.attention import attend, prepare_attention
from ..common.base import MiniPreTrainedModel, OutputEmbeddingsMixin
from ..common.loss import LMHead, mean_loss
from ..common.mlp import SwiGLU
from ..common.norm import RMSNorm
from ..common.rope import RotaryEmbedding, apply_rotary_pos_emb


class Llama3Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K ≤ H key/value heads."""

    is_causal = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens (B, T) -> last_hidden_state (B, T, D).

        ``position_ids`` (B, T) that restart at 0, without an ``attention_mask``, are a packed row:
        its documents do not see each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask, attention_kwargs = prepare_attention(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values
        )
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = position_ids.unsqueeze(0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **attention_kwargs,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class MiniLlama3ForCausalLM(OutputEmbeddingsMixin, MiniLlama3PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, usually tied to the input embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = MiniLlama3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens (B, T) -> logits (B, T, V), and the loss if there are ``labels`` (B, T).

        Labels are aligned with the inputs (the shift happens here), −100 where nothing is to be
        predicted. The loss is Σ / ``num_items_in_batch``, by default the batch's own supervised
        tokens. ``skip_logits`` (default: while training with labels) leaves the logits out, so that
        their full matrix never exists. ``logits_to_keep`` n > 0 computes the last n positions'.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss_sum = self.lm_head(hidden_states, labels=labels)
            loss = mean_loss(loss_sum, labels, num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, keep, :])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
