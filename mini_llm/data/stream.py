"""An endless, exactly resumable stream of packed rows that is the same for every number of ranks.

Global row g → source by the weights → ordinal within the source → (epoch, row group, row) through a
permutation of the row groups that depends on nothing but seed, source name and epoch. So the whole
state is a few integers: the rows consumed, and how many of them came from each source.

A rank takes a contiguous slice of each step's rows and decodes only the row groups under its slice.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isfinite, lcm
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from datasets import load_dataset

from .manifest import TRAIN, VALIDATION, FileEntry, Manifest, Split, check_seq_len, load_manifest

STATE_VERSION = 1
ROWS_PER_CHUNK = 64
PREFETCHED_CHUNKS = 4
# A rank reads its source front to back, so one row group is in use and the next one starts.
CACHED_ROW_GROUPS = 2
CACHED_FILES = 4


class Row(TypedDict):
    """A packed row: `input_ids` [seq_len] uint16 or uint32, `doc_lens` int32, and its source."""

    input_ids: np.ndarray
    doc_lens: np.ndarray
    source: str


def open_stream(
    data: Mapping[str, Mapping[str, Any]],
    *,
    seq_len: int,
    seed: int,
    rows_per_step: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch: bool = True,
) -> RowStream:
    """Open the endless stream of this rank's rows.

    `data` maps a source's name to {"path": prepared folder, "weight": share of the rows}; weights
    are relative. The iterator gives rows_per_step / world_size rows for step 0, then as many for
    step 1, and so on; over all ranks the rows of a step are the same set for every world size.
    `prefetch` reads ahead in one thread. Raises ValueError or FileNotFoundError, naming the flag,
    for data that is missing or does not fit.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in 0..world_size-1 (world_size {world_size})")
    if rows_per_step < 1 or rows_per_step % world_size:
        raise ValueError(
            f"--global_batch_tokens makes {rows_per_step} rows of {seq_len} tokens per step, which "
            f"{world_size} ranks cannot share evenly; give a multiple of {world_size * seq_len}"
        )
    sources, weights = [], {}
    # In the order of their names, so that the order of a YAML file changes nothing.
    for name, path, weight in sorted(_parse_data(data)):
        manifest = load_manifest(path)
        check_seq_len(manifest, name=name, seq_len=seq_len)
        sources.append(PackedSource(name, path, manifest, seed))
        weights[name] = weight
    return RowStream(sources, weights, seed, rows_per_step, rank, world_size, prefetch)


