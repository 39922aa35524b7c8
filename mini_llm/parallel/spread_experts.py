"""Expert parallelism: each rank of a group of N holds 1/N of every layer's experts.

A model's stacked experts, ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F), are replaced by
:class:`SpreadExperts`, which is called as they are. It sends each (token, expert) pair to the rank
that has the expert, and the answer back (GShard, Lepikhin et al. 2021, §3.2; all-to-all as in
DeepSpeed-MoE, Rajbhandari et al. 2022). Router, shared experts and everything that is computed of
routing stay the model's own, so balance loss, load counts and bias updates are those without.

DeepSpeed partitions, reduces and saves expert parameters by what they are tagged with. Its own
layer for that, AutoEPMoELayer, brings another router and knows neither this project's losses nor
its counts; of it only the bookkeeping is inherited, so that the engine takes ours for one.

Letters: N tokens, K experts a token, S = N·K pairs of this rank, R pairs that it receives, E
experts of the layer, L = E / size of them here, D and F the widths.
"""

import time
from typing import Any

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn


class Wire:
    """What this rank's expert all-to-alls cost since the last :meth:`read`.

    ``rows`` sent to other ranks, a token's vector or its gradient each, their ``bytes``, and the
    ``seconds`` that the host spent in them, waiting for other ranks included. On a GPU the host
    does not wait, and the seconds say little.
    """

    def __init__(self) -> None:
        self.rows, self.bytes, self.seconds = 0, 0, 0.0

    def read(self) -> tuple[int, int, float]:
        """(rows, bytes, seconds); counting begins anew."""
        found = self.rows, self.bytes, self.seconds
        self.rows, self.bytes, self.seconds = 0, 0, 0.0
        return found


