"""Where a model ends its text, and so whether it is a chat model."""

from typing import Any


def end_tokens(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """The tokens at which a text ends: the generation config's, else the tokenizer's."""
    ends = None if generation_config is None else generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def is_chat_model(tokenizer: Any, generation_config: Any) -> bool:
    """Whether the model ends its text where its chat template ends an answer.

    A base model may come with the tokenizer, and so the template, of a chat model: what it ends at
    tells them apart.
    """
    if not tokenizer.chat_template:
        return False
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in tokenizer.added_tokens_decoder]
    return bool(special) and special[-1] in end_tokens(tokenizer, generation_config)
