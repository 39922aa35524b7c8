"""Routed experts: E small SwiGLU blocks, of which a router picks K for every token.

:func:`grouped_experts` sorts the (token, expert) pairs by expert and multiplies each expert's run
of rows with its own matrix in one kernel: nothing loops over experts, and nothing asks the device
how many tokens an expert got. :func:`eager_experts` is the readable reference. S = N·K is the
number of (token, expert) pairs; the other letters are those of ``__init__.py``.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .precision import autocast_dtype


class Experts(nn.Module):
    """Σ_k g_k · FFN_{e_k}(x), the routed part of a mixture of experts (DeepSeekMoE 2024, eq. 3).

    All experts' matrices are stacked, under the keys that transformers has for them in memory:
    ``gate_up_proj`` (E, 2F, D), gate rows before up rows, and ``down_proj`` (E, D, F); on disk each
    expert has its own, as on the hub. A model that holds this module inherits from
    :class:`ExpertsModelMixin`. Raises ValueError for sizes that the grouped kernel cannot take.
    """

    # What transformers' own kernels, which a config may name, want to know of the module.
    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_concatenated, is_transposed, _is_expert_parallel = True, False, False

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__()
        D, F_ = config.hidden_size, intermediate_size
        if D % 8 or F_ % 8:
            raise ValueError(
                f"hidden_size {D} and moe_intermediate_size {F_} must be multiples of 8: grouped "
                "matrix multiplication needs rows that begin at multiples of 16 bytes"
            )
        self.config = config
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(num_experts, D, F_))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self,
        hidden_ND: torch.Tensor,
        top_k_index_NK: torch.Tensor,
        top_k_weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens (N, D), their experts (N, K) int64 and gates (N, K) -> (N, D).

        Computes in the autocast dtype where autocast is on, and returns hidden_ND's dtype.
        """
        # Autocast does not know the grouped kernel: left to it, a bf16 run would compute its
        # experts in fp32, silently (pytorch issue 174763).
        dtype = autocast_dtype(hidden_ND) or self.gate_up_proj.dtype
        gate_up_proj, down_proj = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        x_ND = hidden_ND.to(dtype)
        implementation = self.config._experts_implementation
        if implementation is None and x_ND.dtype != torch.bfloat16:
            # torch can trace the grouped kernel in bf16 only; transformers' has a stand-in for it.
            implementation = "grouped_mm" if torch.compiler.is_compiling() else None
        if implementation is None:
            out_ND = grouped_experts(
                self._apply_gate, gate_up_proj, down_proj, x_ND, top_k_index_NK, top_k_weights_NK
            )
        else:
            compute = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, eager_experts)
            experts = self._with_matrices(gate_up_proj, down_proj)
            out_ND = compute(experts, x_ND, top_k_index_NK, top_k_weights_NK)
        return out_ND.to(hidden_ND.dtype)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(…, 2F) -> (…, F): act(gate) · up. The name is transformers'."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _with_matrices(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> "Experts":
        """This module with other matrices, for kernels that ask a module for them."""
        if gate_up_proj is self.gate_up_proj and down_proj is self.down_proj:
            return self  # torch.compile cannot trace the copy
        experts = copy(self)
        experts._parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}  # type: ignore[dict-item]
        return experts


def grouped_experts(
    apply_gate: Callable[[torch.Tensor], torch.Tensor],
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    hidden_ND: torch.Tensor,
    top_k_index_NK: torch.Tensor,
    top_k_weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Every token through its K experts by two grouped matrix multiplications -> (N, D).

    Matrices (E, 2F, D) and (E, D, F) in the dtype of the tokens; ``apply_gate``: (S, 2F) -> (S, F).
    """
    N, K = top_k_index_NK.shape
    expert_S, pair_S = top_k_index_NK.flatten().sort()
    place_S = torch.empty_like(pair_S).scatter_(  # sorted row s belongs to pair pair_S[s], and back
        0, pair_S, torch.arange(N * K, device=pair_S.device)
    )
    # Expert e's rows end where the first larger index would be inserted.
    each_expert = torch.arange(len(gate_up_proj), device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, each_expert, right=True, out_int32=True)
    x_SD = _TokensByExpert.apply(hidden_ND, pair_S, place_S)
    gate_up_S2F = F.grouped_mm(x_SD, gate_up_proj.transpose(1, 2), offs=ends_E)
    hidden_SF = apply_gate(gate_up_S2F)
    out_SD = F.grouped_mm(hidden_SF, down_proj.transpose(1, 2), offs=ends_E)
    out_NKD = _Reorder.apply(out_SD, place_S, pair_S).view(N, K, -1)
    return (out_NKD * top_k_weights_NK.unsqueeze(-1)).sum(1)


class _Reorder(torch.autograd.Function):
    """x[order], for an ``order`` in which every row occurs once and its ``inverse``.

    Autograd cannot know that: its gradient of x[order] adds rows into zeros, atomically on a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SD: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_S)
        return x_SD[order_S]

    @staticmethod
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse_S,) = ctx.saved_tensors
        return grad_SD[inverse_S], None, None


