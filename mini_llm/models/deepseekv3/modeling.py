"""DeepSeek-V3: latent attention, sigmoid-routed experts, multi-token prediction.

Read from the bottom up: the language model, the decoder, the multi-token-prediction (MTP) layer,
one layer, its experts and router, its attention. State-dict keys and config are those of
transformers' DeepseekV3ForCausalLM, and of the published checkpoints for the MTP layers. Shapes:
see ``models/common/__init__.py``, and for attention c the size of a compressed key/value, n, r and
v the parts of a head without position, with rotary position, and of the value; for the experts E
routed experts of which a token gets K. ``README.md`` beside this file walks from the papers'
equations to these lines.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DeepseekV3Config, DynamicCache, GenerationMixin
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..common.attention import attend, prepare_attention
from ..common.base import MiniPreTrainedModel
from ..common.causal_lm import CausalLM
from ..common.documents import Documents
from ..common.experts import (
    Experts,
    ExpertsModelMixin,
    check_top_k,
    count_expert_load,
    real_tokens,
    row_balance_loss,
    top_k,
)
from ..common.loss import IGNORE_INDEX, next_tokens
from ..common.mlp import SwiGLU
from ..common.norm import RMSNorm
from ..common.precision import full_precision
from ..common.rope import RotaryEmbedding, apply_rotary_pos_emb, positions_after


def softmax_scaling(config: DeepseekV3Config) -> float:
    """1 / √(n + r), times YaRN's temperature for contexts longer than trained on (mscale²)."""
    scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    mscale_all_dim = rope.get("mscale_all_dim", 0)
    if rope.get("rope_type", "default") == "default" or not mscale_all_dim or rope["factor"] <= 1:
        return scaling
    mscale = 0.1 * mscale_all_dim * math.log(rope["factor"]) + 1.0
    return scaling * mscale**2


