"""Small prepared folders and tokenizers for the tests of the data code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mini_llm.data.manifest import Manifest, Split, TokenizerEntry, write_manifest
from mini_llm.data.packed_files import write_rows

SEQ_LEN = 8


def write_packed_folder(
    folder: Path,
    files: list[int],
    *,
    row_group_rows: int = 3,
    validation_rows: int = 0,
    first_row_id: int = 0,
    seq_len: int = SEQ_LEN,
) -> Manifest:
    """Write a prepared folder with `files[i]` rows in file i.

    A row is known by its first token, first_row_id, first_row_id + 1, …; it holds a document of 3
    tokens, one of 2 and padding.
    """
    splits = {}
    for name, sizes in (("train", files), ("validation", [validation_rows])):
        rows = sum(sizes)
        input_ids = np.zeros((rows, seq_len), np.uint16)
        input_ids[:, 0] = first_row_id + np.arange(rows)
        input_ids[:, 1:5] = [7, 0, 8, 0]
        doc_lens = [np.array([3, 2], np.int32)] * rows
        entries, start = [], 0
        for index, size in enumerate(sizes):
            if size:
                chosen = np.arange(start, start + size)
                file = f"{name}/{index:06d}.parquet"
                entries.append(
                    write_rows(
                        folder, file, input_ids, doc_lens, chosen, row_group_rows=row_group_rows
                    )
                )
            start += size
        splits[name] = Split(
            rows=rows,
            tokens=5 * rows,
            documents=2 * rows,
            bytes=10 * rows,
            documents_per_source={"test": 2 * rows},
            utilisation=5 / seq_len,
            split_fraction=0.0,
            files=entries,
        )
    manifest = Manifest(
        seq_len=seq_len,
        tokenizer=TokenizerEntry("a" * 64, 320),
        splits=splits,
        rejected={},
        options={},
    )
    return write_manifest(folder, manifest)
