"""The language model around a decoder: head, loss, generation. Every architecture's ForCausalLM."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .base import MiniPreTrainedModel
from .loss import IGNORE_INDEX, LMHead, next_tokens


class CausalLM(MiniPreTrainedModel):
    """A decoder with a language-model head, usually tied to the input embedding.

    A class inherits from this one first, then from its architecture's PreTrainedModel and from
    GenerationMixin (transformers looks for that name), and names its decoder in ``decoder_class``.
    An architecture with losses of its own overrides ``forward`` and takes the cross-entropy and
    the logits from :meth:`loss_and_logits`.
    """

    decoder_class: type[nn.Module]
    model: Any  # the decoder, whose methods are its own
    lm_head: LMHead
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        num_target_tokens: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens (B, T) -> logits (B, T, V), and the loss if there are labels.

        ``labels`` (B, T) are aligned with the inputs (the shift happens here), −100 where nothing
        is to be predicted; ``shift_labels`` (B, T), instead, are already shifted: entry t is what
        position t predicts. The loss is Σ / ``num_items_in_batch``, by default the batch's own
        supervised tokens. ``skip_logits`` (default: while training with labels) leaves the logits
        out, so that their full matrix never exists. ``logits_to_keep`` n > 0 computes the last n
        positions', a tensor of positions computes those. ``num_target_tokens``, from who knows it
        on the host (`data.collate` does): how many targets are not −100. The others' logits are
        then left out where that saves a sixteenth or more; NaN if a target was left out.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = self.loss_and_logits(
            outputs.last_hidden_state,
            next_tokens(labels, shift_labels),
            num_items_in_batch,
            logits_to_keep,
            skip_logits,
            num_target_tokens,
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss_and_logits(
        self,
        hidden_states: torch.Tensor,
        targets_BT: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        logits_to_keep: int | torch.Tensor,
        skip_logits: bool | None,
        num_target_tokens: int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(B, T, D) and the targets (B, T) -> the loss (or None) and the logits (or None).

        ``num_items_in_batch`` (what transformers calls it) is the number of supervised tokens of
        the whole optimizer step.
        """
        loss = logits = None
        if targets_BT is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (targets_BT != IGNORE_INDEX).sum()
            loss_sum = self.lm_head(hidden_states, targets_BT, num_target_tokens)
            loss = loss_sum / num_items_in_batch
        if skip_logits is None:
            skip_logits = self.training and targets_BT is not None
        if not skip_logits:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep, :])
        return loss, logits

    def get_output_embeddings(self) -> LMHead:
        """The LM head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take over ``new_embeddings``' weight.

        ``resize_token_embeddings`` brings a plain nn.Linear, which cannot compute the loss.
        """
        head: Any = LMHead(1, 1, bias=False, device="meta")
        head.in_features, head.out_features = (
            new_embeddings.in_features,
            new_embeddings.out_features,
        )
        head.weight = new_embeddings.weight
        # What transformers has filled already, a later post_init() must not draw anew.
        head._is_hf_initialized = getattr(new_embeddings, "_is_hf_initialized", False)
        self.lm_head = head
