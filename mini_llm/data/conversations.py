"""Conversations: what makes one valid, and its tokens with labels on what the assistant says.

A conversation is a list of messages {"role", "content"[, "reasoning_content"]}: an optional system
message, then user and assistant in turns, an assistant last. Its tokens are those of the ChatML
template (`tokenizer.CHAT_TEMPLATE`), encoded segment by segment, and this is the definition:

- A message is the control token <|im_start|>, the text "role\\n", the text of its content,
  <|im_end|> and the text "\\n". Each text is encoded by itself, as text: a question that quotes
  <|im_start|> gets the bytes of those characters. Encoding the whole rendered text instead merges
  an answer's first white space with the header's line end, which no generating model ever sees.
- Supervised are an assistant's content and its <|im_end|>, nothing else.
- Thoughts are those of `reasoning_content`, or of a <think>…</think> block that the content starts
  with; both spellings give the same tokens. Their two marks are control tokens; further <think> or
  </think> are text. Only an answer that no user turn follows keeps its thoughts.
- Nothing follows the last "\\n": no <|endoftext|>. A chat model stops at <|im_end|>, inference
  renders exactly these tokens, and the documents of a packed row are kept apart by their lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from .collate import IGNORE_INDEX
from .tokenizer import (
    IM_END,
    IM_START,
    THINK_END,
    THINK_START,
    encode_function,
    load_tokenizer,
    tokenizer_fingerprint,
)

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# Roles of other formats, each counted under its name; any further one is `role_other`.
FOREIGN_ROLES = ("tool", "function", "function_call", "observation", "developer", "ipython")


class Message(TypedDict, total=False):
    """One turn; `role` and `content` are always there."""

    role: str
    content: str
    reasoning_content: str


Conversation = list[Message]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation: `input_ids` int32 [n], `labels` int32 [n], -100 or the id."""

    input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Segment:
    """A control token or a text that is encoded by itself."""

    text: str
    is_control: bool = False
    supervised: bool = False


def why_invalid(messages: Sequence[Any]) -> str | None:
    """Return the reason why these messages are no conversation to train on, None when they are.

    A reason is one of a few fixed words, so that they can be counted.
    """
    if not messages:
        return "no_messages"
    roles = []
    for message in messages:
        if not isinstance(message, dict):
            return "message_not_an_object"
        role = message.get("role")
        if role not in (SYSTEM, USER, ASSISTANT):
            return f"role_{role}" if role in FOREIGN_ROLES else "role_other"
        if message.get("tool_calls"):
            return "tool_calls"
        roles.append(role)
        texts: list[Any] = [message.get("content"), message.get("reasoning_content") or ""]
        if not all(isinstance(text, str) for text in texts):
            return "content_not_a_string"
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            return "invalid_unicode"
        if not texts[0].strip():
            return f"empty_{role}_turn"
        if texts[1] and role != ASSISTANT:
            return "thoughts_of_another_role"
        if texts[1] and _split_thoughts(texts[0])[0] is not None:
            return "thoughts_twice"
        if role == ASSISTANT and not (_split_thoughts(texts[0])[1]).strip():
            return "thoughts_without_answer"
    if ASSISTANT not in roles:
        return "no_assistant_turn"
    turns = roles[1:] if roles[0] == SYSTEM else roles
    if any(role != (USER, ASSISTANT)[place % 2] for place, role in enumerate(turns)):
        return "roles_out_of_order"
    return None if turns[-1] == ASSISTANT else "ends_without_answer"


def count_answers(messages: Conversation) -> int:
    """Return the number of assistant turns."""
    return sum(message["role"] == ASSISTANT for message in messages)


def without_last_exchange(messages: Conversation) -> Conversation:
    """Return a valid conversation without its last question and answer."""
    return messages[:-2]


def segments(messages: Conversation) -> Iterator[Segment]:
    """Yield the segments of a valid conversation; their texts together are the rendered template.

    Raises ValueError for one that is not valid.
    """
    if (reason := why_invalid(messages)) is not None:
        raise ValueError(f"not a conversation to train on: {reason}")
    last_user = max(i for i, message in enumerate(messages) if message["role"] == USER)
    for place, message in enumerate(messages):
        role, content = message["role"], message["content"]
        supervised = role == ASSISTANT
        yield Segment(IM_START, is_control=True)
        yield Segment(f"{role}\n")
        if supervised:
            thoughts, content = _split_thoughts(content)
            if place > last_user:
                if reasoning := message.get("reasoning_content"):
                    thoughts, content = f"\n{reasoning}\n", f"\n\n{content}"
                if thoughts is not None:
                    yield Segment(THINK_START, is_control=True, supervised=True)
                    yield Segment(thoughts, supervised=True)
                    yield Segment(THINK_END, is_control=True, supervised=True)
            elif thoughts is not None:
                content = content.removeprefix("\n\n")
        yield Segment(content, supervised=supervised)
        yield Segment(IM_END, is_control=True, supervised=supervised)
        yield Segment("\n")


