"""Packing: every token once, order kept, rows never overfull, as good as a plain best fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_llm.data.packing import (
    MIN_SEQ_LEN,
    PackingStats,
    best_fit_decreasing,
    pack_documents,
    split_long_documents,
)

PROPERTY = settings(max_examples=200, deadline=None)


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Return the room left in each bin, by looking at every bin for every item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@PROPERTY
@given(data=st.data(), capacity=st.integers(1, 64))
def test_best_fit_equals_the_slow_search_and_holds_each_item_once(
    data: st.DataObject, capacity: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    rooms = [capacity - sum(lengths[item] for item in items) for items in bins]
    assert min(rooms, default=0) >= 0
    assert sorted(rooms) == sorted(slow_best_fit_decreasing(lengths, capacity))


@pytest.mark.parametrize("lengths", [[0], [9], [3, -1]])
def test_items_that_cannot_be_placed_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        best_fit_decreasing(np.array(lengths), 8)


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 100), max_size=30),
    seq_len=st.integers(MIN_SEQ_LEN, 33),
)
def test_pieces_cover_each_document_in_order_and_no_cut_leaves_one_token(
    lengths: list[int], seq_len: int
) -> None:
    document, start, piece_lengths = split_long_documents(np.array(lengths, np.int64), seq_len)
    for index, length in enumerate(lengths):
        pieces = [
            (int(s), int(n))
            for d, s, n in zip(document, start, piece_lengths, strict=True)
            if d == index
        ]
        covered = [place for s, n in pieces for place in range(s, s + n)]
        assert covered == list(range(length))
        assert len(pieces) == -(-length // seq_len)
        assert all(n <= seq_len for _, n in pieces)
        assert length == 1 or all(n >= 2 for _, n in pieces)


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    seq_len=st.integers(MIN_SEQ_LEN, 24),
)
def test_packed_rows_hold_every_token_once_and_keep_the_order_of_documents(
    lengths: list[int], seq_len: int
) -> None:
    total = sum(lengths)
    # Tokens are numbered from 1, so that padding (0) is told apart.
    packed = pack_documents(np.arange(1, total + 1), np.array(lengths, np.int64), seq_len)
    segments = []
    for row, row_lengths in zip(packed.input_ids, packed.doc_lens, strict=True):
        assert row_lengths.dtype == np.int32
        used = int(row_lengths.sum())
        assert 0 < used <= seq_len
        assert not row[used:].any()
        segments += np.split(row[:used], np.cumsum(row_lengths)[:-1])
    for segment in segments:
        assert (np.diff(segment) == 1).all()
    assert sorted(int(t) for s in segments for t in s) == list(range(1, total + 1))
    # No segment runs over the end of a document.
    ends = set(np.cumsum(lengths).tolist())
    for segment in segments:
        assert not ends & set(segment[:-1].tolist())
    assert packed.stats == PackingStats(
        rows=len(packed.input_ids),
        tokens=total,
        documents=len(lengths),
        split_documents=sum(length > seq_len for length in lengths),
    )


def test_utilisation_and_split_fraction_are_the_counted_ones() -> None:
    packed = pack_documents(np.arange(1, 22), np.array([5, 3, 12, 1]), 8)
    assert packed.stats.rows == 3
    assert packed.stats.utilisation(8) == 21 / 24
    assert packed.stats.split_fraction == 1 / 4
    both = packed.stats + packed.stats
    assert both.rows == 6 and both.utilisation(8) == 21 / 24
    assert PackingStats().utilisation(8) == 0 and PackingStats().split_fraction == 0


def test_tokens_that_do_not_match_the_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens"):
        pack_documents(np.arange(5), np.array([2, 2]), 8)


def test_too_small_seq_len_names_its_flag() -> None:
    with pytest.raises(ValueError, match="--seq_len"):
        split_long_documents(np.array([3]), MIN_SEQ_LEN - 1)


def test_natural_lengths_fill_rows_of_2048_above_99_percent_with_few_splits() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 0.9, 4000).astype(np.int64) + 2
    packed = pack_documents(np.ones(lengths.sum(), np.uint16), lengths, 2048)
    assert packed.stats.utilisation(2048) > 0.995
    assert packed.stats.split_fraction < 0.05
