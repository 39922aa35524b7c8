"""Conversations through the SFT pipeline: read, encode with labels, pack, open, decode."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mini_llm.data.collate import IGNORE_INDEX
from mini_llm.data.conversation_files import Found, read_conversations, read_lines
from mini_llm.data.conversations import (
    ChatEncoder,
    Conversation,
    Encoded,
    count_answers,
    segments,
)
from mini_llm.data.manifest import TRAIN, VALIDATION, TokenizerEntry
from mini_llm.data.packed_stream import Row, RowGroupReader, open_prepared
from mini_llm.data.ready_made import ReadyMadeFiles
from mini_llm.data.sft_files import (
    PackedConversations,
    SftManifest,
    SftSplit,
    pack_conversations,
    write_sft_manifest,
    write_sft_rows,
)
from mini_llm.data.text_files import Piece, Rejected
from mini_llm.finding import Finding

from .common import (
    MAX_BYTES,
    MAX_DOCUMENTS,
    OpenTokenizer,
    Rejections,
    clipped,
    estimate,
    one_line,
    parts_of_rows,
    share_read,
    shares,
)
from .shards import Shard

ROW_GROUP_ROWS = 64
MAX_ROWS = 512


@dataclass
class Sample:
    """The conversations at the beginning of a shard, which are `share` of it."""

    found: list[Found] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)
    share: float = 1.0


def examine_conversations(
    shard: Shard, tokenizer: OpenTokenizer, seq_len: int
) -> Iterator[Finding]:
    """Yield the findings about raw conversations, with labels on the answers."""
    encoder = ChatEncoder(tokenizer.folder)
    sample = _read_sample(shard.path)
    found = sample.found
    multi_turn = sum(count_answers(item.messages) > 1 for item in found)
    yield Finding(
        "ok" if found else "FAIL",
        "conversations",
        f"{len(found):,}: {len(found) - multi_turn:,} single-turn, {multi_turn:,} multi-turn; "
        f"read: {share_read(sample.share, 'lines')}",
    )
    yield sample.rejections.finding(of=len(found) + sample.rejections.counts.total())
    if not found:
        return
    mended = Counter(name for item in found for name in item.mended)
    named = ", ".join(f"{count:,} {name}" for name, count in mended.most_common())
    yield Finding("ok", "mended", named or "nothing had to be")
    yield Finding("ok", "types", shares(Counter(f"type {item.kind}" for item in found)))
    conversations = [item.messages for item in found]
    encoded = [encoder.encode(messages) for messages in conversations]
    yield _lengths([len(conversation.input_ids) for conversation in encoded], "tokens")
    fits = [i for i, item in enumerate(encoded) if len(item.input_ids) <= seq_len]
    if too_long := len(encoded) - len(fits):
        detail = (
            f"{too_long:,} of {len(encoded):,} are longer than --seq_len {seq_len} and left out; "
            "--too_long truncate of prepare_sft.py keeps their first turns"
        )
        yield Finding("note" if fits else "FAIL", "too long", detail)
    if not fits:
        return
    conversations = [conversations[i] for i in fits]
    yield from _through_the_files(
        shard, sample.share, conversations, [encoded[i] for i in fits], tokenizer, seq_len
    )


def examine_ready_made(shard: Shard, tokenizer: OpenTokenizer, seq_len: int) -> Iterator[Finding]:
    """Yield the findings about SFT parquet that was tokenised elsewhere."""
    encoder = ChatEncoder(tokenizer.folder)
    data = ReadyMadeFiles(shard.name, [shard.path], encoder, seq_len)
    data.check_fit(shard.name, seq_len=seq_len, tokenizer=tokenizer.folder)
    yield Finding("ok", "first conversations", "their tokens are text of this tokenizer")
    yield from examine_rows(data.reader(TRAIN), seq_len, tokenizer)


def examine_rows(rows: RowGroupReader, seq_len: int, tokenizer: OpenTokenizer) -> Iterator[Finding]:
    """Yield the findings about training rows of conversations, of which some hundreds are read."""
    read: list[Row] = []
    faults: list[str] = []
    count = min(rows.rows, MAX_ROWS)
    for number in range(count):
        try:
            read.append(rows.row_at(number, TRAIN))
        except ValueError as error:
            faults.append(one_line(error))
    if faults:
        yield Finding("FAIL", "rows", f"{len(faults):,} of {count:,} do not fit; {faults[0]}")
    else:
        detail = f"{count:,} of {rows.rows:,} for training read, each holds together"
        yield Finding("ok", "rows", detail)
    if not read:
        return
    lengths = [int(length) for row in read for length in row["doc_lens"]]
    yield _lengths(lengths, "tokens")
    places = len(read) * seq_len
    yield Finding(
        "ok",
        "packing",
        f"{sum(lengths) / places:.2%} used: {len(lengths):,} conversations in {len(read):,} rows "
        f"of {seq_len:,}",
    )
    yield from _supervision(read, tokenizer)


def _read_sample(file: Path) -> Sample:
    sample = Sample()
    items: Iterator[tuple[int, Found | Rejected]]
    if file.suffix == ".jsonl":
        size = file.stat().st_size  # in bytes, as the places are
        items = read_lines(file, 0, size)
    else:
        size = pq.read_metadata(file).num_rows
        items = enumerate(read_conversations(Piece(file, 0, size, size, 0)))
    for place, item in items:
        if len(sample.found) + sample.rejections.counts.total() == MAX_DOCUMENTS or (
            place >= MAX_BYTES
        ):
            sample.share = place / size
            break
        if isinstance(item, Found):
            sample.found.append(item)
        else:
            sample.rejections.add(item.reason, item.place)
    return sample


def _lengths(lengths: list[int], unit: str) -> Finding:
    middle = int(np.median(lengths))
    detail = f"{min(lengths):,} to {max(lengths):,} {unit}, median {middle:,}"
    return Finding("ok", "lengths", detail)


def _through_the_files(
    shard: Shard,
    share: float,
    conversations: list[Conversation],
    encoded: list[Encoded],
    tokenizer: OpenTokenizer,
    seq_len: int,
) -> Iterator[Finding]:
    """Pack the conversations, write them, read them back, and decode them with their labels."""
    lengths = np.array([len(item.input_ids) for item in encoded])
    packed = pack_conversations(
        np.concatenate([item.input_ids for item in encoded]).astype(tokenizer.dtype),
        np.concatenate([item.labels != IGNORE_INDEX for item in encoded]),
        lengths,
        seq_len,
    )
    tokens, rows = int(lengths.sum()), len(packed.doc_lens)
    few = "" if rows >= ROW_GROUP_ROWS else " (few rows: more conversations pack tighter)"
    yield Finding(
        "ok",
        "packing",
        f"{tokens / (rows * seq_len):.2%} used: {tokens:,} tokens in {rows:,} rows of "
        f"{seq_len:,}{few}; no conversation is split",
    )
    with tempfile.TemporaryDirectory(prefix="mini_llm_doctor_") as folder:
        _write_prepared(Path(folder), packed, tokenizer, seq_len)
        reader = open_prepared(folder, of_conversations=True).reader(TRAIN)
        read = [reader.row_at(number, TRAIN) for number in range(reader.rows)]
    yield _round_trip(read, conversations, tokenizer)
    yield from _supervision(read, tokenizer)
    file_bytes = shard.path.stat().st_size
    yield estimate(tokens, share, file_bytes, shard.total_bytes, shard.files)


def _write_prepared(
    folder: Path, packed: PackedConversations, tokenizer: OpenTokenizer, seq_len: int
) -> None:
    file = f"{TRAIN}/000000.parquet"
    entry = write_sft_rows(folder, file, packed, row_group_rows=ROW_GROUP_ROWS)
    conversations = sum(map(len, packed.doc_lens))
    train = SftSplit(
        rows=entry.rows,
        tokens=entry.tokens,
        supervised_tokens=int(packed.loss_mask.sum()),
        conversations=conversations,
        conversations_per_kind={},
        utilisation=entry.tokens / packed.input_ids.size,
        files=[entry],
    )
    manifest = SftManifest(
        seq_len=seq_len,
        tokenizer=TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size),
        splits={TRAIN: train, VALIDATION: SftSplit(0, 0, 0, 0, {}, 0.0, [])},
        input_lines=conversations,
        rejected={},
        not_sampled=0,
        mended={},
        sampling={},
        options={},
    )
    write_sft_manifest(folder, manifest)


def _round_trip(
    rows: Sequence[Row], conversations: list[Conversation], tokenizer: OpenTokenizer
) -> Finding:
    """Compare what the rows say, and what in it is supervised, with the conversations' words."""
    ids, masks = _conversations_of(rows)
    said = tokenizer.decode(ids)
    supervised = tokenizer.decode([part[mask] for part, mask in zip(ids, masks, strict=True)])
    expected = Counter(_rendered(messages) for messages in conversations)
    missing = (expected - Counter(zip(said, supervised, strict=True))).total()
    total = len(conversations)
    if not missing and len(said) == total:
        detail = f"exact: {total:,} conversations decoded from the rows, and what is supervised"
        return Finding("ok", "round trip", detail)
    detail = f"not exact: {missing:,} of {total:,} conversations do not come back as they were"
    return Finding("FAIL", "round trip", f"{detail}; the rows hold {len(said):,}")


