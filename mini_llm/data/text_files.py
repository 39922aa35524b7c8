"""The text formats of the real sources: FineWeb-Edu-Chinese parquet and DeepCtrl jsonl.

A text is kept exactly as it is. What is no text (empty, not a string, not UTF-8, not JSON, other
fields) is `Rejected` with a reason and its place, never dropped; what is no file of these formats
raises `BadFileError`.
"""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_COLUMNS = ("text", "score", "source")
JSONL_FIELDS = ("instruction", "input", "output", "history")
TEXT_SUFFIXES = (".parquet", ".jsonl")
READ_BATCH_ROWS = 256
READ_BUFFER_BYTES = 1 << 20
# A file without line ends is not jsonl, and must not be read into memory as one line.
MAX_LINE_BYTES = 64 << 20
QUARANTINED_CHARACTERS = 1000

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


class BadFileError(ValueError):
    """An input file that cannot be used at all: its path and a sentence on what is wrong."""

    def __init__(self, file: str, fault: str) -> None:
        super().__init__(file, fault)
        self.file = file
        self.fault = fault

    def __str__(self) -> str:
        return f"--input: {self.fault}; get it again or leave it out"


@dataclass(frozen=True)
class Document:
    """A text, its source and place, and its tokens where the file holds them instead."""

    text: str
    source: str
    place: str = ""
    token_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Rejected:
    """A row or line that is no document: one of a few fixed reasons, its place, its beginning."""

    reason: str
    place: str = ""
    content: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of a file small enough for memory: rows of parquet, bytes of jsonl or tokens.

    A line or document belongs to the piece in which it starts. `documents` is 0 where the file
    must be read to know; `num_bytes` of text is what its metadata says.
    """

    file: Path
    start: int
    stop: int
    documents: int
    num_bytes: int


def find_text_files(paths: Sequence[Path]) -> list[Path]:
    """Return the .parquet and .jsonl files among and below `paths`, checked for their columns.

    The order is that of `paths`, by name inside a folder. Raises FileNotFoundError for a path that
    does not exist or holds no such file, BadFileError (a ValueError) for a file with other columns.
    """
    files = list_files(paths, TEXT_SUFFIXES)
    for file in files:
        check_text_file(file)
    return files


def list_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Return the files with these suffixes among and below `paths`, unread.

    Raises FileNotFoundError for a path without any, ValueError for a file that is given twice.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--input: {path} does not exist")
        found = files_below(path) if path.is_dir() else [path]
        found = [file for file in found if file.suffix in suffixes]
        if not found:
            raise FileNotFoundError(f"--input: {path} has no {' or '.join(suffixes)} file")
        files += found
    if len({file.resolve() for file in files}) < len(files):
        raise ValueError("--input: a file is given twice; give each once")
    return files


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, also where a link leads to a folder elsewhere, sorted.

    Raises ValueError for a folder that cannot be read: its files would be missing unseen. Of one
    that does not exist there are none.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        why = error.strerror or str(error)
        raise ValueError(f"{error.filename} cannot be read: {why}; allow it, or name what to take")

    files: list[Path] = []
    seen: set[str] = set()  # a link may lead back to a folder above it
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        subfolders.sort()
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        files += [Path(place, name) for name in names]
    return sorted(file for file in files if file.is_file())


def check_text_file(file: Path) -> list[str]:
    """Return the columns that are not used; BadFileError for a file without those that are."""
    if not file.stat().st_size:
        raise BadFileError(str(file), f"{file} is empty (0 bytes)")
    return _check_jsonl_fields(file) if file.suffix == ".jsonl" else _check_columns(file)


def read_documents(file: Path) -> Iterator[Document | Rejected]:
    """Yield every row (parquet) or line (jsonl) of a file as a document or as its rejection."""
    for piece in text_pieces(file, max_documents=1 << 62, max_bytes=1 << 62):
        yield from read_piece(piece)


def text_pieces(file: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
    """Cut a file into equal pieces of about at most so many documents and bytes of text."""
    if file.suffix == ".jsonl":
        size = file.stat().st_size
        bounds = np.linspace(0, size, -(-size // max_bytes) + 1).astype(np.int64).tolist()
        return [Piece(file, start, stop, 0, stop - start) for start, stop in pairwise(bounds)]
    return parquet_pieces(file, ["text"], max_documents=max_documents, max_bytes=max_bytes)


def parquet_pieces(
    file: Path, columns: Sequence[str], *, max_documents: int, max_bytes: int
) -> list[Piece]:
    """Cut parquet into equal pieces of about at most so many rows and bytes of these columns."""
    metadata = pq.read_metadata(file)
    rows = metadata.num_rows
    # By their paths: a nested column has several leaves.
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    leaves = [leaf for leaf, path in enumerate(paths) if path.split(".")[0] in columns]
    num_bytes = sum(
        metadata.row_group(group).column(leaf).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for leaf in leaves
    )
    pieces = max(-(-rows // max_documents), -(-num_bytes // max_bytes), 1)
    bounds = np.linspace(0, rows, min(pieces, rows) + 1).astype(np.int64).tolist()
    return [
        Piece(file, start, stop, stop - start, num_bytes * (stop - start) // rows)
        for start, stop in pairwise(bounds)
    ]


def read_piece(piece: Piece, parquet: ParquetReader | None = None) -> Iterator[Document | Rejected]:
    """Yield every row or line of a piece as a document or as its rejection.

    `parquet` is for who reads several pieces, one after the other.
    """
    if piece.file.suffix == ".jsonl":
        rows = _jsonl_lines(piece)
    else:
        rows = _parquet_rows(piece, parquet or ParquetReader())
    for text, source, place in rows:
        yield _checked(text, source, place)


def clean_text(text: str) -> str:
    """Return the text with what no reader sees taken out; everything else stays as it is.

    Line ends become \\n; control characters but tab and \\n, and byte order marks, go; so does
    white space at the end of lines and of the text, and empty lines at its start.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROL_CHARACTERS.sub("", text)
    # Not by a regular expression, for which a long run of spaces inside a line is quadratic.
    return "\n".join(line.rstrip() for line in text.split("\n")).lstrip("\n").rstrip()