class RowStream(Iterator[Row]):
    """Iterator made by `open_stream`; `close()` it, or use it in a `with` block.

    `rows_delivered` and `rows_decoded` count the rows this rank handed out and read; `fingerprint`
    identifies the data.
    """

    def __init__(
        self,
        sources: list[PackedSource],
        weights: dict[str, float],
        seed: int,
        rows_per_step: int,
        rank: int,
        world_size: int,
        prefetch: bool,
    ) -> None:
        self.seed = seed
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.world_size = world_size
        self.rows_delivered = 0
        self.fingerprint = _combined_fingerprint(sources)
        self._sources = sources
        self._weights = weights
        self._prefetch = prefetch
        self._rows_per_rank = rows_per_step // world_size
        self._counts = [0] * len(sources)
        self._rows_into_step = 0
        self._chunk = _Chunk([], None)
        self._position_in_chunk = 0
        self._chunks: Iterator[_Chunk] | None = None
        self._prefetcher: _Prefetcher | None = None
        self._closed = False

    @property
    def rows_decoded(self) -> int:
        """Rows read from disk so far, with those of row groups that were read ahead."""
        return sum(source.reader.rows_decoded for source in self._sources)

    @property
    def rows_per_source(self) -> dict[str, int]:
        """Rows of each source, over all ranks, in the steps that are done."""
        names = (source.name for source in self._sources)
        return dict(zip(names, self._counts, strict=True))

    def __iter__(self) -> RowStream:
        return self

    def __next__(self) -> Row:
        if self._closed:
            raise ValueError("the stream was closed")
        if self._position_in_chunk == len(self._chunk.rows):
            self._chunk = self._next_chunk()
            self._position_in_chunk = 0
        row = self._chunk.rows[self._position_in_chunk]
        self._position_in_chunk += 1
        self._rows_into_step += 1
        self.rows_delivered += 1
        if self._rows_into_step == self._rows_per_rank:
            assert self._chunk.counts_after_step is not None
            self._counts = self._chunk.counts_after_step
            self._rows_into_step = 0
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serialisable state, the same on every rank; ValueError inside a step.

        It holds nothing of world size or rows per step: any number of ranks continues from it.
        """
        if self._rows_into_step:
            raise ValueError(
                f"the stream's state exists between steps only: {self._rows_into_step} of this "
                f"step's {self._rows_per_rank} rows were taken"
            )
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "weights": dict(self._weights),
            "rows": sum(self._counts),
            "rows_per_source": self.rows_per_source,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of any world size; ValueError names the keys that differ."""
        expected = {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "weights": _integer_weights(self._weights),
        }
        missing = [key for key in (*expected, "rows", "rows_per_source") if key not in state]
        if missing:
            raise ValueError(f"the stream's state lacks {', '.join(missing)}")
        found = {key: state[key] for key in expected}
        found["weights"] = _integer_weights(state["weights"])
        differing = [key for key in expected if found[key] != expected[key]]
        if differing:
            details = "; ".join(f"{k}: {found[k]} there, {expected[k]} here" for k in differing)
            raise ValueError(
                f"the stream's state is of other data or settings ({details}); continue with the "
                "same --data and --seed or start a new run with another --output_dir"
            )
        counts = [int(state["rows_per_source"][source.name]) for source in self._sources]
        if sum(counts) != state["rows"]:
            raise ValueError(
                f"the stream's state is damaged: rows is {state['rows']} but rows_per_source sums "
                f"to {sum(counts)}"
            )
        self._stop_reading()
        self._counts = counts
        self._rows_into_step = 0
        self._chunk = _Chunk([], None)
        self._position_in_chunk = 0

    def close(self) -> None:
        """Stop reading; the prefetch thread has ended when this returns. May be called again."""
        self._stop_reading()
        self._closed = True

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _next_chunk(self) -> _Chunk:
        if self._chunks is None:
            self._chunks = _read_chunks(
                self._sources,
                list(_integer_weights(self._weights).values()),
                list(self._counts),
                self.rows_per_step,
                first_row=self.rank * self._rows_per_rank,
                num_rows=self._rows_per_rank,
            )
            if self._prefetch:
                self._chunks = self._prefetcher = _Prefetcher(self._chunks)
                # The thread knows the generator but not this object: a stream that is dropped
                # without close() is collected, and that ends its thread.
                weakref.finalize(self, self._prefetcher.close)
        return next(self._chunks)

    def _stop_reading(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = self._chunks = None


def validation_rows(
    folder: str | Path, *, rank: int = 0, world_size: int = 1, max_rows: int | None = None
) -> Iterator[Row]:
    """Iterate over this rank's contiguous slice of the first `max_rows` held-out rows, in order.

    All rows together are those of one rank, but ranks may get unequal counts, even none: a caller
    whose ranks must step together pads to ceil(rows / world_size). `source` is the folder's name.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in 0..world_size-1 (world_size {world_size})")
    folder = Path(folder)
    manifest = load_manifest(folder)
    split = manifest.splits[VALIDATION]
    total = split.rows if max_rows is None else min(max_rows, split.rows)
    first, end = rank * total // world_size, (rank + 1) * total // world_size
    reader = RowGroupReader(folder, split, manifest.seq_len)
    return _rows_between(reader, folder.name, first, end)


def _rows_between(reader: RowGroupReader, name: str, first: int, end: int) -> Iterator[Row]:
    for unit, start in enumerate(reader.unit_starts):
        for row in range(max(first, start), min(end, start + reader.unit_rows[unit])):
            yield reader.row(unit, row - start, name)


class PackedSource:
    """One prepared folder, whose `train` rows are addressed by an ordinal 0, 1, 2, … without end.

    Every epoch visits each row once: row groups in an order drawn from (seed, name, epoch), the
    rows of a group as they are on disk, where the preparation has shuffled them.
    """

    def __init__(self, name: str, folder: Path, manifest: Manifest, seed: int) -> None:
        split = manifest.splits[TRAIN]
        if not split.rows:
            raise ValueError(f"--data: {folder} has no training rows; prepare it from more text")
        self.name = name
        self.fingerprint = manifest.fingerprint
        self.reader = RowGroupReader(folder, split, manifest.seq_len)
        self._seed = seed
        self._rows = split.rows
        self._epoch = -1
        self._order: list[int] = []
        self._starts: list[int] = []

    def row(self, ordinal: int) -> Row:
        """Return the row with this ordinal."""
        epoch, position = divmod(ordinal, self._rows)
        if epoch != self._epoch:
            self._order = self._order_of_epoch(epoch)
            rows = np.array([self.reader.unit_rows[unit] for unit in self._order])
            self._starts = (np.cumsum(rows) - rows).tolist()
            self._epoch = epoch
        place = bisect_right(self._starts, position) - 1
        return self.reader.row(self._order[place], position - self._starts[place], self.name)

    def _order_of_epoch(self, epoch: int) -> list[int]:
        # The raw output of a bit generator and SHA-256 never change; Generator.permutation may
        # with the numpy version, and then a run would not resume.
        digest = hashlib.sha256(f"{self._seed}/{self.name}/{epoch}".encode()).digest()
        keys = np.random.PCG64(int.from_bytes(digest[:16])).random_raw(len(self.reader.unit_rows))
        return np.argsort(keys, kind="stable").tolist()


class RowGroupReader:
    """Random access to the rows of a split by unit, which is one row group of one file.

    Units are numbered in manifest order; `unit_rows` and `unit_starts` are their sizes and first
    rows. `rows_decoded` counts what was read. Raises FileNotFoundError or ValueError when the
    files are not those of the manifest.
    """

    def __init__(self, folder: Path, split: Split, seq_len: int) -> None:
        self._folder = folder
        self._seq_len = seq_len
        self._units: list[tuple[FileEntry, int]] = []
        self.unit_rows: list[int] = []
        for entry in split.files:
            _check_file(folder, entry)
            for row_group, rows in enumerate(entry.row_groups):
                if rows:  # datasets makes a shard of an empty row group but no table
                    self._units.append((entry, row_group))
                    self.unit_rows.append(rows)
        self.unit_starts: list[int] = [0, *np.cumsum(self.unit_rows).tolist()[:-1]]
        if sum(self.unit_rows) != split.rows:
            raise ValueError(
                f"--data: the row groups in the manifest of {folder} hold {sum(self.unit_rows)} "
                f"rows, not {split.rows}; prepare the folder again"
            )
        self.rows_decoded = 0
        self._decoded: OrderedDict[int, _RowGroup] = OrderedDict()
        self._open_files: OrderedDict[str, Any] = OrderedDict()

    def row(self, unit: int, index: int, source: str) -> Row:
        """Return row `index` of a unit as views of the decoded Arrow buffers."""
        if unit not in self._decoded:
            self._decoded[unit] = self._decode(unit)
            if len(self._decoded) > CACHED_ROW_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(unit)
        group = self._decoded[unit]
        doc_lens = group.doc_lens[group.doc_offsets[index] : group.doc_offsets[index + 1]]
        return Row(input_ids=group.input_ids[index], doc_lens=doc_lens, source=source)

    def _decode(self, unit: int) -> _RowGroup:
        entry, row_group = self._units[unit]
        shards = self._row_groups_of(entry)
        shard = shards.shard(num_shards=shards.num_shards, index=row_group)
        table = pa.concat_tables(list(shard.iter(batch_size=self.unit_rows[unit])))
        if table.num_rows != self.unit_rows[unit]:
            raise ValueError(
                f"--data: row group {row_group} of {self._folder / entry.file} has "
                f"{table.num_rows} rows, the manifest says {self.unit_rows[unit]}; the file was "
                "changed: prepare the folder again"
            )
        self.rows_decoded += table.num_rows
        input_ids = table.column("input_ids").combine_chunks()
        doc_lens = table.column("doc_lens").combine_chunks()
        offsets = doc_lens.offsets.to_numpy()
        return _RowGroup(
            input_ids.flatten().to_numpy(zero_copy_only=True).reshape(-1, self._seq_len),
            doc_lens.flatten().to_numpy(zero_copy_only=True),
            (offsets - offsets[0]).tolist(),
        )

    def _row_groups_of(self, entry: FileEntry) -> Any:
        """Return a streaming dataset of one file in which every row group is a shard."""
        if entry.file not in self._open_files:
            path = self._folder / entry.file
            shards = load_dataset(
                "parquet",
                data_files=[str(path)],
                split="train",
                streaming=True,
                columns=["input_ids", "doc_lens"],
            )
            # One shard per row group instead of one per file.
            shards = shards.reshard().with_format("arrow")
            if shards.num_shards != len(entry.row_groups):
                raise ValueError(
                    f"--data: {path} has {shards.num_shards} row groups, the manifest says "
                    f"{len(entry.row_groups)}; the file was changed: prepare the folder again"
                )
            self._open_files[entry.file] = shards
            if len(self._open_files) > CACHED_FILES:
                self._open_files.popitem(last=False)
        self._open_files.move_to_end(entry.file)
        return self._open_files[entry.file]


def interleave(weights: list[int], counts: list[int], num_rows: int) -> tuple[list[int], list[int]]:
    """Continue the mixture after `counts` rows of each source by `num_rows` rows.

    Returns the source of each row and its ordinal within the source. At every prefix of t rows
    each source has been picked w·t ± 1 times, strictly: a row of a source is due once the source
    lags behind its share, must come before it lags by one, and the row with the earliest such
    deadline comes first (Baruah et al. 1996, "Proportionate progress"). `counts` is updated.
    """
    total_weight = sum(weights)
    sources, ordinals = [], []
    done = sum(counts)
    for row in range(done + 1, done + num_rows + 1):
        _, chosen = min(
            (-(-(count + 1) * total_weight // weight), source)
            for source, (weight, count) in enumerate(zip(weights, counts, strict=True))
            if weight * row > count * total_weight
        )
        sources.append(chosen)
        ordinals.append(counts[chosen])
        counts[chosen] += 1
    return sources, ordinals


@dataclass(frozen=True)
class _RowGroup:
    input_ids: np.ndarray  # [rows, seq_len]
    doc_lens: np.ndarray  # [documents of all rows]
    doc_offsets: list[int]  # [rows + 1]


@dataclass(frozen=True)
class _Chunk:
    """Rows in order; the last chunk of a step carries each source's count after that step."""

    rows: list[Row]
    counts_after_step: list[int] | None


def _read_chunks(
    sources: list[PackedSource],
    weights: list[int],
    counts: list[int],
    rows_per_step: int,
    first_row: int,
    num_rows: int,
) -> Iterator[_Chunk]:
    """Yield num_rows rows of every step, from its row first_row on; chunks end with the step."""
    end = first_row + num_rows
    while True:
        picks, ordinals = interleave(weights, counts, rows_per_step)
        for start in range(first_row, end, ROWS_PER_CHUNK):
            stop = min(start + ROWS_PER_CHUNK, end)
            rows = [sources[picks[i]].row(ordinals[i]) for i in range(start, stop)]
            yield _Chunk(rows, list(counts) if stop == end else None)


class _Prefetcher(Iterator[_Chunk]):
    """Runs an iterator in one thread, a few chunks ahead; an exception there is raised here."""

    def __init__(self, chunks: Iterator[_Chunk]) -> None:
        self._queue: queue.Queue[_Chunk | BaseException] = queue.Queue(PREFETCHED_CHUNKS)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=_fill_queue,
            args=(chunks, self._queue, self._stop),
            name="mini_llm-stream",
            daemon=True,
        )
        self._thread.start()

    def __next__(self) -> _Chunk:
        if self._error is None:
            item = self._queue.get()
            if isinstance(item, _Chunk):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        while not self._queue.empty():  # the thread may be waiting for a free place
            self._queue.get_nowait()
        # Garbage collection may run the finalizer of a dropped stream in the thread itself.
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _fill_queue(
    chunks: Iterator[_Chunk],
    into: queue.Queue[_Chunk | BaseException],
    stop: threading.Event,
) -> None:
    try:
        for chunk in chunks:
            into.put(chunk)
            if stop.is_set():
                return
    except BaseException as error:  # handed to the consumer, which raises it
        into.put(error)


