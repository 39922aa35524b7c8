"""The language-model head and its loss, without the full matrix of logits.

With a vocabulary of 32,000 the fp32 logits of 2,048 tokens are 262 MB, and their gradient as much
again. The chunked loss computes a few hundred tokens' logits at a time, takes the gradient with
respect to them while they are there, and throws them away.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 23  # logits alive at a time: 8 M, i.e. 256 tokens of a 32k vocabulary


def next_tokens(
    labels_BT: torch.Tensor | None, shift_labels_BT: torch.Tensor | None = None
) -> torch.Tensor | None:
    """(B, T) targets, position t's being the label of t + 1; None if there are no labels.

    ``labels_BT`` are aligned with the inputs. ``shift_labels_BT``, shifted already, wins over them:
    whoever cuts a row into pieces (sequence parallelism) must shift before the cut.
    """
    if shift_labels_BT is not None or labels_BT is None:
        return shift_labels_BT
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)


def linear_cross_entropy_reference(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """Σ over targets ≠ −100 of −log softmax(h Wᵀ)[target], in nats, with all logits in fp32."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """The reference above, computed chunk by chunk; gradients are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
    ) -> torch.Tensor:
        N = hidden_ND.shape[0]
        chunk = min(N, max(64, _CHUNK_ELEMENTS // weight_VD.shape[0]))
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, N, chunk):
            h, target = hidden_ND[start : start + chunk], targets_N[start : start + chunk, None]
            counted = target != IGNORE_INDEX
            target = target.clamp(min=0)  # any valid index: what is not counted is zeroed below
            logits = F.linear(h, weight_VD).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            loss += ((log_z - logits.gather(-1, target)) * counted).sum()
            if not (need_hidden or need_weight):
                continue
            # ∂loss/∂logits = softmax(logits) − onehot(target)
            grad_logits = logits.sub_(log_z).exp_()
            grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
            grad_logits = grad_logits.mul_(counted).to(h.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad_logits @ weight_VD
            if grad_weight is not None:
                if grad_logits.dtype == torch.float32 and h.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.T, h)
                else:  # the product is rounded to bf16 once a chunk, the sum over chunks is not
                    grad_weight += grad_logits.T @ h
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_loss.to(grad_weight.dtype),
            None,
        )


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """Summed next-token cross-entropy in nats, fp32 scalar; equals the reference, in less memory.

    hidden (N, D) and weight (V, D) in the compute dtype, targets (N,) with −100 where nothing is
    to be predicted. Differentiable once.
    """
    return _ChunkedLinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


class LMHead(nn.Linear):
    """The output projection; given targets it returns the summed loss instead of logits.

    The loss is computed inside this module so that ZeRO-3, which gathers a module's weights around
    its forward, finds the weight that the loss needs.
    """

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, D) -> logits (B, T, V), or with targets (B, T) -> Σ loss, fp32 scalar."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states.flatten(0, 1), self.weight, targets.flatten())
