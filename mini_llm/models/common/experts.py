"""Routed experts: E small SwiGLU blocks, of which a router picks K for every token.

Three ways to compute the same thing. ``grouped_mm`` sorts the (token, expert) pairs by expert and
multiplies each expert's run of rows with its own matrix in one kernel: nothing loops over experts,
and nothing asks the device how many tokens an expert got. ``eager`` is the readable reference.
``batched_mm`` copies an expert's matrices to every token: only for a handful of tokens.
S = N·K is the number of (token, expert) pairs; the other letters are those of ``__init__.py``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class Experts(nn.Module):
    """Σ_k g_k · FFN_{e_k}(x), the routed part of a mixture of experts (DeepSeekMoE 2024, eq. 3).

    All experts' matrices are stacked, under the keys that transformers has for them in memory:
    ``gate_up_proj`` (E, 2F, D), gate rows before up rows, and ``down_proj`` (E, D, F).
    ``_init_weights`` of the model initialises them. Raises ValueError for sizes that the grouped
    kernel cannot take.
    """

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
        compute = EXPERTS_IMPLEMENTATIONS[self.config._experts_implementation or "grouped_mm"]
        expert_out_NKD = compute(self, hidden_ND, top_k_index_NK)
        out_ND = (expert_out_NKD * top_k_weights_NK.unsqueeze(-1)).sum(1)
        return out_ND.to(hidden_ND.dtype)

    def glu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(…, 2F) -> (…, F): act(gate) · up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def matmul_operands(
        self, hidden_ND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden, gate_up_proj, down_proj) in one dtype, autocast's where autocast is on.

        Autocast does not know the grouped kernel: without this a bf16 run would compute its experts
        in fp32, silently (pytorch issue 174763).
        """
        device = hidden_ND.device.type
        dtype = self.gate_up_proj.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return hidden_ND.to(dtype), self.gate_up_proj.to(dtype), self.down_proj.to(dtype)


def grouped_experts(
    experts: Experts, hidden_ND: torch.Tensor, top_k_index_NK: torch.Tensor
) -> torch.Tensor:
    """Every token through its K experts by two grouped matrix multiplications -> (N, K, D)."""
    N, K = top_k_index_NK.shape
    x_ND, gate_up_E2FD, down_EDF = experts.matmul_operands(hidden_ND)
    expert_S, pair_S = top_k_index_NK.flatten().sort()
    # Expert e's rows end where the first larger index would be inserted.
    each_expert = torch.arange(experts.num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, each_expert, right=True, out_int32=True)
    x_SD = x_ND[pair_S // K]
    gate_up_S2F = F.grouped_mm(x_SD, gate_up_E2FD.transpose(1, 2), offs=ends_E)
    out_SD = F.grouped_mm(experts.glu(gate_up_S2F), down_EDF.transpose(1, 2), offs=ends_E)
    # Back to the order of the tokens: sorted row s belongs to pair pair_S[s].
    return torch.zeros_like(out_SD).index_copy(0, pair_S, out_SD).view(N, K, -1)


def eager_experts(
    experts: Experts, hidden_ND: torch.Tensor, top_k_index_NK: torch.Tensor
) -> torch.Tensor:
    """The same, one expert after another -> (N, K, D): the readable reference."""
    x_ND, gate_up_E2FD, down_EDF = experts.matmul_operands(hidden_ND)
    out_NKD = x_ND.new_zeros(*top_k_index_NK.shape, x_ND.shape[-1])
    for e in range(experts.num_experts):
        token, choice = (top_k_index_NK == e).nonzero(as_tuple=True)
        gate_up = F.linear(x_ND[token], gate_up_E2FD[e])
        out_NKD[token, choice] = F.linear(experts.glu(gate_up), down_EDF[e])
    return out_NKD


def batched_experts(
    experts: Experts, hidden_ND: torch.Tensor, top_k_index_NK: torch.Tensor
) -> torch.Tensor:
    """The same with each pair's own copy of its expert's matrices -> (N, K, D).

    Memory N·K·3·F·D: sensible for decoding a few tokens, never for training.
    """
    N, K = top_k_index_NK.shape
    x_ND, gate_up_E2FD, down_EDF = experts.matmul_operands(hidden_ND)
    expert_S = top_k_index_NK.flatten()
    x_SD1 = x_ND[:, None].expand(N, K, -1).flatten(0, 1).unsqueeze(-1)
    hidden_SF = experts.glu((gate_up_E2FD[expert_S] @ x_SD1).squeeze(-1))
    return (down_EDF[expert_S] @ hidden_SF.unsqueeze(-1)).view(N, K, -1)


# What config._experts_implementation may name (``from_pretrained(experts_implementation=…)``).
EXPERTS_IMPLEMENTATIONS: dict[
    str, Callable[[Experts, torch.Tensor, torch.Tensor], torch.Tensor]
] = {
    "grouped_mm": grouped_experts,
    "eager": eager_experts,
    "batched_mm": batched_experts,
}