def _parse_data(data: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Path, float]]:
    if not data:
        raise ValueError('--data is empty; give {"name": {"path": "folder", "weight": 1.0}}')
    for name, entry in data.items():
        if not isinstance(entry, Mapping) or "path" not in entry:
            raise ValueError(f'--data: {name} needs a path: {{"path": "folder", "weight": 1.0}}')
        unknown = sorted(set(entry) - {"path", "weight"})
        if unknown:
            raise ValueError(f"--data: {name} has {', '.join(unknown)}; it takes path and weight")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"--data: the weight of {name} is {weight!r}; give a number")
        if not isfinite(weight) or weight <= 0:
            raise ValueError(f"--data: the weight of {name} is {weight}; it must be above 0")
        yield name, Path(entry["path"]), float(weight)


def _integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest integers in the same proportions: exact arithmetic, no drift."""
    fractions = {name: Fraction(str(weights[name])) for name in sorted(weights)}
    scale = lcm(*(fraction.denominator for fraction in fractions.values()))
    integers = {name: int(fraction * scale) for name, fraction in fractions.items()}
    common = gcd(*integers.values())
    return {name: value // common for name, value in integers.items()}


def _combined_fingerprint(sources: list[PackedSource]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}={source.fingerprint}\n".encode())
    return digest.hexdigest()


def _check_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.file
    if not path.is_file():
        raise FileNotFoundError(f"--data: {path} is missing; prepare the folder again")
    size = path.stat().st_size
    if size != entry.bytes_on_disk:
        raise ValueError(
            f"--data: {path} has {size} bytes, the manifest says {entry.bytes_on_disk}; the file "
            "was changed: prepare the folder again"
        )
