"""Keeping experts equally busy, once per optimizer step and outside the model.

Routers count in ``tokens_per_expert`` the real tokens that they send to each expert (see
``models/common/experts.py``). :func:`take_expert_load` sums the counts over ranks and starts the
next step's; :func:`update_expert_bias` is DeepSeek-V3's balancing without an auxiliary loss
(Wang et al. 2024, algorithm 1), for routers that have a correction bias.

    load = take_expert_load(model)                       # after the step's backward passes
    if load is not None:
        update_expert_bias(model, load, speed=1e-3)
        metrics |= load.metrics()                        # only when logging: reads the device
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class ExpertLoad:
    """(Token, expert) pairs of one optimizer step, over all ranks.

    ``counts`` (layers, E) int64 on the model's device; ``layers`` are the rows' layer numbers.
    """

    layers: tuple[int, ...]
    counts: torch.Tensor

    def metrics(self, expert_parallel_size: int = 1) -> dict[str, Any]:
        """The step's ``moe/…`` metrics; None where a ratio has no value. Waits for the device.

        By layer: ``expert_load``, the counts, a list in the order of the experts;
        ``load_max_over_mean``, 1 in perfect balance and E if one expert gets everything;
        ``load_max_over_min``, None once an expert gets nothing. ``dead_experts`` counts those, over
        all layers. With experts spread over ``expert_parallel_size`` ranks also what each rank of a
        group computes, summed over groups: ``rank_load`` and ``rank_load_max_over_mean``.
        """
        metrics: dict[str, Any] = {}
        rows: list[list[int]] = self.counts.tolist()
        for layer, row in zip(self.layers, rows, strict=True):
            prefix = f"moe/layer_{layer}"
            metrics[f"{prefix}/expert_load"] = row
            metrics[f"{prefix}/load_max_over_mean"] = _max_over_mean(row)
            metrics[f"{prefix}/load_max_over_min"] = max(row) / min(row) if min(row) else None
            if expert_parallel_size > 1:
                here = len(row) // expert_parallel_size
                ranks = [sum(row[i : i + here]) for i in range(0, len(row), here)]
                metrics[f"{prefix}/rank_load"] = ranks
                metrics[f"{prefix}/rank_load_max_over_mean"] = _max_over_mean(ranks)
        metrics["moe/dead_experts"] = float(sum(count == 0 for row in rows for count in row))
        return metrics


def _max_over_mean(counts: list[int]) -> float | None:
    return max(counts) * len(counts) / sum(counts) if sum(counts) else None


def find_routers(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that count expert load, by the number of their layer, in order.

    ``model`` may be wrapped (DDP, DeepSpeed). Multi-token-prediction layers follow the others.
    """
    routers = {}
    for name, module in model.named_modules():
        if hasattr(module, "tokens_per_expert"):
            match = re.search(r"\blayers\.(\d+)\.", name)
            if match is None:
                raise ValueError(f"{name} counts expert load but its name has no layers.<number>")
            routers[int(match[1])] = module
    return dict(sorted(routers.items()))


@torch.no_grad()
def take_expert_load(model: nn.Module) -> ExpertLoad | None:
    """This optimizer step's load summed over all ranks; the routers begin to count anew.

    Every rank must call it, after its last backward pass of the step. One collective and no wait
    for the device. None for a model that has no routers or has not trained since the last call.
    """
    routers = {
        layer: router
        for layer, router in find_routers(model).items()
        if router.tokens_per_expert is not None
    }
    if not routers:
        return None
    counts_LE = torch.stack([router.tokens_per_expert for router in routers.values()])  # type: ignore[misc]
    for router in routers.values():
        router.tokens_per_expert = None  # type: ignore[assignment]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LE)
    return ExpertLoad(tuple(routers), counts_LE)


@torch.no_grad()
def bias_spread(model: nn.Module) -> dict[str, float]:
    """``moe/layer_<i>/bias_spread``: largest less smallest correction bias of a layer's experts.

    Only of routers that have such biases. Waits for the device, once.
    """
    biases = {
        layer: router.e_score_correction_bias
        for layer, router in find_routers(model).items()
        if hasattr(router, "e_score_correction_bias")
    }
    if not biases:
        return {}
    spreads = torch.stack([bias.max() - bias.min() for bias in biases.values()]).tolist()  # type: ignore[operator]
    return {
        f"moe/layer_{layer}/bias_spread": spread
        for layer, spread in zip(biases, spreads, strict=True)
    }


@torch.no_grad()
def update_expert_bias(
    model: nn.Module, load: ExpertLoad, *, speed: float, grad_norm: torch.Tensor | float = 0.0
) -> None:
    """b_i += speed · sign(mean load − load_i), in fp32: overloaded experts become less attractive.

    Only for routers that have an ``e_score_correction_bias`` (E,). The same on all ranks, for
    ``load`` is. Where ``grad_norm`` is not finite the step has changed no weight, and no bias
    changes. Does not wait for the device. Raises TypeError if a bias has lost its precision.
    """
    if isinstance(grad_norm, float):
        speed = speed if math.isfinite(grad_norm) else 0.0
    routers = find_routers(model)
    counts_LE = load.counts.float()
    direction_LE = (counts_LE.mean(1, keepdim=True) - counts_LE).sign()
    if isinstance(grad_norm, torch.Tensor):
        direction_LE *= grad_norm.isfinite()
    for layer, direction_E in zip(load.layers, direction_LE, strict=True):
        bias = getattr(routers[layer], "e_score_correction_bias", None)
        if bias is None:
            continue
        if bias.dtype != torch.float32:
            raise TypeError(f"the router bias of layer {layer} is {bias.dtype}; it must be float32")
        bias.add_(direction_E.to(bias.device), alpha=speed)
