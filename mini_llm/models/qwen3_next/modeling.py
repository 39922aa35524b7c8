"""Qwen3-Next: three gated delta nets to one gated attention, routed experts, zero-centred norms.

Read from the bottom up: the language model, the decoder, one layer, its token mixers, its experts.
State-dict keys and config are those of transformers' Qwen3NextForCausalLM. Shapes: see
``models/common/__init__.py``, and for the delta net ``models/common/delta_net.py``; E experts, of
which each token takes its top K, L layers that have them. ``README.md`` beside this file walks from
the papers' equations to these lines.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, Qwen3NextConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..common.attention import (
    attend,
    packed_documents,
    prepare_attention_within,
    query_groups,
)
from ..common.base import MiniPreTrainedModel
from ..common.causal_lm import CausalLM
from ..common.delta_net import Boundaries, delta_rule, find_kernels, short_convolution
from ..common.documents import Documents, document_ids
from ..common.experts import (
    Experts,
    ExpertsModelMixin,
    check_top_k,
    count_expert_load,
    real_tokens,
    row_balance_loss,
    top_k,
)
from ..common.loss import next_tokens
from ..common.mlp import SwiGLU
from ..common.norm import GatedRMSNorm, ZeroCenteredRMSNorm
from ..common.precision import full_precision
from ..common.rope import RotaryEmbedding, apply_rotary_pos_emb, positions_after


class ShortConvolution(nn.Conv1d):
    """The causal filter of a few taps a channel and its activation.

    Computed in this module's own forward, around which ZeRO-3 gathers the weight.
    """

    def __init__(self, channels: int, width: int, activation: str) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=False)
        self.width = width
        self.act_fn = ACT2FN[activation]
        self.kernels = find_kernels()

    def forward(  # type: ignore[override]
        self, x_BTC: torch.Tensor, history_BWC: torch.Tensor | None, boundaries: Boundaries | None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); ``history`` (B, width − 1, C) is what came before."""
        weight_CW = self.weight.squeeze(1)
        out = short_convolution(x_BTC, weight_CW, history_BWC, boundaries, self.kernels)
        return self.act_fn(out)


class Qwen3NextGatedDeltaNet(nn.Module):
    """Linear attention with a gated delta rule (Yang, Kautz & Hatamizadeh 2024, fig. 1).

    x -> q, k, v (through a short convolution), output gate z, decay a and writing strength b ->
    gated delta rule -> norm gated by z -> projection. K key heads each serve G = H/K value heads.
    """

    def __init__(self, config: Qwen3NextConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_k_heads, self.num_v_heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )
        if self.num_v_heads % self.num_k_heads:
            raise ValueError(
                f"linear_num_value_heads {self.num_v_heads} must be a multiple of "
                f"linear_num_key_heads {self.num_k_heads}"
            )
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = self.num_k_heads * self.head_k_dim
        self.value_dim = self.num_v_heads * self.head_v_dim
        D = config.hidden_size
        self.conv1d = ShortConvolution(
            2 * self.key_dim + self.value_dim, config.linear_conv_kernel_dim, config.hidden_act
        )
        self.in_proj_qkvz = nn.Linear(D, 2 * self.key_dim + 2 * self.value_dim, bias=False)
        self.in_proj_ba = nn.Linear(D, 2 * self.num_v_heads, bias=False)
        # Both are drawn in MiniQwen3NextPreTrainedModel._init_weights.
        self.dt_bias = nn.Parameter(torch.ones(self.num_v_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_v_heads))
        self.norm = GatedRMSNorm(self.head_v_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, D, bias=False)
        self.kernels = find_kernels()

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        boundaries: Boundaries | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D). ``padding_mask`` (B, T) zeroes inputs, ``boundaries`` reset."""
        B, T, _ = hidden_states.shape
        if padding_mask is not None:
            hidden_states = hidden_states * padding_mask[..., None].to(hidden_states.dtype)
        K, H, k, v = self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim

        # Both projections are grouped by key head: [q, k, its v's, its z's] and [its b's, its a's].
        qkvz = self.in_proj_qkvz(hidden_states).view(B, T, K, -1)
        q, key, value, z = qkvz.split((k, k, v * H // K, v * H // K), dim=-1)
        ba = self.in_proj_ba(hidden_states).view(B, T, K, -1)
        b, a = (x.reshape(B, T, H) for x in ba.chunk(2, dim=-1))

        qkv = torch.cat([x.flatten(2) for x in (q, key, value)], dim=-1)
        history = state = None
        if past_key_values is not None:
            # The state first: once the convolution's inputs are in, the layer counts as begun.
            # (Cache.get_recurrent_state is this, but younger than transformers 5.17.)
            cached = past_key_values.layers[self.layer_idx]
            state = cached.recurrent_states[0] if cached.has_previous_state[0] else None
            history = self._convolution_history(qkv, past_key_values)
        qkv = self.conv1d(qkv, history, boundaries)
        q, key, value = qkv.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)

        # α = exp(−e^A_log · softplus(a + dt_bias)) as in Mamba-2, β = sigmoid(b); decays in fp32.
        log_decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        output, state = delta_rule(
            q.view(B, T, K, k),
            key.view(B, T, K, k),
            value.view(B, T, H, v),
            log_decay,
            b.sigmoid(),
            state,
            boundaries,
            self.kernels,
        )
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        output = self.norm(output, gate=z.reshape(B, T, H, v))
        return self.out_proj(output.flatten(2))

    def _convolution_history(self, qkv_BTC: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The convolution's W − 1 inputs before these (B, W−1, C); the cache takes these in."""
        T, W = qkv_BTC.shape[1], self.conv1d.width
        seen = cache.update_conv_state(
            qkv_BTC.transpose(1, 2), self.layer_idx, conv_kernel_size=W
        ).transpose(1, 2)
        history = seen[:, :-T][:, -(W - 1) :]
        return F.pad(history, (0, 0, W - 1 - history.shape[1], 0))


