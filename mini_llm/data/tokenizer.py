"""The tokenizer: byte-level BPE, special tokens, chat template, and what training needs to know.

Ids: `<|endoftext|>` is 0; the chat tokens follow the base vocabulary, so a 32,000-entry base gives
32000 `<|im_start|>`, 32001 `<|im_end|>`, 32002 `<think>`, 32003 `</think>`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    import tiktoken
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"

# The tokenizer that comes with the project; its README says what it was trained on.
DEFAULT_TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizer"

END_OF_TEXT_ID = 0
CHAT_TOKENS = (IM_START, IM_END, THINK_START, THINK_END)
SPECIAL_TOKENS = (END_OF_TEXT, *CHAT_TOKENS)

# The pre-tokenizer of Qwen2, which llama.cpp calls "qwen2" and vLLM runs as it is: digits one by
# one, contractions apart, a word with the space before it.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# White-space characters in a row that tiktoken takes with room to spare: it fails near a million.
LONGEST_SPACE_RUN = 100_000

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

    check_vocab_size(base_vocab_size)
    tokenizer = Tokenizer(models.BPE())
    # No normalizer: decode(encode(text)) == text for every text.
    tokenizer.pre_tokenizer = _pre_tokenizer()
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


def check_vocab_size(base_vocab_size: int) -> None:
    """Raise ValueError for a base vocabulary that cannot hold the 256 bytes and the end token."""
    smallest = 256 + 1
    if base_vocab_size < smallest:
        raise ValueError(
            f"--vocab_size {base_vocab_size} is too small: a byte-level tokenizer needs at least "
            f"{smallest} entries (256 bytes and {END_OF_TEXT})"
        )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def text_encoder(folder: str | Path) -> Tokenizer:
    """Return a `tokenizers.Tokenizer` that encodes text as text, whatever the text says.

    A document that quotes `<|endoftext|>` or `<|im_start|>` gets the bytes of those characters,
    never the control token. Ids are those of `folder`/tokenizer.json.
    """
    content = read_tokenizer_json(folder)
    content["added_tokens"] = []
    content["padding"] = None
    content["truncation"] = None
    content["post_processor"] = None
    return Tokenizer.from_str(json.dumps(content))


class FastEncoder:
    """Encodes text as `text_encoder` does, id for id, several times faster, through tiktoken.

    tiktoken's regular expressions give up (with a panic) on about a million white-space characters
    in a row, so a text with a run above LONGEST_SPACE_RUN is encoded by `text_encoder` instead: the
    ids are the same, only slower, and `slow_texts` counts these texts.
    """

    def __init__(self, encoding: tiktoken.Encoding, exact: Tokenizer) -> None:
        self._encoding = encoding
        self._exact = exact
        self.slow_texts = 0

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint32 [tokens]; text that quotes a control token is text.

        Raises UnicodeEncodeError for half of a surrogate pair, which is no text.
        """
        # Else tiktoken would put U+FFFD in its place; Python checks ASCII texts at no cost.
        text.encode()
        if len(text) > LONGEST_SPACE_RUN and _longest_space_run(text) > LONGEST_SPACE_RUN:
            self.slow_texts += 1
            return np.array(self._exact.encode(text, add_special_tokens=False).ids, np.uint32)
        return np.array(self._encoding.encode_ordinary(text), np.uint32)


def _longest_space_run(text: str) -> int:
    return max((len(run[0]) for run in re.finditer(r"\s+", text)), default=0)


def fast_encoder(folder: str | Path) -> FastEncoder:
    """Return a `FastEncoder` whose ids are those of `text_encoder(folder)`.

    Raises ValueError for a tokenizer that is no byte-level BPE of the kind `train_tokenizer` makes,
    or whose merges tiktoken would apply in another order.
    """
    import tiktoken

    content = read_tokenizer_json(folder)
    if reason := _why_not_fast(content):
        raise ValueError(
            f"--tokenizer: {folder} cannot be run by tiktoken ({reason}); encode with text_encoder"
        )
    byte_of = _byte_of_character()
    added = {token["content"] for token in content["added_tokens"]}
    encoding = tiktoken.Encoding(
        name=str(folder),
        pat_str=PRETOKENIZER_PATTERN,
        mergeable_ranks={
            bytes(byte_of[character] for character in token): token_id
            for token, token_id in content["model"]["vocab"].items()
            if token not in added
        },
        special_tokens={},
    )
    return FastEncoder(encoding, text_encoder(folder))