def rotate_pairs(
    query_BHTr: torch.Tensor, key_B1Tr: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rotary_pos_emb` for rotary pairs side by side: (…, r) = (x0, y0, x1, y1, …).

    That is how DeepSeek's weights give them. Rotated where they stand: first bringing all x before
    all y costs a GPU more than the rotation, and queries times keys are the same either way.
    """
    half = cos_BTr.shape[-1] // 2
    cos, sin = cos_BTr[..., :half].unsqueeze(1), sin_BTr[..., :half].unsqueeze(1)

    def rotate(pairs: torch.Tensor) -> torch.Tensor:
        x, y = pairs.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)

    return rotate(query_BHTr), rotate(key_B1Tr)


class DeepseekV3Attention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2 2024, §2.1).

    All heads' keys and values are linear in one vector c of size ``kv_lora_rank`` a token; a key
    has besides a rotary part that all heads share. Only those two are cached.
    """

    is_causal = True
    num_key_value_groups = 1  # once expanded, every head has keys and values of its own

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = softmax_scaling(config)
        D, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            D, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=bias)

    def queries(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UQ RMSNorm(W_DQ h): the parts without and with position, (B, H, T, n) and (B, H, T, r).

        V2 eq. 12–14; without ``q_lora_rank`` one full-rank projection.
        """
        if self.config.q_lora_rank is None:
            q = self.q_proj(hidden_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        q_BHTd = q.unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        q_nope, q_rope = q_BHTd.split(
            [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1
        )
        return q_nope, q_rope

    def latents(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm(W_DKV h) and W_KR h: (B, 1, T, c) and, not yet rotated, (B, 1, T, r).

        V2 eq. 9 and 15. The axis of size 1 is where caches have the heads.
        """
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_BTD).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return self.kv_a_layernorm(latent).unsqueeze(1), k_rope.unsqueeze(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D), and the weights if the implementation gives them."""
        q_nope, q_rope = self.queries(hidden_states)
        c_B1Tc, k_rope = self.latents(hidden_states)
        rotate = rotate_pairs if self.config.rope_interleave else apply_rotary_pos_emb
        q_rope, k_rope = rotate(q_rope, k_rope, *position_embeddings)
        if past_key_values is not None:
            c_B1Tc, k_rope = past_key_values.update(c_B1Tc, k_rope, self.layer_idx)
        stay_compressed = past_key_values is not None and self.can_stay_compressed(q_nope.shape[2])
        form = self.compressed if stay_compressed else self.expanded
        query, key, value = form(q_nope, q_rope, c_B1Tc, k_rope)
        if stay_compressed:  # what the form has for queries are heads, none before another
            kwargs["is_causal"] = False
        dropout = self.config.attention_dropout if self.training else 0.0
        output_BTHv, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout,
            **kwargs,
        )
        if stay_compressed:  # Σ_s a_s W_UV c_s = W_UV Σ_s a_s c_s
            _, w_uv_Hvc = self.up_projections()
            output_BTHv = torch.einsum("bhtc,hvc->bthv", output_BTHv, w_uv_Hvc)
            weights = None if weights is None else weights.transpose(1, 2)
        output_BTHv = output_BTHv[..., : self.config.v_head_dim]
        return self.o_proj(output_BTHv.flatten(2)), weights

    def expanded(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, c_B1Sc: torch.Tensor, k_rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (B, H, T, n+r), key (B, H, S, n+r) and value (B, H, S, v, padded) of every head.

        k = [W_UK c; k_rope], value = W_UV c: V2 eq. 10, 11 and 16–18. For many new tokens.
        """
        H, n, v = q_nope.shape[1], self.config.qk_nope_head_dim, self.config.v_head_dim
        kv_BHSd = self.kv_b_proj(c_B1Sc.squeeze(1)).unflatten(-1, (H, n + v)).transpose(1, 2)
        k_nope, value = kv_BHSd.split([n, v], dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, H, -1, -1)), dim=-1)
        # Zeros up to the size of a key, cut off again later: the fused kernels of sdpa take one
        # head size, and without them all scores would be in memory.
        value = F.pad(value, (0, max(0, self.qk_head_dim - v)))
        return torch.cat((q_nope, q_rope), dim=-1), key, value

    def compressed(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, c_B1Sc: torch.Tensor, k_rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (B, 1, H, c+r), key (B, 1, S, c+r) and value (B, 1, S, c), for one new token.

        q · W_UK c = W_UKᵀ q · c (V2 §2.1.2, "absorb"): one new token need not expand all S cached
        ones. As :meth:`expanded`, with W_UV applied after attention. All heads have the same keys
        and values, so they stand as the queries of one head: laid out as H heads, the CPU's kernel
        would copy the cache for each.
        """
        w_uk_Hnc, _ = self.up_projections()
        query_BH1d = torch.cat((q_nope @ w_uk_Hnc, q_rope), dim=-1)
        return query_BH1d.transpose(1, 2), torch.cat((c_B1Sc, k_rope), dim=-1), c_B1Sc

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK (H, n, c) and W_UV (H, v, c), which ``kv_b_proj`` stacks head by head."""
        n, v = self.config.qk_nope_head_dim, self.config.v_head_dim
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (-1, n + v)).split([n, v], dim=1)
        return w_uk, w_uv

    def can_stay_compressed(self, new_tokens: int) -> bool:
        """Whether attention to a cache can use :meth:`compressed`.

        It is cheaper for one new token; flash kernels have no heads of c + r; and a projection that
        was wrapped (adapters), quantised or partitioned (ZeRO-3) has no plain weight to absorb.
        """
        weight = self.kv_b_proj.weight
        return (
            new_tokens == 1
            and self.config._attn_implementation in ("sdpa", "eager")
            and type(self.kv_b_proj) is nn.Linear
            and weight.shape == (self.kv_b_proj.out_features, self.kv_b_proj.in_features)
        )


class DeepseekV3Router(nn.Module):
    """Which K experts a token gets, and with what weights (DeepSeek-V3 2024, §2.1.2).

    ``e_score_correction_bias`` (E,) only steers the choice. It is not trained: once an optimizer
    step ``training/balancing.py`` moves it against the load in ``tokens_per_expert``. It stays fp32
    through dtype casts: in bf16, steps of 0.001 would stop counting at 0.5.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, G = config.n_routed_experts, config.n_group
        check_top_k(config.num_experts_per_tok, E)
        if config.topk_group < G and (E % G or E < 2 * G):
            raise ValueError(
                f"n_routed_experts {E} must be a multiple of n_group {G} with 2 experts or more in "
                "a group, whose score is the sum of its two best"
            )
        if config.topk_group < G and config.num_experts_per_tok > E // G * config.topk_group:
            raise ValueError(
                f"num_experts_per_tok {config.num_experts_per_tok} is more than the "
                f"{E // G * config.topk_group} experts of topk_group {config.topk_group} groups"
            )
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.tokens_per_expert: torch.Tensor | None = None  # see count_expert_load

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow device moves, never dtype casts, with the bias."""
        fp32 = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != fp32.dtype:
            self.e_score_correction_bias = fp32.to(self.e_score_correction_bias.device)
        return self

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> logits (N, E), weights (N, K) and experts (N, K): all in fp32 but the last.

        s = σ(h Wᵀ) (eq. 15); weights = s of the chosen, normalised (eq. 13–14) and scaled.
        """
        x_ND = hidden_states.flatten(0, -2)
        with full_precision(x_ND):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid()
        top_k_index_NK = self.choose(scores_NE)
        weights_NK = scores_NE.gather(1, top_k_index_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return logits_NE, weights_NK * self.config.routed_scaling_factor, top_k_index_NK

    @torch.no_grad()
    def choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, K) experts: the K highest of s + bias (eq. 16) within the best groups.

        A group's score is the sum of its two highest s + bias; ``topk_group`` groups take part.
        """
        config = self.config
        biased_NE = scores_NE + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            biased_NGe = biased_NE.unflatten(-1, (config.n_group, -1))
            group_scores_NG = top_k(biased_NGe, 2)[0].sum(-1)
            _, best_groups = top_k(group_scores_NG, config.topk_group)
            excluded_NG = torch.ones_like(group_scores_NG, dtype=torch.bool)
            excluded_NG = excluded_NG.scatter(1, best_groups, False)
            biased_NE = biased_NGe.masked_fill(excluded_NG.unsqueeze(-1), -torch.inf).flatten(1)
        return top_k(biased_NE, config.num_experts_per_tok)[1]


class DeepseekV3MoE(nn.Module):
    """Σ_k g_k · FFN_{e_k}(h) + FFN_shared(h) (V3 eq. 12, without the residual)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = DeepseekV3Router(config)
        self.experts = Experts(config, config.n_routed_experts, config.moe_intermediate_size)
        self.shared_experts = SwiGLU(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> (B, T, D), the router's logits (N, E) and the chosen experts (N, K)."""
        logits_NE, weights_NK, index_NK = self.gate(hidden_states)
        routed_ND = self.experts(hidden_states.flatten(0, -2), index_NK, weights_NK)
        output = routed_ND.view_as(hidden_states) + self.shared_experts(hidden_states)
        return output, logits_NE, index_NK


class DeepseekV3DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): dense at first, then with experts."""

    mlp: DeepseekV3MoE | SwiGLU

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = SwiGLU(config) if dense else DeepseekV3MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """(B, T, D) -> (B, T, D), and from a layer with experts their logits and choice.

        Those leave the layer as outputs, not as notes on the side: what gradient checkpointing
        computes a second time is then neither counted twice nor cut off from the gradient.
        """
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        if isinstance(mlp_output, tuple):
            mlp_output, *routing = mlp_output
            return hidden_states + mlp_output, *routing
        return (hidden_states + mlp_output,)


class DeepseekV3MTPLayer(DeepseekV3DecoderLayer):
    """Depth k of multi-token prediction (V3 §2.2), published as layer L + k − 1.

    The embedding and the head are the main model's.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self, hidden_states: torch.Tensor, embeddings: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Depth k−1's h_t (B, T, D) and the embeddings of tokens t+k (B, T, D) -> depth k's h_t.

        h' = W [RMSNorm(e); RMSNorm(h)], then one decoder layer (eq. 21–22). The published weights
        have the embedding first, the paper's equation the hidden state.
        """
        x = torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1)
        hidden_states, *routing = super().forward(self.eh_proj(x), **kwargs)
        return self.shared_head["norm"](hidden_states), *routing


def sequence_balance_loss(
    logits_LNE: torch.Tensor, num_experts_per_tok: int, real_BT: torch.Tensor
) -> torch.Tensor:
    """:func:`row_balance_loss` of the K highest scores and of scores normalised a token.

    V3 eq. 17–20, without α. The scores are the raw ones: neither bias nor groups choose here.
    """
    scores = logits_LNE.sigmoid()
    best = scores.topk(num_experts_per_tok, dim=-1).indices
    chosen = torch.zeros_like(scores).scatter_(-1, best, 1.0)
    shares = scores / scores.sum(-1, keepdim=True)
    return row_balance_loss(shares, chosen, num_experts_per_tok, real_BT)


def mtp_targets(
    targets_BT: torch.Tensor, same_document_BT: torch.Tensor, depth: int
) -> torch.Tensor:
    """Depth k's targets: at position t token t + 1 + k, which is the main model's target of t + k.

    −100 where ``same_document_BT`` (see :func:`reaches`, for k + 1 tokens) says that it lies
    elsewhere.
    """
    ahead = F.pad(targets_BT[:, depth:], (0, min(depth, targets_BT.shape[1])), value=IGNORE_INDEX)
    return ahead.masked_fill(~same_document_BT, IGNORE_INDEX)


def reaches(position_ids: torch.Tensor, real_BT: torch.Tensor, tokens_ahead: int) -> torch.Tensor:
    """(B, T) bool: token t is real and token t + ``tokens_ahead`` exists in its document."""
    if tokens_ahead >= position_ids.shape[1]:
        return torch.zeros_like(real_BT)
    ahead = F.pad(position_ids[:, tokens_ahead:], (0, tokens_ahead), value=-1)
    return real_BT & (ahead == position_ids + tokens_ahead)


@dataclass
class DeepseekV3ModelOutput(MoeModelOutputWithPast):
    """With the training forward's sequence-level balance loss."""

    balance_loss: torch.Tensor | None = None


@dataclass
class DeepseekV3CausalLMOutput(MoeCausalLMOutputWithPast):
    """``loss`` is the main cross-entropy alone; what a recipe may add to it stands beside it."""

    mtp_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None


class MiniDeepseekV3PreTrainedModel(ExpertsModelMixin, MiniPreTrainedModel):
    """Names that transformers looks for on the class."""

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    stock_architecture = "DeepseekV3ForCausalLM"
    _no_split_modules = ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # The published checkpoints repeat the embedding and the head in every MTP layer.
    _keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"]
    _can_record_outputs = {
        "hidden_states": DeepseekV3DecoderLayer,
        "attentions": DeepseekV3Attention,
        "router_logits": OutputRecorder(DeepseekV3Router, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekV3Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        drop_mtp: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """A stock checkpoint; ``drop_mtp`` leaves the MTP layers out of weights and config."""
        config = self.config
        config.topk_method, config.scoring_func = "noaux_tc", "sigmoid"  # vLLM reads them
        mtp_layers = config.num_nextn_predict_layers
        if drop_mtp:
            prefixes = tuple(
                f"{prefix}layers.{config.num_hidden_layers + depth}."
                for depth in range(mtp_layers)
                for prefix in ("model.", "")
            )
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefixes)}
            config.num_nextn_predict_layers = 0
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            config.num_nextn_predict_layers = mtp_layers


class MiniDeepseekV3Model(MiniDeepseekV3PreTrainedModel):
    """Embedding, decoder layers, final norm; behind the decoder layers, the MTP layers."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        L = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, i) for i in range(L))
        self.layers.extend(
            DeepseekV3MTPLayer(config, L + depth)
            for depth in range(config.num_nextn_predict_layers)
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
    ) -> DeepseekV3ModelOutput:
        """Tokens (B, T) -> last_hidden_state (B, T, D).

        ``position_ids`` (B, T) that restart at 0, without an ``attention_mask``, are a packed row:
        its documents do not see each other. ``documents`` are those, from who knows them already:
        finding them makes the host wait. In training the experts' load is counted, and
        ``balance_loss`` is there.
        """
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask, attention_kwargs = prepare_attention(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, documents
        )
        real = self.real_tokens(inputs_embeds, attention_mask, position_ids)
        if position_ids is None:
            position_ids = positions_after(inputs_embeds, past_key_values)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        routings = {}
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states, *routings[i] = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **(kwargs | attention_kwargs),
            )
        return DeepseekV3ModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            balance_loss=self.balance(routings, real),
        )

    def predict_further(
        self,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """One (h, answers, balance_loss) for each MTP depth k = 1, 2, … (V3 eq. 21–22).

        h (B, T, D) at position t is to predict token t + 1 + k; ``answers`` (B, T) says where that
        token lies in t's document. ``hidden_states`` (B, T, D) is the main model's last, after its
        final norm, as in vLLM and SGLang. A position whose token t + k lies in another document
        (or nowhere) computes nonsense that no valid position sees, for attention is causal and
        keeps to documents.
        """
        B, T, _ = inputs_embeds.shape
        mask, attention_kwargs = prepare_attention(
            self.config, inputs_embeds, attention_mask, position_ids, None, documents
        )
        real = self.real_tokens(inputs_embeds, attention_mask, position_ids)
        if position_ids is None:
            position_ids = positions_after(inputs_embeds, None)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        first = self.config.num_hidden_layers
        for depth, layer in enumerate(self.layers[first:], start=1):
            embeddings = F.pad(inputs_embeds[:, depth:], (0, 0, 0, min(depth, T)))
            hidden_states, *routing = layer(
                hidden_states,
                embeddings,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                **(kwargs | attention_kwargs),
            )
            balance_loss = self.balance(
                {first + depth - 1: routing}, reaches(position_ids, real, depth)
            )
            yield hidden_states, reaches(position_ids, real, depth + 1), balance_loss

    def real_tokens(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, T) bool, False on padding."""
        B, T, _ = inputs_embeds.shape
        real = real_tokens(attention_mask, position_ids, B)
        if real is None:
            return torch.ones(B, T, dtype=torch.bool, device=inputs_embeds.device)
        return real[:, -T:]  # an attention_mask covers cached tokens too

    def balance(
        self, routings: dict[int, list[torch.Tensor]], real_BT: torch.Tensor
    ) -> torch.Tensor | None:
        """Count the experts' load of these layers and return their balance loss; in training only.

        ``routings``: layer -> [logits (N, E), chosen experts (N, K)], or [] of a dense layer.
        """
        routings = {i: routing for i, routing in routings.items() if routing}
        if not self.training or not routings:
            return None
        count_expert_load(
            [self.layers[i].get_submodule("mlp.gate") for i in routings],
            [index_NK for _, index_NK in routings.values()],
            real_BT,
            self.config.n_routed_experts,
        )
        logits_LNE = torch.stack([logits_NE for logits_NE, _ in routings.values()])
        return sequence_balance_loss(logits_LNE, self.config.num_experts_per_tok, real_BT)


class MiniDeepseekV3ForCausalLM(CausalLM, MiniDeepseekV3PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, which the MTP layers share."""

    decoder_class = MiniDeepseekV3Model

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
        shift_labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        num_target_tokens: int | None = None,
        predict_further: bool | None = None,
        **kwargs: Any,
    ) -> DeepseekV3CausalLMOutput:
        """Tokens (B, T) -> logits (B, T, V), and the losses if there are labels.

        Arguments, ``loss`` and ``logits`` are those of :meth:`CausalLM.forward`.

        ``mtp_loss`` is the mean over MTP depths of Σ / ``num_items_in_batch``, by default the
        depth's own targets (V3 eq. 24–25 without λ); ``predict_further`` turns it on or off
        (default: while training with labels). ``balance_loss``, in training, is
        :func:`sequence_balance_loss`. Neither is part of ``loss``.
        """
        targets = next_tokens(labels, shift_labels)
        if predict_further is None:
            predict_further = self.training and targets is not None
        predict_further = predict_further and self.config.num_nextn_predict_layers > 0
        if predict_further and inputs_embeds is None:  # the MTP layers read the embeddings too
            inputs_embeds, input_ids = self.model.embed_tokens(input_ids), None
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
        balance_loss = outputs.balance_loss
        loss, logits = self.loss_and_logits(
            hidden_states,
            targets,
            num_items_in_batch,
            logits_to_keep,
            skip_logits,
            num_target_tokens,
        )
        mtp_loss = None
        if predict_further:
            if targets is None or inputs_embeds is None or past_key_values is not None:
                raise ValueError("predict_further needs labels, and no past_key_values")
            depths = self.model.predict_further(
                hidden_states, inputs_embeds, attention_mask, position_ids, **kwargs
            )
            losses = []
            for depth, (further_BTD, answers_BT, depth_balance_loss) in enumerate(depths, start=1):
                depth_targets = mtp_targets(targets, answers_BT, depth)
                items = num_items_in_batch
                if items is None:
                    items = (depth_targets != IGNORE_INDEX).sum().clamp(min=1)
                # A depth has no more targets than the main model: some reach past a document.
                losses.append(self.lm_head(further_BTD, depth_targets, num_target_tokens) / items)
                if depth_balance_loss is not None:
                    balance_loss = depth_balance_loss + (
                        0 if balance_loss is None else balance_loss
                    )
            mtp_loss = torch.stack(losses).mean()
            if loss is not None:
                # DDP asks every parameter to take part in what is differentiated, also when that
                # is the loss alone.
                loss = loss + 0 * mtp_loss
        return DeepseekV3CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=mtp_loss,
            balance_loss=balance_loss,
        )
