"""Text files as held-out rows, tokenised with any checkpoint's own fast tokenizer.

A row is one document, or a piece of one that is longer than a row, and knows how many bytes of the
text each of its tokens stands for: from the tokenizer's offsets, so that the bytes of all tokens
are those of the text, whatever the tokenizer does to it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mini_llm.command_line import UsageError
from mini_llm.data.packed_stream import Row
from mini_llm.data.stream import HeldOut

FIELD = "text"


@dataclass(frozen=True)
class Texts:
    """The rows of --text by file name, and what was left out of each file, by reason."""

    held_out: dict[str, HeldOut]
    rejected: dict[str, Counter[str]]


def read_texts(
    files: Sequence[Path], tokenizer: Any, *, seq_len: int, max_rows: int | None
) -> Texts:
    """The first ``max_rows`` rows of every file (None: all).

    Raises UsageError, naming the file, for one that holds no text.
    """
    held_out, rejected = {}, {}
    for file in files:
        counts: Counter[str] = Counter()
        rows: list[Row] = []
        for text in _documents(file, counts):
            rows += rows_of(text, tokenizer, seq_len=seq_len, source=file.name)
            if max_rows is not None and len(rows) >= max_rows:
                del rows[max_rows:]
                break
        if not rows:
            left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            raise UsageError(
                f"--text {file} holds no document to evaluate on"
                + (f" (left out: {left_out})" if left_out else "")
            )
        held_out[file.name] = HeldOut(len(rows), rows)
        rejected[file.name] = counts
    return Texts(held_out, rejected)


def rows_of(text: str, tokenizer: Any, *, seq_len: int, source: str) -> list[Row]:
    """A document's tokens with its end token, as rows of at most ``seq_len``, unpadded.

    A text that quotes a control token is text. Where the tokenizer begins texts with a token of
    its own (BOS), the document begins with it, and its first piece of text is predicted too.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,  # of a text longer than the model takes, which is cut below
    )
    ids = list(encoded["input_ids"])
    # Bytes up to the end of each token's text; a character cut into tokens counts at the first.
    ends = np.maximum.accumulate([end for _, end in encoded["offset_mapping"]] or [0])
    ends[-1] = len(text)  # what a tokenizer drops at the end was text too
    sizes = np.fromiter((len(character.encode()) for character in text), np.int64, len(text))
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])[ends]
    num_bytes = np.diff(bytes_before, prepend=0).tolist() if ids else []

    begins = tokenizer("1")["input_ids"][:1]
    if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id]:
        ids, num_bytes = [tokenizer.bos_token_id, *ids], [0, *num_bytes]
    if tokenizer.eos_token_id is not None:
        ids, num_bytes = [*ids, tokenizer.eos_token_id], [*num_bytes, 0]

    rows = []
    for start in range(0, len(ids), seq_len):
        piece = np.array(ids[start : start + seq_len], np.uint32)
        if len(piece) > 1:  # nothing is predicted in a piece of one token
            rows.append(
                Row(
                    input_ids=piece,
                    doc_lens=np.array([len(piece)], np.int32),
                    source=source,
                    token_bytes=np.array(num_bytes[start : start + seq_len], np.int32),
                )
            )
    return rows


def _documents(file: Path, rejected: Counter[str]) -> Iterator[str]:
    """The texts of a file that are not empty."""
    read = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}[file.suffix]
    for text in read(file, rejected):
        if not isinstance(text, str):
            rejected[f"without a {FIELD}"] += 1
        elif not text.strip():
            rejected["empty"] += 1
        else:
            yield text


def _txt(file: Path, rejected: Counter[str]) -> Iterator[Any]:
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {file} is not UTF-8 ({error.reason})") from None


def _jsonl(file: Path, rejected: Counter[str]) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line.decode("utf-8"))
                text = record.get(FIELD) if isinstance(record, dict) else None
                if isinstance(text, str):
                    text.encode()  # half of a surrogate pair is no text
            except (ValueError, RecursionError):
                rejected["not JSON in UTF-8"] += 1
                continue
            yield text


def _parquet(file: Path, rejected: Counter[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            if FIELD not in parquet.schema_arrow.names:
                raise UsageError(f"--text {file} has no column {FIELD}")
            for batch in parquet.iter_batches(256, columns=[FIELD]):
                yield from batch[FIELD].to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--text {file} is no readable parquet file ({reason})") from None
