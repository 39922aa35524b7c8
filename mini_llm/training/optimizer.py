"""AdamW with decay groups, and the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019): matrices decay, norms and biases do not.

    Experts that are spread over ranks (parallel/spread_experts.py) are a group of their own.
    Torch's fused kernel on every device: it reads and writes each number once. Raises RuntimeError
    on a device that has none. Under zero.Init a partitioned parameter looks one-dimensional; its
    real shape is in ``ds_shape``.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    spread: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if not getattr(parameter, "allreduce", True):
            spread.append(parameter)
        else:
            (decay if len(shape) >= 2 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
    ]
    if spread:  # DeepSpeed goes by this group's mark and name; they are matrices, so they decay
        name = spread[0].group_name  # type: ignore[attr-defined]
        groups.append({"params": spread, "weight_decay": weight_decay, "name": name, "moe": True})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def describe_optimizer(optimizer: Any) -> str:
    """The optimizer inside Accelerate's and DeepSpeed's wrappers, e.g. "AdamW (fused)"."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    # What torch's AdamW.step looks at to choose its kernel.
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return f"{type(optimizer).__name__}{' (fused)' if fused else ''}"


def learning_rate_at(
    step: int,
    *,
    peak: float,
    max_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    schedule: str = "cosine",
    decay_steps: int = 0,
) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1), ``peak`` at ``warmup_steps``.

    After a linear warmup:
    - ``cosine`` falls to ``peak · min_lr_ratio`` at ``max_steps`` (Loshchilov & Hutter 2017);
    - ``wsd`` (warmup, stable, decay; Hu et al. 2024) stays at the peak until ``decay_steps`` before
      the end, then falls there as 1 − √progress (Hägele et al. 2024), so that a decay of another
      length can be branched from any checkpoint of the stable part;
    - ``constant`` stays at the peak.

    Being a function of the step alone, it has no state to save and nothing to get out of step.
    """
    if step <= warmup_steps:
        return peak * step / max(warmup_steps, 1)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    elif schedule == "wsd":
        progress = (step - (max_steps - decay_steps)) / max(decay_steps, 1)
        share = 1 - math.sqrt(min(max(progress, 0.0), 1.0))
    else:
        share = 1.0
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * share)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every parameter group of a (wrapped) optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