class Qwen3NextAttention(nn.Module):
    """Grouped-query attention whose output a sigmoid gates (Qiu et al. 2025, "Gated Attention").

    Queries and keys are normed a head before RoPE turns their first quarter.
    """

    is_causal = True

    def __init__(self, config: Qwen3NextConfig, layer_idx: int) -> None:
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
        self.q_proj = nn.Linear(D, 2 * H_d, bias=bias)  # a head's query, then its gate
        self.k_proj = nn.Linear(D, K_d, bias=bias)
        self.v_proj = nn.Linear(D, K_d, bias=bias)
        self.o_proj = nn.Linear(H_d, D, bias=bias)
        self.q_norm = ZeroCenteredRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(self.head_dim, config.rms_norm_eps)

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
        q, gate = self.q_proj(hidden_states).view(B, T, -1, 2 * self.head_dim).chunk(2, dim=-1)
        k = self.k_proj(hidden_states).view(B, T, -1, self.head_dim)
        v = self.v_proj(hidden_states).view(B, T, -1, self.head_dim)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        gated = output.reshape(B, T, -1) * gate.reshape(B, T, -1).sigmoid()
        return self.o_proj(gated), weights


class Qwen3NextRouter(nn.Module):
    """softmax(x Wᵀ) over experts; the K highest are chosen and are the gates."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        check_top_k(self.top_k, config.num_experts)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.tokens_per_expert: torch.Tensor | None = None  # see count_expert_load

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, D) -> logits (N, E), gates (N, K), experts (N, K)."""
        with full_precision(x_ND):
            logits_NE = F.linear(x_ND.to(self.weight.dtype), self.weight)
        gates_NK, index_NK = top_k(logits_NE.softmax(-1, dtype=torch.float32), self.top_k)
        if self.norm_topk_prob:
            gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
        return logits_NE, gates_NK.to(logits_NE.dtype), index_NK


class Qwen3NextMoE(nn.Module):
    """Σ_k g_k · FFN_{e_k}(x) + σ(x·w) · FFN_shared(x)."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.gate = Qwen3NextRouter(config)
        self.experts = Experts(config, config.num_experts, config.moe_intermediate_size)
        self.shared_expert = SwiGLU(config, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> (B, T, D), the router's logits (N, E) and the chosen experts (N, K)."""
        x_ND = hidden_states.flatten(0, 1)
        logits_NE, gates_NK, index_NK = self.gate(x_ND)
        shared_ND = self.shared_expert_gate(x_ND).sigmoid() * self.shared_expert(x_ND)
        out_ND = self.experts(x_ND, index_NK, gates_NK) + shared_ND
        return out_ND.view_as(hidden_states), logits_NE, index_NK