def encode_function(folder: str | Path) -> Callable[[str], np.ndarray]:
    """Return the fastest function from a text to its ids, uint32 [tokens], those of `text_encoder`.

    A tokenizer that tiktoken cannot run is run by `tokenizers`, and a warning says so.
    """
    try:
        return fast_encoder(folder).encode
    except ValueError as error:
        logger.warning("%s is used instead: the same ids, several times slower", error)
    exact = text_encoder(folder)
    return lambda text: np.array(exact.encode(text, add_special_tokens=False).ids, np.uint32)


def _why_not_fast(content: dict[str, Any]) -> str | None:
    """Return why tiktoken would give other ids than this tokenizer.json, None when it would not.

    tokenizers merges the neighbours that its list of merges names, the earliest merge first;
    tiktoken merges any neighbours that together are a token, the lowest id first. The two agree
    where the k-th merge makes the k-th token after the bytes, and every token, encoded alone, gives
    itself: if neighbours x and y together are a token t, then encoding t alone reaches x and y too
    (nothing outside t took part), and as it ends in t, (x, y) is the merge that makes t.
    """
    if reason := why_another_kind(content):
        return reason
    model = content["model"]
    vocab, added = model["vocab"], {token["content"] for token in content["added_tokens"]}
    alphabet = set(_byte_of_character())
    made = [vocab.get("".join(pair)) for pair in model["merges"]]
    if (
        not alphabet <= vocab.keys()
        or sorted(token_id for token, token_id in vocab.items() if token not in alphabet | added)
        != made
    ):
        return "its merges are not in the order of the ids they make"
    if max(vocab[character] for character in alphabet) > min(made, default=len(vocab)):
        return "its bytes do not come before its merges"
    alone = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in model["merges"]]))
    for token, token_id in vocab.items():
        if token not in added and alone.encode(token).ids != [token_id]:
            return f"token {token_id} does not encode to itself"
    return None


def why_another_kind(content: dict[str, Any]) -> str | None:
    """Return why a tokenizer.json is none of the kind that `train_tokenizer` makes, else None.

    Vocabulary, merges and added tokens are each tokenizer's own.
    """
    if content["normalizer"] is not None:
        return "it has a normalizer"
    if content["pre_tokenizer"] != json.loads(_pre_tokenizer().__getstate__()):
        return "its pre-tokenizer is another"
    model = content["model"]
    plain = json.loads(models.BPE().__getstate__())
    options = sorted(
        key for key in plain if key not in ("vocab", "merges") and model.get(key) != plain[key]
    )
    if options:
        return f"its model sets {', '.join(options)}"
    return None


def _byte_of_character() -> dict[str, int]:
    """Return the byte behind each of the 256 characters that a byte-level vocabulary is written in.

    GPT-2's table: printable Latin-1 stands for itself, the other bytes follow from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer folder with stock AutoTokenizer.

    Raises FileNotFoundError if there is none, ValueError for one that cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read_tokenizer_json(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers has no type of its own for a file it cannot read
        raise _unreadable(folder, f"{type(error).__name__}: {' '.join(str(error).split())}") from (
            error
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--tokenizer {folder} is not a fast tokenizer (tokenizer.json)")
    return tokenizer


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Return the sha256 of what `folder`/tokenizer.json does to a text.

    Padding and truncation are left out: they are settings of the last call, which transformers
    writes back on save, and they change no id.
    """
    content = read_tokenizer_json(folder)
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


def read_tokenizer_json(folder: str | Path) -> dict[str, Any]:
    """Return what `folder`/tokenizer.json holds.

    Raises FileNotFoundError if there is none, ValueError for a file of something else.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--tokenizer: {folder} has no tokenizer.json; give a tokenizer's folder or make one "
            "with data_tools/train_tokenizer.py"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # cut off, or the pointer that git leaves without git-lfs
        raise _unreadable(folder, f"tokenizer.json is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise _unreadable(folder, "tokenizer.json is no JSON object")
    return content


def _unreadable(folder: str | Path, why: str) -> ValueError:
    return ValueError(f"--tokenizer: {folder} cannot be opened ({why}); get it or make it again")
