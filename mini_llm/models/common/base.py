"""What all architectures share with PreTrainedModel, and the one thing they change."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class MiniPreTrainedModel(PreTrainedModel):
    """A PreTrainedModel whose checkpoints are stock checkpoints.

    ``stock_architecture`` names the transformers class that opens what ``save_pretrained`` writes;
    vLLM and llama.cpp go by that name, AutoModel by ``model_type``.
    """

    stock_architecture: str
    embed_tokens: nn.Embedding  # of the decoder
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Yes: all attention goes through ``common/attention.py``.

        transformers guesses by searching the model's own source file for its interface.
        """
        return True

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Tokens (B, T), or in their place embeddings (B, T, D), -> embeddings (B, T, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """transformers' save_pretrained, with the stock class named in config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = [self.stock_architecture]
            self.config.save_pretrained(save_directory)
