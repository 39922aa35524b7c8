"""Root-mean-square layer norms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def rms_normalize_reference(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _RMSNormalize(torch.autograd.Function):
    """The reference above; its gradient takes half the passes over memory that autograd makes.

    With r = 1/sqrt(mean(x²) + ε) and y = r·x it is dx = r·(dy − y·mean(y·dy)).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # reads x once
        r = torch.rsqrt(squares / x.shape[-1] + eps)
        y = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, r = ctx.saved_tensors
        along_y = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along_y, value=-1).mul_(r), None


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """:func:`rms_normalize_reference`, which torch.compile turns into one kernel by itself."""
    if torch.compiler.is_compiling():
        return rms_normalize_reference(x, eps)
    return _RMSNormalize.apply(x, eps)


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + ε), over the last dimension (Zhang & Sennrich 2019, eq. 4).

    The statistics are taken in fp32 whatever the input's dtype; the output has the input's dtype.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, D)."""
        dtype = hidden_states.dtype
        x = rms_normalize(hidden_states.float(), self.variance_epsilon)
        return self.weight * x.to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ZeroCenteredRMSNorm(nn.Module):
    """y = (1 + w) · x / sqrt(mean(x²) + ε): weight decay pulls the gain to 1 instead of 0.

    Gain and statistics are applied in fp32; the output has the input's dtype. ``_init_weights`` of
    transformers sets norm weights to 1, so a model with this norm must set them to 0 itself.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, D)."""
        x = rms_normalize(hidden_states.float(), self.eps)
        return (x * (1.0 + self.weight.float())).type_as(hidden_states)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """y = RMSNorm(x) · SiLU(gate), the gate applied in fp32 (Dao & Gu 2024, Mamba-2)."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """Two of (…, D) -> (…, D)."""
        normed = super().forward(hidden_states)
        return (normed * F.silu(gate.float())).to(hidden_states.dtype)
