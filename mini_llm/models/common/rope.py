"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), half-split layout as in Llama."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import Cache, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


def _default_frequencies(
    config: PreTrainedConfig, device: Any = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """θ_i = base^(−2i/r), i = 0 … r/2−1, and the attention factor 1.

    r is the head size d, or the part of it that ``partial_rotary_factor`` says.
    """
    rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / rotary_dim
    return config.rope_parameters["rope_theta"] ** -exponent, 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles, for any scaling that the stock config can express.

    Scaled variants (``llama3``, ``yarn``, ``dynamic``, …) take their frequencies from transformers'
    own table, so they cannot drift from what a stock model computes.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings  # read by dynamic_rope_update
        self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self) -> Callable[..., tuple[torch.Tensor, float]]:
        """config -> (frequencies (d/2,), factor on cos and sin)."""
        if self.rope_type == "default":
            return _default_frequencies
        return ROPE_INIT_FUNCTIONS[self.rope_type]

    # transformers re-initialises non-persistent buffers through this name after a meta-device load.
    compute_default_rope_parameters = staticmethod(_default_frequencies)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Follow device moves, never dtype casts: bf16 frequencies move cos by 0.17 at 511."""
        frequencies = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, fp32 in frequencies.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != fp32.dtype:
                self._buffers[name] = fp32.to(moved.device)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B, T) -> cos, sin (B, T, d) in x's dtype (``x`` gives dtype and device)."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x ⊙ cos + (−x2, x1) ⊙ sin: pairs' coordinates are the halves of the last dimension.

    ``cos`` and ``sin`` broadcast to x, and have equal halves.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class _Rotate(torch.autograd.Function):
    """The reference above in half the passes over memory; its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    half = x.shape[-1] // 2
    sin = sin[..., :half]
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return turned


def apply_rotary_pos_emb(
    query_BHTd: torch.Tensor, key_BKTd: torch.Tensor, cos_BTr: torch.Tensor, sin_BTr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first r ≤ d coordinates of queries and keys by their positions' angles."""
    cos, sin = cos_BTr.unsqueeze(1), sin_BTr.unsqueeze(1)
    # torch.compile makes one kernel of the reference by itself.
    rotate = rotate_reference if torch.compiler.is_compiling() else _Rotate.apply

    def rotate_first(x: torch.Tensor) -> torch.Tensor:
        rotary_dim = cos.shape[-1]
        if rotary_dim == x.shape[-1]:
            return rotate(x, cos, sin)
        return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1)

    return rotate_first(query_BHTd), rotate_first(key_BKTd)


def positions_after(inputs_embeds: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
    """(1, T) positions of tokens (B, T, D) that follow what the cache has seen, 0 … T−1 without."""
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
    return positions.unsqueeze(0)
