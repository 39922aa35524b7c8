"""The gated feed-forward block."""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class SwiGLU(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6).

    ``intermediate_size`` F is the config's own by default.
    """

    def __init__(self, config: PreTrainedConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        D, F = config.hidden_size, intermediate_size or config.intermediate_size
        bias = getattr(config, "mlp_bias", False)  # a field of LlamaConfig; most others have none
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
