"""What all architectures share with PreTrainedModel, and the one thing they change."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .loss import LMHead


class MiniPreTrainedModel(PreTrainedModel):
    """A PreTrainedModel whose checkpoints are stock checkpoints.

    ``stock_architecture`` names the transformers class that opens what ``save_pretrained`` writes;
    vLLM and llama.cpp go by that name, AutoModel by ``model_type``.
    """

    stock_architecture: str
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Yes: all attention goes through ``common/attention.py``.

        transformers guesses by searching the model's own source file for its interface.
        """
        return True

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """transformers' save_pretrained, with the stock class named in config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = [self.stock_architecture]
            self.config.save_pretrained(save_directory)


class OutputEmbeddingsMixin:
    """get/set of the LM head that keeps it an :class:`LMHead`.

    ``resize_token_embeddings`` installs a plain nn.Linear, which cannot compute the loss.
    """

    lm_head: LMHead

    def get_output_embeddings(self) -> LMHead:
        """The LM head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take over ``new_embeddings``' weight."""
        head = LMHead(1, 1, bias=False, device="meta")
        head.in_features, head.out_features = (
            new_embeddings.in_features,
            new_embeddings.out_features,
        )
        head.weight = new_embeddings.weight
        self.lm_head = head
