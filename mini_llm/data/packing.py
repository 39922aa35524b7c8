"""Best-fit packing of documents into rows of a fixed number of tokens.

Splitting is the last resort: only a document longer than a row is cut. See Ding et al. 2024,
"Fewer Truncations Improve Language Modeling" (arXiv:2404.10830).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SEQ_LEN = 4


@dataclass(frozen=True)
class PackingStats:
    """Counts of what was packed; adding two gives the counts of both."""

    rows: int = 0
    tokens: int = 0
    documents: int = 0
    split_documents: int = 0

    def __add__(self, other: PackingStats) -> PackingStats:
        return PackingStats(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.documents + other.documents,
            self.split_documents + other.split_documents,
        )

    def utilisation(self, seq_len: int) -> float:
        """Return real tokens ÷ places in the rows, 0 when there are no rows."""
        return self.tokens / (self.rows * seq_len) if self.rows else 0.0

    @property
    def split_fraction(self) -> float:
        """Return the share of documents that were cut because they are longer than a row."""
        return self.split_documents / self.documents if self.documents else 0.0


@dataclass(frozen=True)
class PackedRows:
    """`input_ids` [rows, seq_len], padded with 0, and the lengths of the documents of each row."""

    input_ids: np.ndarray
    doc_lens: list[np.ndarray]
    stats: PackingStats


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put items of the given lengths into bins and return the item indices of each bin.

    Longest first, each goes into the fullest bin that still has room. `room_mask` has bit r set
    when some bin has exactly r places left, so that bin is found by a shift and a lowest set bit
    instead of a search. Raises ValueError for an item that is empty or longer than `capacity`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"every length must lie in 1..{capacity}")
    bins: list[list[int]] = []
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    room_mask = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        wide_enough = room_mask >> length
        if wide_enough:
            lowest_set_bit = (wide_enough & -wide_enough).bit_length() - 1
            room = length + lowest_set_bit
            bin_index = bins_with_room[room].pop()
            if not bins_with_room[room]:
                room_mask &= ~(1 << room)
        else:
            room, bin_index = capacity, len(bins)
            bins.append([])
        bins[bin_index].append(item)
        room -= length
        if room:
            bins_with_room[room].append(bin_index)
            room_mask |= 1 << room
    return bins


def split_long_documents(
    lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents longer than `seq_len` and return (document, start, length) of every piece.

    Pieces keep the order of their document. No cut leaves a single token, because the first token
    of a piece is nobody's target: a lone `<|endoftext|>` would never be learnt.
    """
    if seq_len < MIN_SEQ_LEN:
        raise ValueError(f"--seq_len must be at least {MIN_SEQ_LEN}, got {seq_len}")
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces_per_document = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces_per_document)
    first_piece = np.cumsum(pieces_per_document) - pieces_per_document
    piece_in_document = np.arange(len(document)) - np.repeat(first_piece, pieces_per_document)
    start = piece_in_document * seq_len
    # The last piece takes one token from the piece before it when it would have only one.
    is_last = piece_in_document == pieces_per_document[document] - 1
    start -= is_last & (piece_in_document > 0) & (lengths[document] - start == 1)
    # A piece ends where the next one of its document starts, the last one where the document ends.
    end = np.append(start[1:], 0)
    end = np.where(is_last, lengths[document], end)
    return document, start, end - start


def pack_documents(tokens: np.ndarray, lengths: np.ndarray, seq_len: int) -> PackedRows:
    """Pack a window of documents, given as one array of tokens, into rows.

    `tokens` [sum(lengths)] are the documents one after the other. In a row they stand in the
    order of the window. Raises ValueError when the two arrays disagree.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if int(lengths.sum()) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens do not make documents of {lengths.sum()} in all")
    document, start, piece_lengths = split_long_documents(lengths, seq_len)
    piece_offsets = (np.cumsum(lengths) - lengths)[document] + start
    bins = best_fit_decreasing(piece_lengths, seq_len)
    input_ids = np.zeros((len(bins), seq_len), dtype=tokens.dtype)
    doc_lens: list[np.ndarray] = []
    for row, pieces in enumerate(bins):
        pieces.sort()
        position = 0
        for piece in pieces:
            offset, length = piece_offsets[piece], piece_lengths[piece]
            input_ids[row, position : position + length] = tokens[offset : offset + length]
            position += length
        doc_lens.append(piece_lengths[pieces].astype(np.int32))
    stats = PackingStats(
        rows=len(bins),
        tokens=len(tokens),
        documents=len(lengths),
        split_documents=int((lengths > seq_len).sum()),
    )
    return PackedRows(input_ids, doc_lens, stats)
