"""Packed rows as parquet files: what the preparations write and the stream reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..durable import complete_or_absent
from .manifest import FileEntry


def write_rows(
    folder: Path,
    file: str,
    input_ids: np.ndarray,
    doc_lens: list[np.ndarray],
    rows: np.ndarray,
    *,
    row_group_rows: int,
) -> FileEntry:
    """Write the chosen `rows`, in that order, as `folder`/`file` and return its manifest entry.

    `input_ids` [all rows, seq_len] uint16 or uint32; `doc_lens` the document lengths of each row.
    The file is whole or absent.
    """
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    seq_len = input_ids.shape[1]
    token_type = pa.from_numpy_dtype(input_ids.dtype)
    schema = pa.schema(
        {"input_ids": pa.list_(token_type, seq_len), "doc_lens": pa.list_(pa.int32())}
    )
    row_groups = []
    tokens = 0
    # Tokens are not repetitive enough for a dictionary, and without one reading is faster.
    with (
        complete_or_absent(path) as written,
        pq.ParquetWriter(written, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for start in range(0, len(rows), row_group_rows):
            chosen = rows[start : start + row_group_rows]
            lengths = [doc_lens[row] for row in chosen]
            offsets = np.cumsum([0, *(len(row) for row in lengths)], dtype=np.int32)
            flat_lengths = np.concatenate(lengths)
            table = pa.Table.from_arrays(
                [
                    pa.FixedSizeListArray.from_arrays(
                        pa.array(input_ids[chosen].reshape(-1)), seq_len
                    ),
                    pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat_lengths)),
                ],
                schema=schema,
            )
            writer.write_table(table, row_group_size=row_group_rows)
            row_groups.append(len(chosen))
            tokens += int(flat_lengths.sum())
    with path.open("rb") as finished:
        sha256 = hashlib.file_digest(finished, "sha256").hexdigest()
    return FileEntry(file, len(rows), tokens, row_groups, sha256, path.stat().st_size)
