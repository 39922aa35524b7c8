"""What a model's outputs contribute to the objective, micro-batch by micro-batch."""

import re
from typing import Any

import torch
from torch import nn


def mtp_weight_at(step: int, *, first: float, last: float, max_steps: int) -> float:
    """Weight of the multi-token-prediction loss at optimizer step ``step`` (from 1).

    ``first`` for two thirds of the run, then ``last``, as DeepSeek-V3 did (§4.2: 0.3 for 10 T of
    14.8 T tokens, then 0.1).
    """
    return first if 3 * step <= 2 * max_steps else last


def mtp_options(model: nn.Module, *, weight: float) -> dict[str, bool]:
    """Options of the model's forward that compute the multi-token-prediction loss or leave it out.

    With ``weight`` 0 the layers of that loss are frozen, because an optimizer would let even
    weights without a gradient decay. Empty for a model without them. Call it before ``prepare``.
    """
    config: Any = model.config
    if not getattr(config, "num_nextn_predict_layers", 0):
        return {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            parameter.requires_grad_(weight > 0)
    return {"predict_further": weight > 0}


def combine_losses(
    outputs: Any, *, mtp_weight: float, balance_weight: float, micro_batches: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(objective, its parts by metric name) of one micro-batch.

    ``outputs.loss`` and ``outputs.mtp_loss`` are already shares of the step's mean over tokens.
    ``outputs.balance_loss`` is a mean over this micro-batch's rows; ``micro_batches``, those of the
    whole step over all ranks, turns it into a share of the mean over the step's rows. So summing
    the parts over micro-batches and ranks gives values that do not depend on how the step is cut.
    """
    objective = outputs.loss
    parts = {"train/loss": outputs.loss.detach()}
    mtp_loss = getattr(outputs, "mtp_loss", None)
    if mtp_loss is not None:
        objective = objective + mtp_weight * mtp_loss
        parts["train/mtp_loss"] = mtp_loss.detach()
    balance_loss = getattr(outputs, "balance_loss", None)
    if balance_loss is not None:
        share = balance_loss / micro_batches
        objective = objective + balance_weight * share
        parts["train/balance_loss"] = share.detach()
    return objective, parts
