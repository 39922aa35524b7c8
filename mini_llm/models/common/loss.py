"""The language-model head and its loss, without the full matrix of logits.

With a vocabulary of 32,000 the fp32 logits of 2,048 tokens are 262 MB, and their gradient as much
again. The chunked loss computes a few hundred tokens' logits at a time, takes the gradient with
respect to them while they are there, and throws them away. Fine-tuning supervises a part of its
tokens only: the others' logits are left out if the caller knows how many that part has.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .precision import compute_dtype, full_precision
from .triton import missing_for_triton

IGNORE_INDEX = -100
# Logits alive at a time, of a 32k vocabulary those of 256 tokens on a CPU (its cache) and of 4,096
# on a GPU (256 MiB in bf16: products large enough to fill it).
_CHUNK_ELEMENTS = 1 << 23
_GPU_CHUNK_ELEMENTS = 1 << 27
_GPU_VOCAB_MULTIPLE = 64
_ROWS_MULTIPLE = 64  # of a chunk, and of the positions that are computed when some are left out
# Picking positions out of memory takes time too: it must save this share of them at least.
_WORTH_LEAVING_OUT = 1 / 16
_CACHED_ROWS = 1 << 12  # of a bf16 weight gradient: what a CPU adds up before it leaves its cache


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


def _loss_and_gradient(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, want_gradient: bool, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Σ of a chunk's cross-entropies, fp32, and on request its gradient (C, V) in their dtype.

    ∂loss/∂logits = softmax(logits) − onehot(target); columns from ``vocab_size`` on do not exist.
    As one expression, for torch.compile: on a GPU one kernel reads the logits twice and writes the
    gradient, and no fp32 copy of either is ever in memory.
    """
    column = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    logits = logits_CV.float().masked_fill(column >= vocab_size, -torch.inf)
    counted = (targets_C != IGNORE_INDEX)[:, None]
    is_target = column == targets_C[:, None]
    log_z = logits.logsumexp(-1, keepdim=True)
    loss = torch.where(is_target & counted, log_z - logits, 0.0).sum()
    if not want_gradient:
        return loss, None
    gradient = torch.where(counted, (logits - log_z).exp() - is_target.float(), 0.0)
    return loss, gradient.to(logits_CV.dtype)


@cache
def _loss_and_gradient_on_gpu() -> Any:
    """Compiled, where Triton can work; else as it is written, in more memory and time."""
    can_compile = missing_for_triton() is None
    return torch.compile(_loss_and_gradient) if can_compile else _loss_and_gradient


