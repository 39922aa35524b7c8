"""Jsonl of conversations: DeepCtrl records, `messages`, and `conversations` in ShareGPT's words.

A line that is no conversation is `Rejected` with a reason and its place. What is mended on the way
(an empty turn of the history, keys of an older format) is counted under a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .conversations import ASSISTANT, SYSTEM, USER, Conversation, Message, why_invalid
from .text_files import MAX_LINE_BYTES, QUARANTINED_CHARACTERS, READ_BUFFER_BYTES, Rejected

SUFFIXES = (".jsonl",)
UNTYPED = "untyped"
# Question and answer of a record, then of an exchange of its history, under the names in use.
QUESTION_KEYS = ("q", "question", "query", "prompt", "user", "human")
ANSWER_KEYS = ("a", "answer", "response", "assistant", "gpt", "bot")
SHAREGPT_ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}


@dataclass(frozen=True)
class Found:
    """A conversation, its `type` for stratified sampling, and what was mended in it."""

    messages: Conversation
    kind: str
    mended: tuple[str, ...]


def digest(messages: Conversation) -> bytes:
    """Return the sha256 of a conversation, the same for equal ones."""
    canonical = json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).digest()


def pieces_of(file: Path, max_bytes: int) -> list[tuple[int, int]]:
    """Cut a file into equal ranges of at most `max_bytes`; a line belongs where it starts."""
    size = file.stat().st_size
    bounds = np.linspace(0, size, -(-size // max_bytes) + 1).astype(np.int64).tolist()
    return list(pairwise(bounds))


def read_lines(file: Path, start: int, stop: int) -> Iterator[tuple[int, Found | Rejected]]:
    """Yield (first byte, conversation or rejection) of every line that starts in start..stop.

    Bytes, line by line, so that one broken line costs one line.
    """
    with file.open("rb") as lines:
        if start:  # the line that began before belongs to the range before
            lines.seek(start - 1)
            _skip_line(lines)
        while (place := lines.tell()) < stop:
            line = lines.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                _skip_line(lines)
                yield place, _rejected("too_long_line", place, line)
            else:
                yield place, parse_line(line, place)


def parse_line(line: bytes, place: int = 0) -> Found | Rejected:
    """Return the conversation of one line of jsonl."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _rejected("not_utf8", place, line)
    except (ValueError, RecursionError):  # also a number of thousands of digits
        if not line.strip():
            reason = "empty_line"
        else:  # the last line of a file whose download or copy stopped has no end
            reason = "invalid_json" if line.endswith(b"\n") else "truncated_line"
        return _rejected(reason, place, line)
    if not isinstance(record, dict):
        return _rejected("not_an_object", place, line)
    found = from_record(record)
    return _rejected(found, place, line) if isinstance(found, str) else found


def from_record(record: dict[str, Any]) -> Found | str:
    """Return the conversation of a record, or the reason why it holds none."""
    mended: list[str] = []
    messages: list[Any] | str
    if "messages" in record or "conversations" in record:
        messages = _from_messages(record, mended)
    else:
        messages = _from_instruction(record, mended)
    if isinstance(messages, str):
        return messages
    if (reason := why_invalid(messages)) is not None:
        return reason
    kind = record.get("type")
    kind = UNTYPED if kind is None or kind == "" else str(kind)
    try:
        kind.encode()
    except UnicodeEncodeError:
        return "invalid_unicode"
    return Found(messages, kind, tuple(mended))


def _from_messages(record: dict[str, Any], mended: list[str]) -> list[Any] | str:
    turns = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(turns, list):
        return "wrong_fields"
    if not turns:
        return "no_messages"
    messages: list[Any] = []
    if record.get("tools") or record.get("functions"):
        return "tools"
    if system := record.get("system"):
        messages.append({"role": SYSTEM, "content": system})
    for turn in turns:
        if not isinstance(turn, dict):
            return "message_not_an_object"
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            return "wrong_fields"
        message: dict[str, Any] = {"role": SHAREGPT_ROLES.get(role, role), "content": content}
        if thoughts := turn.get("reasoning_content"):
            message["reasoning_content"] = thoughts
        if turn.get("tool_calls"):
            return "tool_calls"
        if role == SYSTEM and (content is None or content == ""):
            mended.append("empty_system_turn")
        else:
            messages.append(message)
    return messages


def _from_instruction(record: dict[str, Any], mended: list[str]) -> list[Any] | str:
    """DeepCtrl: the history's exchanges, then instruction and input, answered by the output."""
    if "output" in record:
        instruction, given = record.get("instruction") or "", record.get("input") or ""
        answer = record["output"]
        if not isinstance(instruction, str) or not isinstance(given, str):
            return "content_not_a_string"
        if not given.strip():
            mended.append("empty_input")
        if not instruction.strip():
            mended.append("empty_instruction")
        question: Any = "\n".join(text for text in (instruction, given) if text.strip())
    else:
        pair = _pair_by_keys(record)
        if pair is None:
            return "wrong_fields"
        mended.append("question_answer_keys")
        question, answer = pair
    messages: list[Any] = []
    system = record.get("system") or record.get("system_prompt")
    if system:
        messages.append({"role": SYSTEM, "content": system})
    history = record.get("history") or []
    if not isinstance(history, list):
        return "wrong_fields"
    for exchange in history:
        if isinstance(exchange, dict):
            pair = _pair_by_keys(exchange)
            if pair is None:
                return "wrong_fields"
            past = list(pair)
            mended.append("history_question_answer_keys")
        elif isinstance(exchange, list) and len(exchange) == 2:
            past = exchange
        else:
            return "wrong_fields"
        past = ["" if text is None else text for text in past]
        if not all(isinstance(text, str) for text in past):
            return "content_not_a_string"
        empty = [not text.strip() for text in past]
        if any(empty):  # a question without answer teaches nothing, an answer without one misleads
            mended.append("empty_history_exchange" if all(empty) else "half_empty_history_exchange")
            continue
        messages += _exchange(*past)
    messages += _exchange("" if question is None else question, "" if answer is None else answer)
    return messages


def _exchange(question: Any, answer: Any) -> list[Message]:
    return [{"role": USER, "content": question}, {"role": ASSISTANT, "content": answer}]


def _pair_by_keys(record: dict[str, Any]) -> tuple[Any, Any] | None:
    question = [key for key in QUESTION_KEYS if key in record]
    answer = [key for key in ANSWER_KEYS if key in record]
    return (record[question[0]], record[answer[0]]) if question and answer else None


def _rejected(reason: str, place: int, line: bytes) -> Rejected:
    shown = line[:QUARANTINED_CHARACTERS].decode(errors="backslashreplace")
    return Rejected(reason, f"byte {place}", shown)


def _skip_line(lines: Any) -> None:
    while (part := lines.readline(READ_BUFFER_BYTES)) and not part.endswith(b"\n"):
        pass
