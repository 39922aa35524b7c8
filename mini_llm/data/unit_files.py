"""What a preparation keeps on disk between its stages, and the shuffle that needs little memory.

A unit is one file of arrays, NAME.bin, and a record, NAME.json, which is written last: a unit that
has a record is whole. The rows of a unit are stored in the order of a random key per row. The final
order is that of the keys of all units, so the rows of any stretch of it are one slice of each unit,
and the result does not depend on how many rows are held at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import complete_or_absent
from .manifest import FileEntry
from .packed_files import write_rows
from .packing import PackedRows


def write_unit(
    folder: Path, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]
) -> None:
    """Write a unit so that it is whole or has no record."""
    record_path = folder / f"{name}.json"
    record_path.unlink(missing_ok=True)  # of an older unit, which its arrays are about to replace
    places = {}
    with complete_or_absent(folder / f"{name}.bin") as file:
        for key, array in arrays.items():
            places[key] = {"at": file.tell(), "dtype": array.dtype.str, "shape": list(array.shape)}
            file.write(np.ascontiguousarray(array).data)
    with complete_or_absent(record_path) as file:
        file.write(json.dumps({**record, "arrays": places}, ensure_ascii=False).encode())


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the record of a unit, None when the unit is not whole."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def remove_unit(folder: Path, name: str) -> None:
    """Remove a unit, its record first."""
    for suffix in (".json", ".bin"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)


def read_array(
    folder: Path, name: str, key: str, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Return the entries start..stop (first axis) of an array of a unit."""
    record = read_record(folder, name)
    assert record is not None
    place = record["arrays"][key]
    dtype, (length, *inner) = np.dtype(place["dtype"]), place["shape"]
    stop = length if stop is None else stop
    size = int(np.prod(inner, dtype=np.int64))
    path = folder / f"{name}.bin"
    entries = np.fromfile(
        path, dtype, (stop - start) * size, offset=place["at"] + start * size * dtype.itemsize
    )
    if len(entries) < (stop - start) * size:
        raise ValueError(f"--output_dir: {path} was cut short; remove it and run again")
    return entries.reshape(stop - start, *inner)


def random_keys(count: int, name: str) -> np.ndarray:
    """Return uint64 [count] that depend on `name` alone, not on the numpy version."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])
    return np.random.PCG64(seed).random_raw(count)


def row_arrays(packed: PackedRows, name: str) -> dict[str, np.ndarray]:
    """Return packed rows as the arrays of a unit, in the order of their random keys."""
    keys = random_keys(packed.stats.rows, name)
    order = np.argsort(keys, kind="stable")
    lengths = [packed.doc_lens[row] for row in order]
    return {
        "keys": keys[order],
        "input_ids": packed.input_ids[order],
        "doc_ends": np.cumsum([len(row) for row in lengths], dtype=np.int64),
        "doc_lens": np.concatenate([np.zeros(0, np.int32), *lengths]),
    }


def write_shuffled(
    output_dir: Path,
    split: str,
    folder: Path,
    units: Sequence[str],
    *,
    rows_per_file: int,
    row_group_rows: int,
    max_rows_in_memory: int,
) -> Iterator[FileEntry]:
    """Write the rows of all `units` as `output_dir`/`split`/*.parquet; yield each file's entry.

    Holds `max_rows_in_memory` rows, at least one file's, and about 28 bytes for every row.
    """
    keys = [read_array(folder, name, "keys") for name in units]
    order = np.argsort(np.concatenate([np.zeros(0, np.uint64), *keys]), kind="stable")
    unit_of_row = np.repeat(np.arange(len(units), dtype=np.int32), [len(k) for k in keys])[order]
    del keys, order
    done_of_unit = np.zeros(len(units), dtype=np.int64)
    rows_at_once = max(max_rows_in_memory // rows_per_file, 1) * rows_per_file
    for first in range(0, len(unit_of_row), rows_at_once):
        units_of_chunk = unit_of_row[first : first + rows_at_once]
        input_ids: np.ndarray | None = None
        doc_lens: list[np.ndarray] = []
        counts = np.bincount(units_of_chunk, minlength=len(units))
        for unit in np.flatnonzero(counts).tolist():
            start, stop = int(done_of_unit[unit]), int(done_of_unit[unit] + counts[unit])
            rows = read_array(folder, units[unit], "input_ids", start, stop)
            if input_ids is None:
                input_ids = np.empty((len(units_of_chunk), rows.shape[1]), rows.dtype)
            input_ids[len(doc_lens) : len(doc_lens) + len(rows)] = rows
            doc_lens += _doc_lens(folder, units[unit], start, stop)
        done_of_unit += counts
        # The chunk was read unit by unit; a unit's rows come in the order of their keys.
        place_of_row = np.empty(len(units_of_chunk), dtype=np.int64)
        place_of_row[np.argsort(units_of_chunk, kind="stable")] = np.arange(len(units_of_chunk))
        assert input_ids is not None
        for offset in range(0, len(place_of_row), rows_per_file):
            yield write_rows(
                output_dir,
                f"{split}/{(first + offset) // rows_per_file:06d}.parquet",
                input_ids,
                doc_lens,
                place_of_row[offset : offset + rows_per_file],
                row_group_rows=row_group_rows,
            )


def _doc_lens(folder: Path, name: str, start: int, stop: int) -> list[np.ndarray]:
    ends = read_array(folder, name, "doc_ends", max(start - 1, 0), stop)
    first = int(ends[0]) if start else 0
    ends = ends[1:] if start else ends
    flat = read_array(folder, name, "doc_lens", first, int(ends[-1]))
    return np.split(flat, ends[:-1] - first)