def conversation_text(record: dict[str, Any]) -> str:
    """Render a DeepCtrl record as plain text: the turns before, instruction, input, output.

    Turns that are empty leave nothing behind. Raises KeyError or TypeError for another shape.
    """
    turns: list[str | None] = []
    for exchange in record["history"] or []:
        if not isinstance(exchange, list):
            raise TypeError("an exchange of the history is a list of turns")
        turns += exchange
    turns += [record["instruction"], record["input"], record["output"]]
    if any(turn is not None and not isinstance(turn, str) for turn in turns):
        raise TypeError("a turn is a string")
    return "\n".join(turn for turn in turns if turn and turn.strip())


def _checked(text: object, source: object, place: str) -> Document | Rejected:
    if isinstance(text, Rejected):
        return text
    if not isinstance(text, str) or not isinstance(source, str):
        return Rejected("not_a_string", place, repr(text)[:QUARANTINED_CHARACTERS])
    if not text.strip():
        return Rejected("empty", place, text[:QUARANTINED_CHARACTERS])
    try:
        f"{source}{text}".encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        content = text[:QUARANTINED_CHARACTERS].encode(errors="backslashreplace").decode()
        return Rejected("invalid_unicode", place, content)
    return Document(text, source, place)


# Parquet


def _parquet_rows(piece: Piece, parquet: ParquetReader) -> Iterator[tuple[object, object, str]]:
    row = piece.start
    try:
        for batch in parquet.batches(piece, ["text", "source"]):
            texts = _strings(batch["text"], row)
            for text, source in zip(texts, _strings(batch["source"], row), strict=True):
                # A source that is no text makes the row as bad as a text that is none.
                yield (source if isinstance(source, Rejected) else text), source, f"row {row}"
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(
            str(piece.file),
            f"{piece.file} is damaged ({_one_line(error)})",
        ) from error
    if row != piece.stop:
        raise BadFileError(
            str(piece.file),
            f"{piece.file} is damaged (it ends at row {row}, its footer says otherwise)",
        )


class ParquetReader:
    """Reads pieces of parquet, and goes on with the next piece where the last one ended.

    A row group can be decoded from its beginning only, and it may be the whole file: piece by piece
    from the beginning would be quadratic.
    """

    def __init__(self) -> None:
        self._reads: tuple[Path, Sequence[str]] | None = None
        self._following: Iterator[_Batch] = iter(())
        self._last: _Batch | None = None

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns of a piece's rows, some hundred rows at a time."""
        last, self._last = self._last, None  # kept again when this piece was read to its end
        if (
            last is None
            or self._reads != (piece.file, columns)
            or not last.start <= piece.start < last.group_stop
        ):
            self._reads = piece.file, columns
            self._following = _batches_from(piece.file, columns, piece.start)
            last = None
        for batch in self._following if last is None else chain([last], self._following):
            first = max(piece.start - batch.start, 0)
            chosen = batch.rows.slice(first, max(piece.stop - batch.start - first, 0))
            if chosen.num_rows:
                yield chosen
            if batch.start + batch.rows.num_rows >= piece.stop:
                self._last = batch
                return