def has_experts(config: Qwen3NextConfig, layer_idx: int) -> bool:
    """Whether a layer's feed-forward part is routed experts and not dense."""
    return (
        layer_idx not in config.mlp_only_layers
        and config.num_experts > 0
        and (layer_idx + 1) % config.decoder_sparse_step == 0
    )


class Qwen3NextDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); mixer and mlp are what the config says."""

    mlp: Qwen3NextMoE | SwiGLU

    def __init__(self, config: Qwen3NextConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        if self.is_linear:
            self.linear_attn = Qwen3NextGatedDeltaNet(config, layer_idx)
        else:
            self.self_attn = Qwen3NextAttention(config, layer_idx)
        self.mlp = Qwen3NextMoE(config) if has_experts(config, layer_idx) else SwiGLU(config)
        self.input_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        boundaries: Boundaries | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """(B, T, D) -> (B, T, D), and from a layer with experts their logits and choice.

        Those leave the layer as outputs, so that what gradient checkpointing computes a second time
        is neither counted twice nor cut off from the gradient.
        """
        x = self.input_layernorm(hidden_states)
        if self.is_linear:
            mixed = self.linear_attn(x, padding_mask, boundaries, past_key_values)
        else:
            mixed, _ = self.self_attn(x, past_key_values=past_key_values, **kwargs)
        hidden_states = hidden_states + mixed
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        if isinstance(out, tuple):
            out, *routing = out
            return hidden_states + out, *routing
        return (hidden_states + out,)


class MiniQwen3NextPreTrainedModel(ExpertsModelMixin, MiniPreTrainedModel):
    """Names that transformers looks for on the class, and the initialisation."""

    config: Qwen3NextConfig
    config_class = Qwen3NextConfig
    base_model_prefix = "model"
    stock_architecture = "Qwen3NextForCausalLM"
    _no_split_modules = ["Qwen3NextDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp.*"]  # published checkpoints carry an MTP module
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted generation
    _can_record_outputs = {
        "hidden_states": Qwen3NextDecoderLayer,
        "attentions": Qwen3NextAttention,
        "router_logits": OutputRecorder(Qwen3NextRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroCenteredRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, Qwen3NextGatedDeltaNet):
            # As the authors train it: rates A = 0.01 … 16 (not 0, whose log is −∞), and a bias that
            # softplus turns into a time step of 0.001 … 0.1, drawn by its logarithm. transformers
            # starts the bias at 1, with which most heads forget a token before the next one.
            rates = torch.empty_like(module.A_log, dtype=torch.float32).uniform_(0.01, 16)
            init.copy_(module.A_log, rates.log())
            step = torch.empty_like(rates).uniform_(math.log(0.001), math.log(0.1)).exp()
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus⁻¹
        elif isinstance(module, Qwen3NextRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


@dataclass
class MiniQwen3NextModelOutput(MoeModelOutputWithPast):
    """With the training forward's balance loss."""

    balance_loss: torch.Tensor | None = None


@dataclass
class MiniQwen3NextCausalLMOutput(MoeCausalLMOutputWithPast):
    """``loss`` is the cross-entropy alone; what a recipe may add to it stands beside it."""

    balance_loss: torch.Tensor | None = None