def _rendered(messages: Conversation) -> tuple[str, str]:
    """Return the text of a conversation in the chat template, and the supervised text in it."""
    found = list(segments(messages))
    supervised = "".join(segment.text for segment in found if segment.supervised)
    return "".join(segment.text for segment in found), supervised


def _conversations_of(rows: Sequence[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return ids of the conversations in rows, and whether each is supervised."""
    doc_lens = [row["doc_lens"] for row in rows]
    ids = parts_of_rows([row["input_ids"] for row in rows], doc_lens)
    return ids, parts_of_rows([row["loss_mask"] for row in rows], doc_lens)


def _supervision(rows: Sequence[Row], tokenizer: OpenTokenizer) -> Iterator[Finding]:
    """Yield the share of supervised tokens and the shortest conversation with them marked."""
    tokens = sum(int(row["doc_lens"].sum()) for row in rows)
    supervised = sum(int(row["loss_mask"].sum()) for row in rows)
    detail = f"{supervised / tokens:.1%} of the tokens ({supervised:,} of {tokens:,})"
    yield Finding("ok" if supervised else "FAIL", "supervised", detail)
    ids, masks = _conversations_of(rows)
    shortest = min(range(len(ids)), key=lambda i: len(ids[i]))
    is_supervised = masks[shortest]
    cuts = np.flatnonzero(np.diff(is_supervised)) + 1
    texts = tokenizer.decode(np.split(ids[shortest], cuts))
    marks = [bool(part[0]) for part in np.split(is_supervised, cuts)]
    shown = [
        f"«{clipped(text)}»" if mark else clipped(text)
        for text, mark in zip(texts, marks, strict=True)
    ]
    yield Finding("ok", "the shortest one", f"«supervised»: {''.join(shown)}")
