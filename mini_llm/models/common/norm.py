"""Root-mean-square layer norm."""

import torch
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