class _TokensByExpert(torch.autograd.Function):
    """Row s is the token of pair ``pair_S[s]``: (N, D) -> (S, D). ``place_S`` is the inverse."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, pair_S: torch.Tensor, place_S: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(place_S)
        ctx.num_tokens = hidden_ND.shape[0]
        return hidden_ND[pair_S // (pair_S.shape[0] // hidden_ND.shape[0])]

    @staticmethod
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_S,) = ctx.saved_tensors
        return grad_SD[place_S].view(ctx.num_tokens, -1, grad_SD.shape[-1]).sum(1), None, None


def eager_experts(
    experts: Experts,
    hidden_ND: torch.Tensor,
    top_k_index_NK: torch.Tensor,
    top_k_weights_NK: torch.Tensor,
) -> torch.Tensor:
    """The same, one expert after another -> (N, D): the readable reference."""
    out_NKD = hidden_ND.new_zeros(*top_k_index_NK.shape, hidden_ND.shape[-1])
    for e in range(experts.num_experts):
        token, choice = (top_k_index_NK == e).nonzero(as_tuple=True)
        gate_up = F.linear(hidden_ND[token], experts.gate_up_proj[e])
        out_NKD[token, choice] = F.linear(experts._apply_gate(gate_up), experts.down_proj[e])
    return (out_NKD * top_k_weights_NK.unsqueeze(-1)).sum(1)


class ExpertsModelMixin:
    """What a PreTrainedModel with :class:`Experts` inside tells transformers. Stands before it."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes. transformers guesses by searching the model's own source for its decorator."""
        return True

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the weights are laid out and initialised as by transformers' own class.

        So that loading fuses and saving un-fuses the experts by transformers' own conversions.
        """
        return False

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str | None:
        """None means :func:`grouped_experts`; "eager" the reference; else transformers' kernels."""
        if requested_experts is None:
            return None
        return super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Experts):
            std = self.config.initializer_range  # type: ignore[attr-defined]
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


def check_top_k(k: int, experts: int) -> None:
    """Refuse a router that would choose more experts than there are. Raises ValueError."""
    if k > experts:
        raise ValueError(f"num_experts_per_tok {k} is more than the {experts} experts of a layer")


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of (…, E), in falling order: values and indices (…, k).

    In a layer compiled for a GPU, for small k, as k maxima: they become part of the kernels around
    them, while torch's own top-k is one that sorts each row of a handful of scores by itself.
    """
    if not (scores.device.type == "cuda" and torch.compiler.is_compiling() and k <= 4):
        best = scores.topk(k, dim=-1)
        return best.values, best.indices
    place = torch.arange(scores.shape[-1], device=scores.device)
    values, indices = [], []
    for _ in range(k):
        value, index = scores.max(-1, keepdim=True)
        values.append(value)
        indices.append(index)
        scores = scores.masked_fill(place == index, -torch.inf)
    return torch.cat(values, -1), torch.cat(indices, -1)


def real_tokens(
    attention_mask: Any, position_ids: torch.Tensor | None, batch_size: int
) -> torch.Tensor | None:
    """(B, T) bool, False on padding, or None where there is none.

    Padding is what a (B, T) ``attention_mask`` hides or, in packed rows, the positions 0 that end a
    row. (A real document of one token at the very end of a row looks the same, and predicts
    nothing.)
    """
    if attention_mask is not None:
        return attention_mask.bool() if attention_mask.ndim == 2 else None
    if position_ids is None or position_ids.shape[1] == 1:
        return None
    alone = (position_ids == 0) & (F.pad(position_ids[:, 1:], (0, 1)) == 0)
    padding = alone.flip(1).cumprod(1).flip(1)
    return (padding == 0).expand(batch_size, -1)


def row_balance_loss(
    shares_LNE: torch.Tensor, chosen_LNE: torch.Tensor, num_chosen: int, real_BT: torch.Tensor
) -> torch.Tensor:
    """Σ over layers of the mean over rows of Σ_e f_e P_e: fp32 scalar, 1 a layer if balanced.

    ``shares`` are a token's scores, summing to 1 over experts; ``chosen`` (0 or 1) marks the
    ``num_chosen`` K experts that it counts for. f_e is the share of a row's tokens that count for
    expert e, times E / K; P_e the mean of their scores for it. A product of means depends on what
    the means are taken over: over rows, unlike over a batch, it does not change with the number of
    rows in a batch. Padding counts neither as token nor as load.
    """
    E = shares_LNE.shape[-1]
    real_BT1 = real_BT.unsqueeze(-1).float()
    tokens_B1 = real_BT1.sum(1).clamp(min=1)

    def row_mean(x_LNE: torch.Tensor) -> torch.Tensor:  # -> (L, B, E)
        return (x_LNE.unflatten(1, real_BT.shape) * real_BT1).sum(2) / tokens_B1

    f, P = row_mean(chosen_LNE) * (E / num_chosen), row_mean(shares_LNE)
    return (f * P).sum(-1).mean(1).sum()


def count_expert_load(
    routers: Sequence[nn.Module],
    top_k_indices_NK: Sequence[torch.Tensor],
    real_BT: torch.Tensor | None,
    num_experts: int,
) -> None:
    """Add each router's (token, expert) pairs of real tokens to its ``tokens_per_expert`` (E,).

    Called by the model, outside what gradient checkpointing computes twice, and only in training.
    The count is a plain attribute (int64, None until the first forward): no dtype cast, checkpoint
    or buffer broadcast of a wrapper touches it. ``training/balancing.py`` reads and resets it.
    """
    if not routers:
        return
    index_LS = torch.stack([index.flatten() for index in top_k_indices_NK])
    if real_BT is None:
        counted_LS = torch.ones_like(index_LS)
    else:
        K = top_k_indices_NK[0].shape[1]
        counted_LS = real_BT.reshape(1, -1, 1).expand(len(routers), -1, K).flatten(1).long()
    load_LE = index_LS.new_zeros(len(routers), num_experts).scatter_add_(1, index_LS, counted_LS)
    for router, load_E in zip(routers, load_LE, strict=True):
        so_far: torch.Tensor | None = router.tokens_per_expert  # type: ignore[assignment]
        router.tokens_per_expert = load_E if so_far is None else so_far + load_E