def _loss_and_gradient_in_place(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, want_gradient: bool, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same operator by operator, for the CPU: all in the memory of the logits' fp32 copy.

    Of fp32 logits it makes none and overwrites them. Here all columns exist.
    """
    dtype = logits_CV.dtype
    counted = (targets_C != IGNORE_INDEX)[:, None]
    target = targets_C[:, None].clamp(min=0)  # any valid index: what does not count is zeroed below
    logits = logits_CV.float()
    del logits_CV  # the caller keeps none either: bf16 logits are gone here
    logits -= logits.amax(-1, keepdim=True)
    logits_at_target = logits.gather(-1, target)
    exponentials = logits.exp_()
    total = exponentials.sum(-1, keepdim=True)
    loss = ((total.log() - logits_at_target) * counted).sum()
    if not want_gradient:
        return loss, None
    gradient = exponentials.mul_(counted / total)
    gradient.scatter_add_(-1, target, -counted.float())
    return loss, gradient.to(dtype)


def _supervised_positions(targets_N: torch.Tensor, num_targets: int | None) -> torch.Tensor | None:
    """(M,) positions, first all whose target counts; None for all N.

    ``num_targets``, how many count, is known on the host: nobody waits for the device.
    """
    if num_targets is None:
        return None
    N = len(targets_N)
    M = min(N, -(-num_targets // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    if N - M < N * _WORTH_LEAVING_OUT:
        return None
    ignored = (targets_N == IGNORE_INDEX).to(torch.uint8)
    return ignored.argsort(stable=True)[:M]


def _even_chunk(rows: int, *, at_most: int) -> int:
    """Rows of a chunk: as few chunks as can be, about as large as each other.

    A small last one would cost a compiled graph of its own.
    """
    chunks = max(1, -(-rows // at_most))
    return max(1, -(-rows // (chunks * _ROWS_MULTIPLE))) * _ROWS_MULTIPLE


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """The reference above, computed chunk by chunk; gradients are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        num_targets: int | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        on_gpu = hidden_ND.device.type == "cuda"
        loss_and_gradient = _loss_and_gradient_on_gpu() if on_gpu else _loss_and_gradient_in_place
        elements = _GPU_CHUNK_ELEMENTS if on_gpu else _CHUNK_ELEMENTS
        positions = _supervised_positions(targets_N, num_targets)
        M = len(targets_N) if positions is None else len(positions)
        chunk = _even_chunk(M, at_most=max(_ROWS_MULTIPLE, elements // weight_VD.shape[0]))
        # needs_input_grad does not know of no_grad: evaluation would pay for gradients.
        need_hidden, need_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        empty = torch.empty_like if positions is None else torch.zeros_like
        grad_hidden = empty(hidden_ND) if need_hidden else None
        # The first chunk writes it, the others add.
        blank = torch.empty_like if M else torch.zeros_like
        grad_weight = blank(weight_VD, dtype=torch.float32) if need_weight else None
        added_rows = weight_VD.shape[0] if on_gpu else _CACHED_ROWS
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        if positions is not None:  # fewer promised than there are: not a number, instead of a part
            counted = (targets_N != IGNORE_INDEX).sum()
            loss.masked_fill_(counted > M, torch.nan)
        # Autocast would leave products into an existing tensor (addmm_) in fp32.
        dtype = compute_dtype(hidden_ND)
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        V = weight.shape[0]
        if on_gpu:  # else cuBLAS takes kernels for rows of any length, at 0.4 of the speed
            weight = F.pad(weight, (0, 0, 0, -V % _GPU_VOCAB_MULTIPLE))
        with full_precision(hidden_ND):
            for start in range(0, M, chunk):
                here: Any = slice(start, start + chunk)
                if positions is not None:
                    here = positions[here]
                h = hidden[here]
                chunk_loss, grad_logits = loss_and_gradient(
                    F.linear(h, weight), targets_N[here], need_hidden or need_weight, V
                )
                loss += chunk_loss
                if grad_logits is None:
                    continue
                if grad_hidden is not None:
                    grad_hidden[here] = (grad_logits @ weight).to(grad_hidden.dtype)
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(grad_logits[:, :V].T, h, beta=1 if start else 0)
                elif grad_weight is not None:
                    # The product is rounded to bf16 once a chunk, the sum over chunks is not.
                    for v in range(0, V, added_rows):
                        part = grad_logits[:, v : v + added_rows] if added_rows < V else grad_logits
                        rows = grad_weight[v : v + added_rows]
                        write = rows.add_ if start else rows.copy_
                        write((part.T @ h)[: V - v])
                del grad_logits  # else it lives beside the next chunk's logits
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        ctx.gradients = grad_hidden, grad_weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass only")
        for gradient in ctx.gradients:
            if gradient is not None:  # in place: the weight's is a large part of all memory
                gradient.mul_(grad_loss.to(gradient.dtype))
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    num_targets: int | None = None,
) -> torch.Tensor:
    """Summed next-token cross-entropy in nats, fp32 scalar; equals the reference, in less memory.

    hidden (N, D) and weight (V, D) in the compute dtype, targets (N,) with −100 where nothing is
    to be predicted. Differentiable once. ``num_targets``: how many of them are not −100, or a
    larger number; the others' logits are then not computed. NaN if there are more, as far as that
    left any out.
    """
    return _ChunkedLinearCrossEntropy.apply(
        hidden_ND, weight_VD, targets_N, num_targets, torch.is_grad_enabled()
    )


class LMHead(nn.Linear):
    """The output projection; given targets it returns the summed loss instead of logits.

    The loss is computed inside this module so that ZeRO-3, which gathers a module's weights around
    its forward, finds the weight that the loss needs.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        num_targets: int | None = None,
    ) -> torch.Tensor:
        """(B, T, D) -> logits (B, T, V), or with targets (B, T) -> Σ loss, fp32 scalar.

        ``num_targets`` is that of :func:`linear_cross_entropy`.
        """
        if targets is None:
            return super().forward(hidden_states)
        hidden_ND = hidden_states.flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.weight, targets.flatten(), num_targets)
