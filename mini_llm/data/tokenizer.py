"""The tokenizer: byte-level BPE, special tokens, chat template, and what training needs to know.

Ids: `<|endoftext|>` is 0; the chat tokens follow the base vocabulary, so a 32,000-entry base gives
32000 `<|im_start|>`, 32001 `<|im_end|>`, 32002 `<think>`, 32003 `</think>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"

END_OF_TEXT_ID = 0
CHAT_TOKENS = (IM_START, IM_END, THINK_START, THINK_END)
SPECIAL_TOKENS = (END_OF_TEXT, *CHAT_TOKENS)

# The pre-tokenizer of Qwen2, which llama.cpp calls "qwen2" and vLLM runs as it is: digits one by
# one, contractions apart, a word with the space before it.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. `{% generation %}` marks what an assistant says, up to and with <|im_end|>, as supervised.
# The thoughts of an answer stay only where no user turn follows: a chat model does not re-read its
# old thoughts. `reasoning_content` is the field that inference servers use for them.
CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'user'] -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- set content = message['content'] or '' -%}
        {%- if loop.index0 < ns.last_user -%}
            {%- if content.startswith('<think>') and '</think>' in content -%}
                {%- set content = content.split('</think>')[1:] | join('</think>') -%}
                {%- if content.startswith('\\n\\n') -%}
                    {%- set content = content[2:] -%}
                {%- endif -%}
            {%- endif -%}
        {%- elif message['reasoning_content'] is defined and message['reasoning_content'] -%}
            {%- set thoughts = '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -%}
            {%- set content = thoughts + content -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}{{- content + '<|im_end|>' -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- raise_exception('a message has the role ' + message['role'] \
+ '; use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined -%}
        {{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def train_tokenizer(
    texts: Iterable[str], base_vocab_size: int, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `base_vocab_size` entries and add the four chat tokens after it.

    The same texts in the same order give the same tokenizer. Raises ValueError when the size
    cannot hold the 256 bytes, or when the texts are too few to fill it.
    """
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + 1
    if base_vocab_size < smallest:
        raise ValueError(
            f"--vocab_size {base_vocab_size} is too small: a byte-level tokenizer needs at least "
            f"{smallest} entries (256 bytes and {END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    # No normalizer: decode(encode(text)) == text for every text.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    reached = tokenizer.get_vocab_size()
    if reached < base_vocab_size:
        raise ValueError(
            f"the texts hold only {reached} distinct tokens: give more text in --input or set "
            f"--vocab_size to at most {reached}"
        )
    # As in Qwen3 and DeepSeek-R1 the think marks are not "special", so that
    # decode(skip_special_tokens=True) still shows where the thoughts end.
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (IM_START, IM_END)])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (THINK_START, THINK_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def text_encoder(folder: str | Path) -> Tokenizer:
    """Return a `tokenizers.Tokenizer` that encodes text as text, whatever the text says.

    A document that quotes `<|endoftext|>` or `<|im_start|>` gets the bytes of those characters,
    never the control token. Ids are those of `folder`/tokenizer.json.
    """
    content = _read_tokenizer_json(folder)
    content["added_tokens"] = []
    content["padding"] = None
    content["truncation"] = None
    content["post_processor"] = None
    return Tokenizer.from_str(json.dumps(content))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer folder with stock AutoTokenizer; FileNotFoundError if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _read_tokenizer_json(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--tokenizer {folder} is not a fast tokenizer (tokenizer.json)")
    return tokenizer


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Return the sha256 of what `folder`/tokenizer.json does to a text.

    Padding and truncation are left out: they are settings of the last call, which transformers
    writes back on save, and they change no id.
    """
    content = _read_tokenizer_json(folder)
    content.pop("padding", None)
    content.pop("truncation", None)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return int32 [vocabulary]: the UTF-8 bytes of text behind each id, 0 for control tokens.

    Bits per byte is the summed loss in nats / ln 2 / the summed lengths of the targets. Raises
    ValueError for a tokenizer that is not byte-level.
    """
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        raise ValueError("bits per byte needs a byte-level tokenizer: this one's decoder is not")
    lengths = np.zeros(len(tokenizer), dtype=np.int32)
    # In a byte-level vocabulary every character of an entry stands for one byte.
    for token, token_id in tokenizer.get_vocab().items():
        lengths[token_id] = len(token)
    lengths[list(tokenizer.added_tokens_decoder)] = 0
    return lengths


def _read_tokenizer_json(folder: str | Path) -> dict:
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--tokenizer: {folder} has no tokenizer.json; give a tokenizer's folder or make one "
            "with data_tools/train_tokenizer.py"
        )
    return json.loads(path.read_text(encoding="utf-8"))
