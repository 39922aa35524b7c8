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

    Uses torch's fused kernel on CUDA. Under zero.Init a partitioned parameter looks
    one-dimensional; its real shape is in ``ds_shape``.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decay if len(shape) >= 2 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
    ]
    on_cuda = all(parameter.is_cuda for parameter in decay)
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True if on_cuda else None
    )


def learning_rate_at(
    step: int, *, peak: float, max_steps: int, warmup_steps: int, min_lr_ratio: float
) -> float:
    """Learning rate of optimizer step ``step`` (the first is 1): linear warmup, cosine decay.

    Reaches ``peak`` at step ``warmup_steps`` and ``peak · min_lr_ratio`` at ``max_steps``. Being a
    function of the step alone, it has no state to save and nothing to get out of step.
    """
    if step <= warmup_steps:
        return peak * step / max(warmup_steps, 1)
    progress = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * cosine)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every parameter group of a (wrapped) optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