class _Exchange(torch.autograd.Function):
    """Rows to the ranks of a group, by given counts; backward the same way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: torch.Tensor,
        send: list[int],
        receive: list[int],
        group: Any,
        rank: int,
        wire: Wire,
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.rank, ctx.wire = send, receive, group, rank, wire
        return _all_to_all(x_SD, send, receive, group, rank, wire)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_SD = _all_to_all(gradients[0], ctx.receive, ctx.send, ctx.group, ctx.rank, ctx.wire)
        return x_SD, None, None, None, None, None


def _all_to_all(
    x_SD: torch.Tensor, send: list[int], receive: list[int], group: Any, rank: int, wire: Wire
) -> torch.Tensor:
    received_RD = x_SD.new_empty(sum(receive), x_SD.shape[1])
    began = time.perf_counter()
    dist.all_to_all_single(
        received_RD,
        x_SD.contiguous(),
        output_split_sizes=receive,
        input_split_sizes=send,
        group=group,
    )
    wire.seconds += time.perf_counter() - began
    rows = sum(send) - send[rank]
    wire.rows += rows
    wire.bytes += rows * x_SD.shape[1] * x_SD.element_size()
    return received_RD


class _LocalExperts(nn.Module):
    """The L experts of this rank, under the names that DeepSpeed's checkpoint code has for them."""

    def __init__(self, gate_LFD: Any, down_LDF: Any, up_LFD: Any, act_fn: Any) -> None:
        super().__init__()
        self.w1 = nn.Parameter(gate_LFD.clone())
        self.w2 = nn.Parameter(down_LDF.clone())
        self.w3 = nn.Parameter(up_LFD.clone())
        self.act_fn = act_fn

    def forward(self, x_RD: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
        """Rows (R, D) in runs of one expert each, which end at ``ends`` (L,) int32 -> (R, D)."""
        gate, down, up = (w.to(x_RD.dtype).transpose(1, 2) for w in (self.w1, self.w2, self.w3))
        hidden_RF = self.act_fn(F.grouped_mm(x_RD, gate, offs=ends_L))
        hidden_RF = hidden_RF * F.grouped_mm(x_RD, up, offs=ends_L)
        return F.grouped_mm(hidden_RF, down, offs=ends_L)


class SpreadExperts(AutoEPMoELayer):
    """Σ_k g_k · FFN_{e_k}(x) with the experts spread over the ``size`` ranks of a group."""

    is_spread = True

    def __init__(self, source: Any, size: int, rank: int, wire: Wire) -> None:
        nn.Module.__init__(self)  # not AutoEPMoELayer's, which would build a router
        E = source.gate_up_proj.shape[0]
        self.ep_size, self.ep_rank, self.wire = size, rank, wire
        self.num_experts, self.num_local_experts = E, E // size
        self.ep_group_name = f"ep_size_{size}"
        self.ep_group: Any = None  # set by set_deepspeed_parallelism
        self.folding_group_handles = self.tp_group = None
        self.combine_impl = self.comm_backend = None
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            E, self.num_local_experts, size
        )
        here = slice(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)
        gate_LFD, up_LFD = source.gate_up_proj.detach()[here].chunk(2, dim=1)
        down_LDF = source.down_proj.detach()[here]
        self.experts = _LocalExperts(gate_LFD, down_LDF, up_LFD, source.act_fn)
        for parameter in self.experts.parameters():
            parameter.requires_grad_(source.gate_up_proj.requires_grad)
            self._tag(parameter)

    def _tag(self, parameter: Any) -> None:
        """What DeepSpeed asks of an expert's parameter: how to reduce, partition and save it."""
        shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        parameter.allreduce = False
        parameter.group_name = self.ep_group_name
        parameter.ds_zero_placement_family = "autoep_expert"
        parameter.ds_zero_partition_group_name = self.ep_group_name
        metadata = {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }
        setattr(parameter, DS_AUTOEP_UC_META, metadata)

    def forward(
        self,
        hidden_ND: torch.Tensor,
        top_k_index_NK: torch.Tensor,
        top_k_weights_NK: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens (N, D), their experts (N, K) int64 and gates (N, K) -> (N, D).

        A collective of the group, forward and backward. The host waits for the counts, once.
        """
        N, K = top_k_index_NK.shape
        size, L = self.ep_size, self.num_local_experts
        dtype = _compute_dtype(hidden_ND, self.experts.w1.dtype)
        expert_S, pair_S = top_k_index_NK.flatten().sort(stable=True)
        counts_E = torch.bincount(expert_S, minlength=self.num_experts)
        coming_E = torch.empty_like(counts_E)  # (from each rank, for each expert here)
        dist.all_to_all_single(coming_E, counts_E, group=self.ep_group)
        send = counts_E.view(size, L).sum(1).tolist()
        coming = coming_E.view(size, L)
        receive = coming.sum(1).tolist()

        def exchange(x: torch.Tensor, out: list[int], into: list[int]) -> torch.Tensor:
            y: torch.Tensor = _Exchange.apply(x, out, into, self.ep_group, self.ep_rank, self.wire)
            return y

        x_RD = exchange(hidden_ND.to(dtype)[pair_S // K], send, receive)
        # They arrive rank by rank; the experts want them expert by expert.
        local = torch.arange(L, device=x_RD.device).repeat(size)
        order_R = local.repeat_interleave(coming.flatten()).argsort(stable=True)
        ends_L = coming.sum(0).cumsum(0).to(torch.int32)
        answer_RD = self.experts(x_RD[order_R], ends_L)
        answer_RD = torch.zeros_like(answer_RD).index_copy(0, order_R, answer_RD)
        out_SD = exchange(answer_RD, receive, send)
        out_NKD = torch.zeros_like(out_SD).index_copy(0, pair_S, out_SD).view(N, K, -1)
        return (out_NKD * top_k_weights_NK.unsqueeze(-1)).sum(1).to(hidden_ND.dtype)


def _compute_dtype(x: torch.Tensor, weights: torch.dtype) -> torch.dtype:
    """Autocast's where it is on, else that of the weights: autocast does not know grouped_mm."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weights
