"""Text and ready-made tokens through the pretraining pipeline: read, tokenise, pack, stream."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mini_llm.data.collate import collate
from mini_llm.data.manifest import (
    TRAIN,
    VALIDATION,
    Manifest,
    Split,
    TokenizerEntry,
    write_manifest,
)
from mini_llm.data.packed_files import write_rows
from mini_llm.data.packing import PackedRows, pack_documents, split_long_documents
from mini_llm.data.stream import Row, open_stream
from mini_llm.data.text_files import Document, Piece, Rejected, check_text_file, read_documents
from mini_llm.data.token_files import TOKEN_DTYPE, TokenReader, check_token_file
from mini_llm.data.tokenizer import encode_function
from mini_llm.finding import Finding

from .common import (
    MAX_BYTES,
    MAX_DOCUMENTS,
    NAMED,
    ROWS_PER_STEP,
    OpenTokenizer,
    Rejections,
    estimate,
    parts_of_rows,
    share_read,
    shares,
)
from .shards import Shard

ROW_GROUP_ROWS = 64
SOURCE_NAME = "shard"


@dataclass(frozen=True)
class Sample:
    """The documents at the beginning of a shard, which are `share` of it."""

    documents: list[Document]
    rejections: Rejections
    share: float


def examine_text(shard: Shard, tokenizer: OpenTokenizer, seq_len: int) -> Iterator[Finding]:
    """Yield the findings about FineWeb-shaped parquet or DeepCtrl jsonl as pretraining text."""
    unused = check_text_file(shard.path)
    if unused:
        yield Finding("note", "columns", f"not used: {', '.join(unused)}")
    is_parquet = shard.path.suffix == ".parquet"
    size = pq.read_metadata(shard.path).num_rows if is_parquet else shard.path.stat().st_size
    if not size:
        raise ValueError(f"--data: {shard.path} has 0 rows; get it again or leave it out")
    sample = read_sample(read_documents(shard.path), size)
    yield from _documents_read(sample)
    if not sample.documents:
        return
    texts = [document.text for document in sample.documents]
    encode = encode_function(tokenizer.folder)
    encode(texts[0])  # what is made at the first call is not the speed
    started = time.perf_counter()
    token_ids = [encode(text) for text in texts]
    seconds = time.perf_counter() - started
    yield _characters_per_token(sample.documents, token_ids)
    yield _special_token_text(texts, token_ids, tokenizer)
    tokens = sum(map(len, token_ids))
    yield Finding("ok", "speed", f"{tokens / seconds:,.0f} tokens/s tokenised by one core here")
    tokens = yield from _through_the_stream(sample, token_ids, tokenizer, seq_len)
    file_bytes = shard.path.stat().st_size
    yield estimate(tokens, sample.share, file_bytes, shard.total_bytes, shard.files)


def examine_token_file(shard: Shard, tokenizer: OpenTokenizer, seq_len: int) -> Iterator[Finding]:
    """Yield the findings about headerless uint16 tokens made with this tokenizer."""
    end = tokenizer.end_of_document
    check_token_file(shard.path, tokenizer.folder, tokenizer.vocab_size, end)
    size = shard.path.stat().st_size // TOKEN_DTYPE.itemsize
    yield Finding("ok", "ids", f"all {size:,} tokens of the file are ids of this tokenizer")
    reader = TokenReader(tokenizer.folder, tokenizer.vocab_size, end)
    sample = read_sample(reader.read_piece(Piece(shard.path, 0, size, 0, 0)), size)
    yield from _documents_read(sample)
    if not sample.documents:
        return
    found = [document.token_ids for document in sample.documents]
    token_ids = [ids for ids in found if ids is not None]
    yield _characters_per_token(sample.documents, token_ids)
    inside = sum(_control_tokens_in(ids, tokenizer) for ids in token_ids)
    if inside:
        detail = f"{inside:,} inside documents: they were made as control tokens, not as text"
        yield Finding("note", "control tokens", detail)
    yield from _through_the_stream(sample, token_ids, tokenizer, seq_len)
    in_all = shard.total_bytes // TOKEN_DTYPE.itemsize
    yield Finding("ok", "tokens in all", f"{in_all:,} in {shard.files:,} file(s), 2 bytes each")


def read_sample(items: Iterator[Document | Rejected], size: int) -> Sample:
    """Read up to the bounds; `size` is that of the file in what places count: rows, bytes, tokens.

    The rest of the file is not read.
    """
    documents: list[Document] = []
    rejections = Rejections()
    num_bytes = 0
    for item in items:
        if len(documents) + rejections.counts.total() == MAX_DOCUMENTS or num_bytes >= MAX_BYTES:
            return Sample(documents, rejections, _position(item.place) / size)
        if isinstance(item, Rejected):
            rejections.add(item.reason, item.place)
        else:
            documents.append(item)
            num_bytes += len(item.text.encode())
    return Sample(documents, rejections, 1.0)


def _position(place: str) -> int:
    return int(place.rpartition(" ")[2])  # "row 7", "byte 7", "token 7"


def _documents_read(sample: Sample) -> Iterator[Finding]:
    documents, rejections = sample.documents, sample.rejections
    characters = sum(len(document.text) for document in documents)
    yield Finding(
        "ok" if documents else "FAIL",
        "documents",
        f"{len(documents):,} with {characters:,} characters; read: "
        f"{share_read(sample.share, 'documents')}",
    )
    yield rejections.finding(of=len(documents) + rejections.counts.total())
    if documents:
        by_source = Counter(document.source for document in documents)
        yield Finding("ok", "sources", f"{shares(by_source)} of the documents")


def _characters_per_token(documents: list[Document], token_ids: list[np.ndarray]) -> Finding:
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for document, ids in zip(documents, token_ids, strict=True):
        characters[document.source] += len(document.text)
        tokens[document.source] += len(ids)
    overall = f"{characters.total() / tokens.total():.2f} overall"
    each = [
        f"{name} {characters[name] / tokens[name]:.2f}" for name, _ in tokens.most_common(NAMED)
    ]
    return Finding("ok", "characters per token", "; ".join([overall, ", ".join(each)]))


def _special_token_text(
    texts: list[str], token_ids: list[np.ndarray], tokenizer: OpenTokenizer
) -> Finding:
    became = sum(_control_tokens_in(ids, tokenizer) for ids in token_ids)
    if became:
        detail = f"{became:,} control tokens came out of text that only quotes them"
        return Finding("FAIL", "special-token text", detail)
    counts = {token: sum(text.count(token) for text in texts) for token in tokenizer.control_tokens}
    spelt = ", ".join(f"{count:,} × {token}" for token, count in counts.items() if count)
    return Finding("ok", "special-token text", f"{spelt or 'none'}; it is encoded as text")


def _control_tokens_in(token_ids: np.ndarray, tokenizer: OpenTokenizer) -> int:
    return int(np.isin(token_ids, list(tokenizer.control_tokens.values())).sum())


def _through_the_stream(
    sample: Sample,
    token_ids: list[np.ndarray],
    tokenizer: OpenTokenizer,
    seq_len: int,
) -> Generator[Finding, None, int]:
    """Pack the documents, write them, read them back with the stream, and decode them.

    Returns the number of tokens, with the ends of documents.
    """
    ended = [np.append(ids, tokenizer.end_of_document).astype(tokenizer.dtype) for ids in token_ids]
    lengths = np.array([len(ids) for ids in ended])
    packed = pack_documents(np.concatenate(ended), lengths, seq_len)
    stats = packed.stats
    few = "" if stats.rows >= ROW_GROUP_ROWS else " (few rows: more documents pack tighter)"
    yield Finding(
        "ok",
        "packing",
        f"{stats.utilisation(seq_len):.2%} used: {stats.tokens:,} tokens in {stats.rows:,} rows of "
        f"{seq_len:,}{few}; {stats.split_documents:,} documents split ({stats.split_fraction:.2%})",
    )
    with tempfile.TemporaryDirectory(prefix="mini_llm_doctor_") as folder:
        _write_prepared(Path(folder), packed, sample.documents, tokenizer, seq_len)
        rows = list(_rows_of_an_epoch(Path(folder), stats.rows, tokenizer, seq_len))
    yield _one_step(rows[:ROWS_PER_STEP])
    yield _round_trip(rows, sample.documents, ended, tokenizer, seq_len)
    return stats.tokens


def _write_prepared(
    folder: Path,
    packed: PackedRows,
    documents: list[Document],
    tokenizer: OpenTokenizer,
    seq_len: int,
) -> None:
    stats = packed.stats
    entry = write_rows(
        folder,
        f"{TRAIN}/000000.parquet",
        packed.input_ids,
        packed.doc_lens,
        np.arange(stats.rows),
        row_group_rows=ROW_GROUP_ROWS,
    )
    train = Split(
        rows=stats.rows,
        tokens=stats.tokens,
        documents=stats.documents,
        bytes=sum(len(document.text.encode()) for document in documents),
        documents_per_source=dict(Counter(document.source for document in documents)),
        utilisation=stats.utilisation(seq_len),
        split_fraction=stats.split_fraction,
        files=[entry],
    )
    manifest = Manifest(
        seq_len=seq_len,
        tokenizer=TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size),
        splits={TRAIN: train, VALIDATION: Split(0, 0, 0, 0, {}, 0.0, 0.0, [])},
        rejected={},
        options={},
    )
    write_manifest(folder, manifest)


def _rows_of_an_epoch(
    folder: Path, rows: int, tokenizer: OpenTokenizer, seq_len: int
) -> Iterator[Row]:
    data = {SOURCE_NAME: {"path": str(folder), "weight": 1.0}}
    with open_stream(
        data, seq_len=seq_len, seed=0, rows_per_step=ROWS_PER_STEP, tokenizer=tokenizer.folder
    ) as stream:
        yield from islice(stream, rows)


def _one_step(rows: list[Row]) -> Finding:
    batch = collate(rows)
    documents = sum(len(row["doc_lens"]) for row in rows)
    tokens = sum(int(row["doc_lens"].sum()) for row in rows)
    targets = batch["num_target_tokens"]
    detail = (
        f"{len(rows)} rows collated: {documents:,} documents and parts, {targets:,} targets, "
        f"{batch['input_ids'].numel() - tokens:,} places of padding"
    )
    # Each token but the first of a document is the target of the one before it.
    return Finding("ok" if targets == tokens - documents else "FAIL", "stream step", detail)


def _round_trip(
    rows: list[Row],
    documents: list[Document],
    token_ids: list[np.ndarray],
    tokenizer: OpenTokenizer,
    seq_len: int,
) -> Finding:
    """Take every document out of the rows, the parts of a split one together, and compare its text.

    `token_ids` of each document with its end, to know which parts are whose. A part that is in the
    rows but of no document is as bad as one that is missing.
    """
    rows_parts = parts_of_rows(
        [row["input_ids"] for row in rows], [row["doc_lens"] for row in rows]
    )
    available = Counter(part.tobytes() for part in rows_parts)
    lengths = np.array([len(ids) for ids in token_ids])
    document_of_part, starts, part_lengths = split_long_documents(lengths, seq_len)
    parts: list[list[bytes]] = [[] for _ in documents]
    for i, start, length in zip(document_of_part, starts, part_lengths, strict=True):
        parts[i].append(token_ids[i][start : start + length].tobytes())
    taken: list[bytes] = []
    for of_document in parts:
        needed = Counter(of_document)
        there = all(available[part] >= count for part, count in needed.items())
        available.subtract(needed if there else {})
        taken.append(b"".join(of_document) if there else b"")
    # Without the end token, which is no text.
    decoded = tokenizer.decode([np.frombuffer(ids, tokenizer.dtype)[:-1] for ids in taken])
    changed = [d.place for d, text in zip(documents, decoded, strict=True) if text != d.text]
    foreign = available.total()
    if not changed and not foreign:
        detail = f"exact: {len(documents):,} documents decoded from the rows are their texts"
        return Finding("ok", "round trip", detail)
    detail = f"not exact: {len(changed):,} of {len(documents):,} documents do not come back"
    detail += f" (first: {changed[0]})" if changed else ""
    detail += f"; {foreign:,} parts in the rows are of no document" if foreign else ""
    return Finding("FAIL", "round trip", detail)
