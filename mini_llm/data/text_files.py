"""The text formats of the real sources: FineWeb-Edu-Chinese parquet and DeepCtrl jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_COLUMNS = ("text", "score", "source")
JSONL_FIELDS = ("instruction", "input", "output", "history")
READ_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """A text and the name of the source it comes from."""

    text: str
    source: str


@dataclass(frozen=True)
class Rejected:
    """A row or line that is no document, and why: one of a few fixed reasons."""

    reason: str


def find_text_files(paths: Sequence[Path]) -> list[Path]:
    """Return the .parquet and .jsonl files among and below `paths`, checked for their columns.

    The order is that of `paths`, by name inside a folder. Raises FileNotFoundError for a path that
    does not exist or holds no such file, ValueError for a file with other columns.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--input: {path} does not exist")
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found = [file for file in found if file.suffix in {".parquet", ".jsonl"}]
        if not found:
            raise FileNotFoundError(f"--input: {path} has no .parquet or .jsonl file")
        files += found
    for file in files:
        _check_columns(file)
    return files


def read_documents(file: Path) -> Iterator[Document | Rejected]:
    """Yield every row (parquet) or line (jsonl) of a file as a document or as its rejection."""
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_lines(file)
    for text, source in rows:
        yield _checked(text, source)


def conversation_text(record: dict[str, Any]) -> str:
    """Render a DeepCtrl record as plain text: the turns before, instruction, input, output.

    Turns that are empty leave nothing behind. Raises KeyError or TypeError for another shape.
    """
    turns = [turn for exchange in record["history"] or [] for turn in exchange]
    turns += [record["instruction"], record["input"], record["output"]]
    return "\n".join(turn for turn in turns if turn and turn.strip())


def _checked(text: object, source: object) -> Document | Rejected:
    if isinstance(text, Rejected):
        return text
    if not isinstance(text, str) or not isinstance(source, str):
        return Rejected("not_a_string")
    if not text.strip():
        return Rejected("empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return Rejected("invalid_unicode")
    return Document(text, source)


def _parquet_rows(file: Path) -> Iterator[tuple[object, object]]:
    with pq.ParquetFile(file) as parquet:
        batches = parquet.iter_batches(READ_BATCH_ROWS, columns=["text", "source"])
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"--input: {file} is damaged ({error}); get it again or leave it out"
                ) from error
            if batch is None:
                return
            yield from zip(batch["text"].to_pylist(), batch["source"].to_pylist(), strict=True)


def _jsonl_lines(file: Path) -> Iterator[tuple[object, object]]:
    # Line by line in bytes, so that one broken line costs one line.
    with file.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line.decode("utf-8"))
                yield conversation_text(record), record.get("data_source") or file.stem
            except UnicodeDecodeError:
                yield Rejected("not_utf8"), ""
            except json.JSONDecodeError:
                yield Rejected("empty" if not line.strip() else "invalid_json"), ""
            except (KeyError, TypeError, AttributeError):
                yield Rejected("wrong_fields"), ""


def _check_columns(file: Path) -> None:
    if file.suffix == ".jsonl":
        _check_jsonl_fields(file)
        return
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"--input: {file} is not a readable parquet file ({error})") from error
    missing = [column for column in PARQUET_COLUMNS if column not in schema.names]
    if missing:
        raise ValueError(
            f"--input: {file} lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(schema.names)}, and text, score, source are needed"
        )
    for column in ("text", "source"):
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"--input: column {column} of {file} is {kind}, not string")
    kind = schema.field("score").type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"--input: column score of {file} is {kind}, not a number")


def _check_jsonl_fields(file: Path) -> None:
    """Check the first line that is a JSON object; single bad lines are counted, not fatal."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                missing = [name for name in JSONL_FIELDS if name not in record]
                if missing:
                    raise ValueError(f"--input: {file} lacks the fields {', '.join(missing)}")
                return
    raise ValueError(f"--input: {file} has no line that is a JSON object")
