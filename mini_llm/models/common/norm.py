"""Root-mean-square layer norms."""

import torch
import torch.nn.functional as F
from torch import nn


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
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
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
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
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