class MiniQwen3NextModel(MiniQwen3NextPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Qwen3NextDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> MiniQwen3NextModelOutput:
        """Tokens (B, T) -> last_hidden_state (B, T, D).

        ``position_ids`` (B, T) that restart at 0, without an ``attention_mask``, are a packed row:
        its documents do not see each other. ``documents`` are those, from who knows them already:
        finding them makes the host wait. ``attention_mask`` (B, S) marks padding with 0; a dict
        of one mask a layer type (what ``generate`` makes for static caches) is used as it is. In
        training the experts' load is counted, and ``balance_loss`` is there.
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        B, T, _ = inputs_embeds.shape
        padding_mask = real = None
        if isinstance(attention_mask, dict):
            padding_mask = attention_mask["linear_attention"]
        else:
            if attention_mask is not None and attention_mask.ndim == 2:
                # transformers ignores it for single tokens, which a padded prompt may be fed as.
                padding_mask = attention_mask[:, -T:]
            if self.training:
                real = real_tokens(attention_mask, position_ids, B)

        documents = packed_documents(
            inputs_embeds, attention_mask, position_ids, past_key_values, documents
        )
        mask, attention_kwargs = prepare_attention_within(
            documents, self.config, inputs_embeds, attention_mask, position_ids, past_key_values
        )
        boundaries = None
        if documents is not None:
            cu_seq_lens = documents.cu_seq_lens(inputs_embeds.device)
            boundaries = Boundaries(document_ids(cu_seq_lens, B, T), cu_seq_lens)
        if position_ids is None:
            position_ids = positions_after(inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        routings = {}
        for i, layer in enumerate(self.layers):
            hidden_states, *routings[i] = layer(
                hidden_states,
                padding_mask=padding_mask,
                boundaries=boundaries,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **(kwargs | attention_kwargs),
            )
        return MiniQwen3NextModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            balance_loss=self.balance(routings, real, (B, T)),
        )

    def balance(
        self,
        routings: dict[int, list[torch.Tensor]],
        real_BT: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> torch.Tensor | None:
        """Count the experts' load of these layers and return their balance loss; in training only.

        ``routings``: layer -> [logits (N, E), chosen experts (N, K)], or [] of a dense layer.
        ``real_BT`` is False on padding, None where there is none in rows of this ``shape``.
        """
        routings = {i: routing for i, routing in routings.items() if routing}
        if not self.training or not routings:
            return None
        layers: Any = self.layers  # nn.ModuleList's items have no type of their own
        indices = [index_NK for _, index_NK in routings.values()]
        if real_BT is not None:  # an attention_mask covers cached tokens too
            real_BT = real_BT[:, -shape[1] :]
        count_expert_load(
            [layers[i].mlp.gate for i in routings], indices, real_BT, self.config.num_experts
        )
        if real_BT is None:
            real_BT = torch.ones(shape, dtype=torch.bool, device=indices[0].device)
        logits_LNE = torch.stack([logits_NE for logits_NE, _ in routings.values()])
        return sequence_balance_loss(logits_LNE, torch.stack(indices), real_BT)


class MiniQwen3NextForCausalLM(CausalLM, MiniQwen3NextPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, usually tied to the input embedding."""

    decoder_class = MiniQwen3NextModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        num_target_tokens: int | None = None,
        **kwargs: Any,
    ) -> MiniQwen3NextCausalLMOutput:
        """Tokens (B, T) -> logits (B, T, V), and the losses if there are labels.

        Arguments, ``loss`` and ``logits`` are those of :meth:`CausalLM.forward`.

        ``balance_loss``, in training, is :func:`sequence_balance_loss`, for the caller to scale and
        add. ``output_router_logits`` (default: the config's) is transformers' own way: it returns
        the routers' logits and an ``aux_loss`` over the whole batch (:func:`batch_balance_loss`),
        which times ``router_aux_loss_coef`` is part of ``loss``.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state,
            next_tokens(labels, shift_labels),
            num_items_in_batch,
            logits_to_keep,
            skip_logits,
            num_target_tokens,
        )
        aux_loss = None
        if output_router_logits and outputs.router_logits:
            aux_loss = batch_balance_loss(
                outputs.router_logits, self.config.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MiniQwen3NextCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            balance_loss=outputs.balance_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def sequence_balance_loss(
    logits_LNE: torch.Tensor, index_LNK: torch.Tensor, real_BT: torch.Tensor
) -> torch.Tensor:
    """:func:`row_balance_loss` of the experts that tokens went to and of their probabilities.

    Fedus et al. 2021, eq. 4–6, here for K choices and a row at a time.
    """
    probabilities = logits_LNE.softmax(-1, dtype=torch.float32)
    chosen = torch.zeros_like(probabilities).scatter_(-1, index_LNK, 1.0)
    return row_balance_loss(probabilities, chosen, index_LNK.shape[-1], real_BT)


def batch_balance_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, attention_mask: Any
) -> torch.Tensor:
    """transformers' ``aux_loss``: E Σ_e f_e P_e, both means over all rows and layers together."""
    logits_LNE = torch.stack(router_logits)
    probabilities = logits_LNE.softmax(-1)
    index_LNK = probabilities.topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(probabilities).scatter_(-1, index_LNK, 1.0)
    L, N, E = probabilities.shape
    weight_N1 = probabilities.new_full((N, 1), 1 / (L * N))
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        weight_N1 = attention_mask.reshape(N, 1).float()
        weight_N1 = weight_N1 / (L * weight_N1.sum())
    f, P = (chosen * weight_N1).sum((0, 1)), (probabilities * weight_N1).sum((0, 1))
    return E * (f * P).sum()