def _split_thoughts(content: str) -> tuple[str | None, str]:
    """Return what stands in the <think> block that starts the content, None without, and the rest.

    The content ends its thoughts at the first </think>, as in the template.
    """
    if not content.startswith(THINK_START) or THINK_END not in content:
        return None, content
    thoughts, rest = content.removeprefix(THINK_START).split(THINK_END, 1)
    return thoughts, rest


class ChatEncoder:
    """Encodes conversations with the tokenizer of a folder.

    Raises FileNotFoundError or ValueError, naming --tokenizer, for a folder whose tokenizer lacks
    the chat tokens or whose template is not this project's.
    """

    def __init__(self, folder: str | Path) -> None:
        tokenizer = load_tokenizer(folder)
        self.vocab_size = len(tokenizer)
        self.fingerprint = tokenizer_fingerprint(folder)
        self._encode_text = encode_function(folder)
        self._control_ids = {}
        vocabulary = tokenizer.get_vocab()
        for token in (IM_START, IM_END, THINK_START, THINK_END):
            if token not in vocabulary:
                raise ValueError(
                    f"--tokenizer: {folder} has no {token} token; chat needs one that "
                    "data_tools/train_tokenizer.py made"
                )
            self._control_ids[token] = vocabulary[token]
        self.end_of_answer = self._control_ids[IM_END]
        self.start_of_message = self._control_ids[IM_START]
        self._texts: dict[str, list[int]] = {}  # of the template's own texts: headers, line ends
        for text in (f"{SYSTEM}\n", f"{USER}\n", f"{ASSISTANT}\n", "\n"):
            self._texts[text] = self._encode_text(text).tolist()
        self._check_template(tokenizer, folder)

    @property
    def dtype(self) -> np.dtype:
        """Of tokens on disk: uint16 where the vocabulary allows."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode(self, messages: Conversation) -> Encoded:
        """Return the tokens of a conversation; ValueError for one that is not valid."""
        input_ids: list[int] = []
        supervised: list[bool] = []
        for segment in segments(messages):
            if segment.is_control:
                found = [self._control_ids[segment.text]]
            elif segment.text in self._texts:
                found = self._texts[segment.text]
            else:
                found = self._encode_text(segment.text).tolist()
            input_ids += found
            supervised += [segment.supervised] * len(found)
        ids = np.array(input_ids, np.int32)
        return Encoded(ids, np.where(supervised, ids, IGNORE_INDEX).astype(np.int32))

    def _check_template(self, tokenizer: Any, folder: str | Path) -> None:
        """Raise ValueError unless the tokenizer's template gives what `segments` gives."""
        template = tokenizer.chat_template
        advice = (
            "take the chat_template.jinja of a tokenizer that data_tools/train_tokenizer.py made"
        )
        if not isinstance(template, str):
            raise ValueError(f"--tokenizer: {folder} has no chat template; {advice}")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise ValueError(
                f"--tokenizer: the chat template of {folder} has no {{% generation %}} marks, so "
                f"nothing would be supervised; {advice}"
            )
        thinking: Conversation = [
            {"role": SYSTEM, "content": "Be brief."},
            {"role": USER, "content": "One?"},
            {"role": ASSISTANT, "content": f"{THINK_START}\nold\n{THINK_END}\n\nTwo."},
            {"role": USER, "content": "Three?"},
            {"role": ASSISTANT, "content": "Four.", "reasoning_content": "new"},
        ]
        for messages in (thinking, thinking[1:3]):
            expected = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = np.array(expected["input_ids"])
            labels = np.where(np.array(expected["assistant_masks"]) == 1, ids, IGNORE_INDEX)
            ours = self.encode(messages)
            if not (np.array_equal(ours.input_ids, ids) and np.array_equal(ours.labels, labels)):
                raise ValueError(
                    f"--tokenizer: the chat template of {folder} is another one than this "
                    f"project's ChatML; {advice}"
                )
