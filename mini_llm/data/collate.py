"""Packed rows → the tensors a model trains on, and the same rows without packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    import torch

    from mini_llm.models.common.documents import Documents

    from .packed_stream import Row

IGNORE_INDEX = -100


class Batch(TypedDict):
    """B rows of T tokens: what `collate` returns."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seq_lens: torch.Tensor
    documents: Documents
    num_target_tokens: int


def collate(rows: Sequence[Row], device: torch.device | str | None = None) -> Batch:
    """Turn packed rows into a batch.

    - `input_ids` [B, T] int64.
    - `position_ids` [B, T] int64: 0, 1, 2, … from the start of each document; 0 on padding.
    - `labels` [B, T] int64, Hugging Face convention (labels[t] is input_ids[t], the model shifts):
      -100 on the first token of each document, which no token before it may predict, on padding,
      and where a row has a `loss_mask` that is False.
    - `cu_seq_lens` [segments + 1] int32, always on the host: segment boundaries in the flattened
      [B·T] tokens, from 0 to B·T. A segment is a document, or the padding at the end of a row.
    - `documents`: those that a model finds in `position_ids`, each place of padding being one;
      given them, it need not ask the device.
    - `num_target_tokens`: labels that are not -100.

    Raises ValueError when there are no rows or a row's documents are longer than the row.
    """
    import torch

    from mini_llm.models.common.documents import Documents
    from mini_llm.parallel.transfer import to_device

    if not rows:
        raise ValueError("collate needs at least one row")
    input_ids = np.stack([row["input_ids"] for row in rows]).astype(np.int64)
    num_rows, seq_len = input_ids.shape
    documents_per_row = np.array([len(row["doc_lens"]) for row in rows])
    lengths = np.concatenate([row["doc_lens"] for row in rows]).astype(np.int64)
    row_of_document = np.repeat(np.arange(num_rows), documents_per_row)
    row_lengths = np.bincount(row_of_document, weights=lengths, minlength=num_rows).astype(np.int64)
    if (row_lengths > seq_len).any() or (lengths < 1).any():
        raise ValueError(f"doc_lens must be at least 1 and sum to at most the row's {seq_len}")

    # Where each document starts in the flattened tokens: after the documents before it, plus the
    # padding of the rows before its own.
    padding = seq_len - row_lengths
    padding_before_row = np.cumsum(padding) - padding
    starts = np.cumsum(lengths) - lengths + padding_before_row[row_of_document]

    places = np.arange(num_rows * seq_len)
    is_real = places % seq_len < np.repeat(row_lengths, seq_len)
    position_ids = np.zeros(num_rows * seq_len, dtype=np.int64)
    position_ids[is_real] = places[is_real] - np.repeat(starts, lengths)
    is_target = is_real & (position_ids > 0)
    for row, place in zip(rows, range(0, num_rows * seq_len, seq_len), strict=True):
        if "loss_mask" in row:
            is_target[place : place + seq_len] &= row["loss_mask"]
    labels = np.where(is_target, input_ids.reshape(-1), IGNORE_INDEX)

    row_ends = np.arange(num_rows) * seq_len + row_lengths
    boundaries = np.concatenate([starts, row_ends[padding > 0], [num_rows * seq_len]])
    cu_seq_lens = np.unique(np.append(boundaries, 0)).astype(np.int32)

    document_lengths = np.diff(np.flatnonzero(position_ids == 0), append=num_rows * seq_len)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array.reshape(num_rows, seq_len)), device)

    return Batch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids),
        labels=tensor(labels),
        cu_seq_lens=torch.from_numpy(cu_seq_lens),
        documents=Documents(
            tuple(document_lengths.tolist()), spans=tuple(np.diff(cu_seq_lens).tolist())
        ),
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def one_document_per_row(rows: Sequence[Row]) -> list[Row]:
    """Return each document of packed rows as a row of its own: the same step without packing.

    The rows are as long as the longest document, padded at the end: the same documents and
    supervised tokens, more places. Padding rows, which hold no document, give none.
    """
    lengths = [length for row in rows for length in row["doc_lens"].tolist()]
    longest = max(lengths, default=0)
    unpacked: list[Row] = []
    for row in rows:
        ends = np.cumsum(row["doc_lens"])
        for start, end in zip(ends - row["doc_lens"], ends, strict=True):
            padding = (0, longest - int(end - start))
            document = row | {
                "input_ids": np.pad(row["input_ids"][start:end], padding),
                "doc_lens": np.array([end - start], np.int32),
            }
            if "loss_mask" in row:
                document["loss_mask"] = np.pad(row["loss_mask"][start:end], padding)
            unpacked.append(document)
    return unpacked
