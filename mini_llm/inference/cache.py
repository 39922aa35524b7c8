"""The key/value cache: memory for the whole answer at once, written in place.

What a layer keeps of a token is the layer's own choice: keys and values (llama3), the compressed
latent and the rotary key (deepseekv3), nothing but a state of fixed size (most layers of
qwen3_next, in transformers' own class).
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """As transformers' DynamicLayer, which copies all it has with every token.

    ``keys`` and ``values`` are (B, heads, capacity, d), of which the first ``length`` positions are
    filled; attention sees a view of those.
    """

    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, heads, T, d) and return all there is."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (
                x.new_empty(*x.shape[:2], self.capacity, x.shape[3])
                for x in (key_states, value_states)
            )
            self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Positions that are filled."""
        return self.length


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """An empty cache for ``capacity`` positions a row, each layer of the kind that it needs."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache
