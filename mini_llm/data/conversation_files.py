"""Files of conversations: DeepCtrl records, `messages`, and `conversations` in ShareGPT's words.

Jsonl, or parquet with columns of these names. A line or row that is no conversation is `Rejected`
with a reason and its place. What is mended on the way (an empty turn of the history, keys of an
older format) is counted under a name.
"""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .conversations import ASSISTANT, SYSTEM, USER, Conversation, Message, why_invalid
from .text_files import (
    MAX_LINE_BYTES,
    QUARANTINED_CHARACTERS,
    READ_BUFFER_BYTES,
    BadFileError,
    ParquetReader,
    Piece,
    Rejected,
    parquet_pieces,
    text_pieces,
)

SUFFIXES = (".jsonl",)
UNTYPED = "untyped"
# Question and answer of a record, then of an exchange of its history, under the names in use.
QUESTION_KEYS = ("q", "question", "query", "prompt", "user", "human")
ANSWER_KEYS = ("a", "answer", "response", "assistant", "gpt", "bot")
MESSAGE_COLUMNS = ("messages", "conversations")
# All that `from_record` looks at.
RECORD_COLUMNS = (
    *MESSAGE_COLUMNS,
    *("system", "system_prompt", "tools", "functions", "type"),
    *("instruction", "input", "output", "history"),
    *QUESTION_KEYS,
    *ANSWER_KEYS,
)
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
            if not line:  # cut off while it is read, which the caller says
                return
            if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                _skip_line(lines)
                yield place, _rejected("too_long_line", place, line)
            else:
                yield place, parse_line(line, place)


def check_conversation_file(file: Path) -> None:
    """Raise BadFileError for a file of something else, by its columns or its first record."""
    if not file.stat().st_size:
        raise BadFileError(str(file), f"{file} is empty (0 bytes)")
    if file.suffix == ".jsonl":
        record = _first_record(file)
        if not _may_be_conversation(list(record)):
            raise _no_conversations(file, "fields", list(record))
        return
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(
            str(file),
            f"{file} is not a readable parquet file, cut off perhaps "
            f"({' '.join(str(error).split())})",
        ) from error
    if "token_ids" in schema.names:
        raise BadFileError(
            str(file),
            f"{file} holds ready-made tokens, which are a source of their own and read from local "
            "files",
        )
    if not _may_be_conversation(schema.names):
        raise _no_conversations(file, "columns", schema.names)
    for name in set(MESSAGE_COLUMNS) & set(schema.names):
        kind = schema.field(name).type
        if not (_is_list(kind) and pa.types.is_struct(kind.value_type)):
            raise BadFileError(str(file), f"column {name} of {file} is {kind}, not a list of turns")


def conversation_pieces(file: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
    """Cut a file into equal pieces of about at most so many conversations and bytes."""
    if file.suffix == ".jsonl":
        return text_pieces(file, max_documents=max_documents, max_bytes=max_bytes)
    return parquet_pieces(file, RECORD_COLUMNS, max_documents=max_documents, max_bytes=max_bytes)


def read_conversations(
    piece: Piece, parquet: ParquetReader | None = None
) -> Iterator[Found | Rejected]:
    """Yield every line or row of a piece as a conversation or as its rejection.

    `parquet` is for who reads several pieces, one after the other.
    """
    if piece.file.suffix == ".jsonl":
        for _, line in read_lines(piece.file, piece.start, piece.stop):
            yield line
        return
    row = piece.start
    try:
        columns = [name for name in pq.read_schema(piece.file).names if name in RECORD_COLUMNS]
        for batch in (parquet or ParquetReader()).batches(piece, columns):
            for record in _records(batch):
                yield _from_row(record, f"row {row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(
            str(piece.file), f"{piece.file} is damaged ({' '.join(str(error).split())})"
        ) from error


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a batch, None for one that is not UTF-8, which Arrow does not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row: the batch is converted as a whole
        for row in range(batch.num_rows):
            try:
                (record,) = batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                record = None
            yield record


def _from_row(record: dict[str, Any] | None, place: str) -> Found | Rejected:
    if record is None:
        return Rejected("not_utf8", place)
    # A column has a value in every row: what jsonl would leave out is null.
    record = {name: value for name, value in record.items() if value is not None}
    for name in MESSAGE_COLUMNS:
        if name in record:
            record[name] = [
                turn and {key: value for key, value in turn.items() if value is not None}
                for turn in record[name]
            ]
    found = from_record(record)
    if isinstance(found, str):
        return Rejected(found, place, repr(record)[:QUARANTINED_CHARACTERS])
    return found


def _first_record(file: Path) -> dict[str, Any]:
    """Return the first line that is a JSON object; single bad lines are counted, not fatal."""
    with file.open("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                return record
    raise BadFileError(str(file), f"{file} has no line that is a JSON object")


def _may_be_conversation(names: list[str]) -> bool:
    pair = any(key in names for key in QUESTION_KEYS) and any(key in names for key in ANSWER_KEYS)
    return pair or any(name in names for name in (*MESSAGE_COLUMNS, "output"))


def _no_conversations(file: Path, what: str, names: list[str]) -> BadFileError:
    return BadFileError(
        str(file),
        f"{file} holds no conversations: it has the {what} {', '.join(names)}; needed are "
        "messages, conversations, or instruction, input and output",
    )


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def parse_line(line: bytes, place: int = 0) -> Found | Rejected:
    """Return the conversation of one line of jsonl."""
    try:
        record = json.loads(line.removeprefix(BOM_UTF8).decode("utf-8"))
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
    if record.get("tools") or record.get("functions"):
        return "tools"
    # Where kinds of records are written together, the fields of the others are null.
    turns = [record[name] for name in MESSAGE_COLUMNS if record.get(name) is not None]
    if turns:
        messages = _from_messages(turns[0], record, mended)
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


def _from_messages(turns: object, record: dict[str, Any], mended: list[str]) -> list[Any] | str:
    if not isinstance(turns, list):
        return "wrong_fields"
    if not turns:
        return "no_messages"
    messages: list[Any] = []
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
        if turn.get("weight") == 0:  # OpenAI's mark of an answer that is not to be trained on
            return "answer_of_weight_0"
        if role == SYSTEM and (content is None or content == ""):
            mended.append("empty_system_turn")
        else:
            messages.append(message)
    system = _system_turn(record)
    return messages if messages[:1] == system else [*system, *messages]  # said twice counts once


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
    messages: list[Any] = _system_turn(record)
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


def _system_turn(record: dict[str, Any]) -> list[Any]:
    """Return the system message that stands beside the turns, an empty list where none does."""
    system = record.get("system") or record.get("system_prompt")
    return [{"role": SYSTEM, "content": system}] if system else []


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