class _Batch(NamedTuple):
    """Some hundred rows: the number of the first one, and of the first beyond its row group."""

    start: int
    group_stop: int
    rows: pa.RecordBatch


def _batches_from(file: Path, columns: Sequence[str], first_row: int) -> Iterator[_Batch]:
    """Yield the batches of a file from the row group of `first_row` on."""
    # Read through a small buffer and without reading ahead: a row group may be larger than memory.
    with pq.ParquetFile(
        file, pre_buffer=False, buffer_size=READ_BUFFER_BYTES, page_checksum_verification=True
    ) as parquet:
        start = 0
        for group in range(parquet.metadata.num_row_groups):
            group_stop = start + parquet.metadata.row_group(group).num_rows
            if group_stop > first_row:
                for rows in parquet.iter_batches(
                    READ_BATCH_ROWS,
                    row_groups=[group],
                    columns=list(columns),
                    use_threads=False,
                ):
                    yield _Batch(start, group_stop, rows)
                    start += rows.num_rows
            start = group_stop


def _strings(column: pa.Array, first_row: int) -> list[Any]:
    """Return the values of a column, with those that are not UTF-8, which Arrow does not check."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        return [_decoded(value, f"row {row}") for row, value in enumerate(values, first_row)]


def _decoded(value: bytes | None, place: str) -> str | Rejected | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return Rejected("not_utf8", place, _shown(value or b""))


def _check_columns(file: Path) -> list[str]:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise BadFileError(
            str(file),
            f"{file} is not a readable parquet file, cut off perhaps ({_one_line(error)})",
        ) from error
    missing = [column for column in PARQUET_COLUMNS if column not in schema.names]
    if missing:
        raise BadFileError(
            str(file),
            f"{file} lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(schema.names)}, and text, score, source are needed",
        )
    for column in ("text", "source"):
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadFileError(str(file), f"column {column} of {file} is {kind}, not string")
    kind = schema.field("score").type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise BadFileError(str(file), f"column score of {file} is {kind}, not a number")
    return [name for name in schema.names if name not in PARQUET_COLUMNS]


# Jsonl


def _jsonl_lines(piece: Piece) -> Iterator[tuple[object, object, str]]:
    # Line by line in bytes, so that one broken line costs one line.
    with piece.file.open("rb") as file:
        if piece.start:  # the line that began before belongs to the piece before
            file.seek(piece.start - 1)
            _skip_line(file)
        while (start := file.tell()) < piece.stop:
            line = file.readline(MAX_LINE_BYTES)
            if not line:  # cut off while it is read, which the caller says
                return
            place = f"byte {start}"
            if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                _skip_line(file)
                yield Rejected("too_long", place, _shown(line)), "", place
                continue
            try:
                record = json.loads(line.removeprefix(BOM_UTF8).decode("utf-8"))
                yield conversation_text(record), record.get("data_source") or piece.file.stem, place
            except UnicodeDecodeError:
                yield Rejected("not_utf8", place, _shown(line)), "", place
            except (ValueError, RecursionError):  # also a number of thousands of digits
                yield Rejected(_why_not_json(line), place, _shown(line)), "", place
            except (KeyError, TypeError, AttributeError):
                yield Rejected("wrong_fields", place, _shown(line)), "", place


def _why_not_json(line: bytes) -> str:
    if not line.strip():
        return "empty"
    # The last line of a file whose download or copy stopped.
    return "invalid_json" if line.endswith(b"\n") else "truncated"


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(READ_BUFFER_BYTES)) and not part.endswith(b"\n"):
        pass


def _check_jsonl_fields(file: Path) -> list[str]:
    """Check the first line that is a JSON object; single bad lines are counted, not fatal."""
    with file.open("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                missing = [name for name in JSONL_FIELDS if name not in record]
                if missing:
                    raise BadFileError(
                        str(file),
                        f"{file} lacks the fields {', '.join(missing)}; it has {', '.join(record)}",
                    )
                return []  # DeepCtrl has more fields, which are known and not used
    raise BadFileError(str(file), f"{file} has no line that is a JSON object")


def _shown(content: bytes) -> str:
    return content[:QUARANTINED_CHARACTERS].decode(errors="backslashreplace")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
