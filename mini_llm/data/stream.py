"""An endless, exactly resumable stream of packed rows that is the same for every number of ranks.

Global row g → source by the weights → ordinal within the source → (epoch, row group, row) through a
permutation of the row groups that depends on nothing but seed, source name and epoch. So the whole
state is a few integers: the rows consumed, and how many of them came from each source. A rank takes
a contiguous slice of each step's rows and decodes only the row groups under its slice.

A raw source (`raw_stream.py`) has no rows that could be numbered before they are packed: its place
in the mixture is the same, its rows are the next ones of the rank, and a stream that has one goes
on with as many ranks as it began with.

What stands at a path of --data, `open_data` says: text here, conversations in `sft_stream.py`.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isfinite, lcm
from pathlib import Path
from typing import Any

from .packed_stream import (
    PackedData,
    PackedSource,
    Row,
    open_prepared,
    slice_of_rows,
    validation_rows,
)
from .raw_stream import (
    DocumentFormat,
    Location,
    RawFile,
    RawSource,
    TextDocuments,
    find_raw_files,
    held_out_rows,
)

__all__ = [
    "HeldOut",
    "Row",
    "RowStream",
    "interleave",
    "open_stream",
    "open_validation",
    "validation_rows",
]

STATE_VERSION = 2
ROWS_PER_CHUNK = 64
PREFETCHED_CHUNKS = 4

Source = PackedSource | RawSource


@dataclass(frozen=True)
class RawData:
    """Raw files and what they hold."""

    files: Sequence[RawFile]
    documents: DocumentFormat


@dataclass(frozen=True)
class Entry:
    """A source in the mapping of --data; `config` and `split` are those of a hub data set."""

    name: str
    location: Location
    weight: float
    config: str | None = None
    split: str | None = None


def open_stream(
    data: Mapping[str, Mapping[str, Any]],
    *,
    seq_len: int,
    seed: int,
    rows_per_step: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch: bool = True,
    tokenizer: str | Path | None = None,
) -> RowStream:
    """Open the endless stream of this rank's rows.

    `data` maps a source's name to {"path": prepared folder, "weight": share of the rows}; weights
    are relative. A path may also be raw text, .parquet or .jsonl: a folder, a file or a list of
    files; and each of these may be an `https://` or `hf://` URL. `tokenizer`, a folder, is what raw
    text is tokenised with, and what prepared rows must have been; without it they are not checked.
    The iterator gives rows_per_step / world_size rows for step 0, then as many for step 1, and so
    on; over all ranks the rows of a step are the same set for every world size, raw rows excepted.
    `prefetch` reads ahead in one thread. Raises ValueError or FileNotFoundError, naming the flag,
    for data that is missing or does not fit.
    """

    def open_data(entry: Entry) -> PackedData | RawData:
        return _open_text(entry, seq_len, tokenizer)

    return stream_of(
        parse_data(data),
        open_data,
        seq_len=seq_len,
        seed=seed,
        rows_per_step=rows_per_step,
        rank=rank,
        world_size=world_size,
        prefetch=prefetch,
        tokenizer=tokenizer,
    )


def _open_text(entry: Entry, seq_len: int, tokenizer: str | Path | None) -> PackedData | RawData:
    files = find_raw_files(entry.location)
    if files is not None:
        return RawData(files, TextDocuments(entry.name, tokenizer, seq_len))
    assert not isinstance(entry.location, list)
    return open_prepared(entry.location)


def stream_of(
    entries: Sequence[Entry],
    open_data: Callable[[Entry], PackedData | RawData],
    *,
    seq_len: int,
    seed: int,
    rows_per_step: int,
    rank: int,
    world_size: int,
    prefetch: bool,
    tokenizer: str | Path | None,
) -> RowStream:
    """Return the stream of `open_stream` over what `open_data` finds at every entry of --data."""
    _check_rank(rank, world_size)
    if rows_per_step < 1 or rows_per_step % world_size:
        raise ValueError(
            f"--global_batch_tokens makes {rows_per_step} rows of {seq_len} tokens per step, which "
            f"{world_size} ranks cannot share evenly; give a multiple of {world_size * seq_len}"
        )
    sources: list[Source] = []
    # In the order of their names, so that the order of a YAML file changes nothing.
    entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        found = open_data(entry)
        options: dict[str, Any] = {
            "seq_len": seq_len,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }
        if isinstance(found, RawData):
            sources.append(RawSource(entry.name, found.files, found.documents, **options))
        else:
            sources.append(PackedSource(entry.name, found, tokenizer=tokenizer, **options))
    weights = {entry.name: entry.weight for entry in entries}
    return RowStream(sources, weights, seed, rows_per_step, rank, world_size, prefetch)


class RowStream(Iterator[Row]):
    """Iterator made by `open_stream`; `close()` it, or use it in a `with` block.

    `rows_delivered` and `rows_decoded` count the rows this rank handed out and read,
    `tokens_per_source` the real tokens in the rows it handed out, since the stream was opened;
    `fingerprint` identifies the data.
    """

    def __init__(
        self,
        sources: Sequence[Source],
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
        self.tokens_per_source = {source.name: 0 for source in sources}
        self.fingerprint = _combined_fingerprint(sources)
        self._sources = sources
        self._raw_sources = [source for source in sources if isinstance(source, RawSource)]
        self._weights = weights
        self._prefetch = prefetch
        self._rows_per_rank = rows_per_step // world_size
        self._place = _Place([0] * len(sources), [source.position() for source in sources])
        self._rows_into_step = 0
        self._chunk = _Chunk([], None)
        self._position_in_chunk = 0
        self._chunks: Iterator[_Chunk] | None = None
        self._prefetcher: _Prefetcher | None = None
        self._error: BaseException | None = None
        self._closed = False

    @property
    def state_is_per_rank(self) -> bool:
        """Whether `state_dict` differs between ranks (a raw source), so that each must be kept."""
        return bool(self._raw_sources)

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of all sources in one pass, None where a raw source is among them."""
        packed = [source for source in self._sources if isinstance(source, PackedSource)]
        return None if self._raw_sources else sum(source.rows for source in packed)

    @property
    def rows_decoded(self) -> int:
        """Rows read from disk so far, with those of row groups that were read ahead."""
        return sum(source.rows_decoded for source in self._sources)

    @property
    def rows_per_source(self) -> dict[str, int]:
        """Rows of each source, over all ranks, in the steps that are done."""
        names = (source.name for source in self._sources)
        return dict(zip(names, self._place.counts, strict=True))

    @property
    def rejected_per_source(self) -> dict[str, Counter[str]]:
        """Rows and lines of each raw source this rank has left out since step 0, by reason.

        They count in every epoch, with the thousand documents or so that are read at a time.
        """
        positions = zip(self._sources, self._place.positions, strict=True)
        return {
            source.name: Counter(position["rejected"])
            for source, position in positions
            if position is not None
        }

    def __iter__(self) -> RowStream:
        return self

    def start(self) -> None:
        """Read the first rows, without handing any out: data that has none is found here."""
        if self._closed:
            raise ValueError("the stream was closed")
        if self._position_in_chunk == len(self._chunk.rows):
            self._chunk = self._next_chunk()
            self._position_in_chunk = 0

    def __next__(self) -> Row:
        self.start()
        row = self._chunk.rows[self._position_in_chunk]
        self._position_in_chunk += 1
        self._rows_into_step += 1
        self.rows_delivered += 1
        self.tokens_per_source[row["source"]] += int(row["doc_lens"].sum())
        if self._rows_into_step == self._rows_per_rank:
            assert self._chunk.after_step is not None
            self._place = self._chunk.after_step
            self._rows_into_step = 0
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serialisable state; ValueError inside a step.

        It is the same on every rank and holds nothing of world size or rows per step, so any number
        of ranks continues from it. With a raw source it is this rank's (`state_is_per_rank`).
        """
        if self._rows_into_step:
            raise ValueError(
                f"the stream's state exists between steps only: {self._rows_into_step} of this "
                f"step's {self._rows_per_rank} rows were taken"
            )
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "fingerprint": {source.name: _short(source.fingerprint) for source in self._sources},
            "seed": self.seed,
            "weights": dict(self._weights),
            "rows": sum(self._place.counts),
            "rows_per_source": self.rows_per_source,
        }
        if self._raw_sources:
            names = (source.name for source in self._sources)
            positions = zip(names, self._place.positions, strict=True)
            state["raw"] = {name: position for name, position in positions if position is not None}
            state |= {"rank": self.rank, "world_size": self.world_size}
        return state

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continue from a state, or from the list of all ranks' states, of which it takes its own.

        The state may be of any world size unless there is a raw source. ValueError names the keys
        that differ, or the raw file that changed.
        """
        if not isinstance(state, Mapping):
            self._check_number_of_ranks(len(state))
            state = state[self.rank if self._raw_sources else 0]
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"the stream's state has version {state.get('version')}, this code continues "
                f"version {STATE_VERSION}; start a new run with another --output_dir"
            )
        expected: dict[str, Any] = {
            "fingerprint": {source.name: _short(source.fingerprint) for source in self._sources},
            "seed": self.seed,
            "weights": _integer_weights(self._weights),
        }
        needed = [*expected, "rows", "rows_per_source"]
        needed += ["raw", "rank", "world_size"] if self._raw_sources else []
        missing = [key for key in needed if key not in state]
        if missing:
            raise ValueError(f"the stream's state lacks {', '.join(missing)}")
        found = {key: state[key] for key in expected}
        found["weights"] = _integer_weights(state["weights"])
        differing = [key for key in expected if found[key] != expected[key]]
        if differing:
            details = "; ".join(_difference(k, found[k], expected[k]) for k in differing)
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
        if self._raw_sources:
            self._check_number_of_ranks(state["world_size"])
            if state["rank"] != self.rank:
                raise ValueError(
                    f"the stream's state is of rank {state['rank']}, this is rank {self.rank}; give"
                    " every rank its own or all of them the list"
                )
        self._stop_reading()
        try:
            for source in self._raw_sources:
                source.seek(state["raw"][source.name])
        except Exception:
            self.close()  # its place is lost
            raise
        self._place = _Place(counts, [source.position() for source in self._sources])
        self._rows_into_step = 0
        self._chunk = _Chunk([], None)
        self._position_in_chunk = 0
        self._error = None

    def close(self) -> None:
        """Stop reading; the prefetch thread has ended when this returns. May be called again."""
        self._stop_reading()
        self._closed = True

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _check_number_of_ranks(self, world_size: int) -> None:
        if self._raw_sources and world_size != self.world_size:
            names = ", ".join(source.name for source in self._raw_sources)
            documents = self._raw_sources[0].documents
            raise ValueError(
                f"the stream's state is of {world_size} ranks, this run has {self.world_size}, and "
                f"raw {documents.noun} ({names}) goes on only with as many as before; start "
                f"{world_size} ranks or, for any number, prepare packed shards with "
                f"{documents.preparation}"
            )

    def _next_chunk(self) -> _Chunk:
        if self._error is not None:
            raise self._error
        if self._chunks is None:
            self._chunks = _read_chunks(
                self._sources,
                list(_integer_weights(self._weights).values()),
                list(self._place.counts),
                self.rows_per_step,
                self.rank,
                self.world_size,
                # A rank's slice moves from step to step, in a way that fits no pattern of the
                # mixture: otherwise one rank could get all rows of a source.
                rotation=f"{self.seed}" if self._raw_sources else None,
            )
            if self._prefetch:
                self._chunks = self._prefetcher = _Prefetcher(self._chunks)
                # The thread knows the generator but not this object: a stream that is dropped
                # without close() is collected, and that ends its thread.
                weakref.finalize(self, self._prefetcher.close)
        try:
            return next(self._chunks)
        except BaseException as error:
            # Kept, because a generator that raised would end the stream without a word.
            self._error = error
            raise

    def _stop_reading(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = self._chunks = None


@dataclass(frozen=True)
class HeldOut:
    """One source's validation rows: `rows` are this rank's, `total` those of all ranks."""

    total: int
    rows: list[Row]


def open_validation(
    data: Mapping[str, Mapping[str, Any]],
    *,
    seq_len: int,
    max_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: str | Path | None = None,
) -> dict[str, HeldOut]:
    """Return this rank's contiguous slice of the first `max_rows` held-out rows of every source.

    `data` and `tokenizer` are those of `open_stream`. Ranks may get one row more or less than
    others. A raw source needs `max_rows`, because its held-out documents are spread over all its
    files.
    """

    def open_data(entry: Entry) -> PackedData | RawData:
        return _open_text(entry, seq_len, tokenizer)

    return validation_of(
        parse_data(data),
        open_data,
        seq_len=seq_len,
        max_rows=max_rows,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
    )


def validation_of(
    entries: Sequence[Entry],
    open_data: Callable[[Entry], PackedData | RawData],
    *,
    seq_len: int,
    max_rows: int | None,
    rank: int,
    world_size: int,
    tokenizer: str | Path | None,
) -> dict[str, HeldOut]:
    """Return what `open_validation` does for what `open_data` finds at every entry of --data."""
    _check_rank(rank, world_size)
    held_out = {}
    for entry in entries:
        found = open_data(entry)
        if isinstance(found, RawData):
            rows = held_out_rows(
                entry.name, found.files, found.documents, seq_len=seq_len, max_rows=max_rows
            )
            total = len(rows)
            rows = rows[rank * total // world_size : (rank + 1) * total // world_size]
        else:
            found.check_fit(entry.name, seq_len=seq_len, tokenizer=tokenizer)
            total, mine = slice_of_rows(found, entry.name, rank, world_size, max_rows)
            rows = list(mine)
        held_out[entry.name] = HeldOut(total, rows)
    return held_out


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
class _Place:
    """Where the stream is between two steps: every source's count, and a raw one's position."""

    counts: list[int]
    positions: list[dict[str, Any] | None]


@dataclass(frozen=True)
class _Chunk:
    """Rows in order; the last chunk of a step carries the place after that step."""

    rows: list[Row]
    after_step: _Place | None


def _read_chunks(
    sources: Sequence[Source],
    weights: list[int],
    counts: list[int],
    rows_per_step: int,
    rank: int,
    world_size: int,
    rotation: str | None,
) -> Iterator[_Chunk]:
    """Yield this rank's slice of the rows of every step; chunks end with the step."""
    rows_per_rank = rows_per_step // world_size
    while True:
        slice_of_rank = rank
        if rotation is not None:
            digest = hashlib.sha256(f"{rotation}/{sum(counts)}".encode()).digest()
            slice_of_rank = (rank + int.from_bytes(digest[:8])) % world_size
        before = list(counts)
        picks, ordinals = interleave(weights, counts, rows_per_step)
        first = slice_of_rank * rows_per_rank
        end = first + rows_per_rank
        for pick, ordinal in dict(zip(picks[first:end], ordinals[first:end], strict=True)).items():
            sources[pick].read_ahead(ordinal, counts[pick] - before[pick])
        for start in range(first, end, ROWS_PER_CHUNK):
            stop = min(start + ROWS_PER_CHUNK, end)
            rows: list[Row] = []
            try:
                for i in range(start, stop):
                    rows.append(sources[picks[i]].row(ordinals[i]))
            except Exception:
                if rows:  # the consumer gets them before the error
                    yield _Chunk(rows, None)
                raise
            positions = [source.position() for source in sources]
            yield _Chunk(rows, _Place(list(counts), positions) if stop == end else None)


class _Prefetcher(Iterator[_Chunk]):
    """Runs an iterator in one thread, a few chunks ahead; what it raises is raised here, once."""

    def __init__(self, chunks: Iterator[_Chunk]) -> None:
        self._queue: queue.Queue[_Chunk | BaseException] = queue.Queue(PREFETCHED_CHUNKS)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill_queue,
            args=(chunks, self._queue, self._stop),
            name="mini_llm-stream",
            daemon=True,
        )
        self._thread.start()

    def __next__(self) -> _Chunk:
        item = self._queue.get()
        if isinstance(item, _Chunk):
            return item
        raise item

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


def _check_rank(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in 0..world_size-1 (world_size {world_size})")


def parse_data(
    data: Mapping[str, Mapping[str, Any]], *, hub_keys: Sequence[str] = ()
) -> list[Entry]:
    """Return the entries of --data; ValueError names what is malformed.

    `hub_keys` are those of `Entry.config` and `Entry.split`, where they are allowed.
    """
    if not data:
        raise ValueError('--data is empty; give {"name": {"path": "folder", "weight": 1.0}}')
    entries = []
    for name, entry in data.items():
        if not isinstance(entry, Mapping) or not entry.get("path"):
            raise ValueError(f'--data: {name} needs a path: {{"path": "folder", "weight": 1.0}}')
        keys = ["path", "weight", *hub_keys]
        unknown = sorted(set(entry) - set(keys))
        if unknown:
            raise ValueError(
                f"--data: {name} has {', '.join(unknown)}; it takes {', '.join(keys[:-1])} and "
                f"{keys[-1]}"
            )
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"--data: the weight of {name} is {weight!r}; give a number")
        if not isfinite(weight) or weight <= 0:
            raise ValueError(f"--data: the weight of {name} is {weight}; it must be above 0")
        path = entry["path"]
        location = [str(p) for p in path] if isinstance(path, list | tuple) else str(path)
        of_hub = {key: None if entry.get(key) is None else str(entry[key]) for key in hub_keys}
        entries.append(Entry(name, location, float(weight), **of_hub))
    return entries


def _integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest integers in the same proportions: exact arithmetic, no drift."""
    fractions = {name: Fraction(str(weights[name])) for name in sorted(weights)}
    scale = lcm(*(fraction.denominator for fraction in fractions.values()))
    integers = {name: int(fraction * scale) for name, fraction in fractions.items()}
    common = gcd(*integers.values())
    return {name: value // common for name, value in integers.items()}


def _combined_fingerprint(sources: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}={source.fingerprint}\n".encode())
    return digest.hexdigest()


def _short(fingerprint: str) -> str:
    return fingerprint[:16]


def _difference(key: str, there: Any, here: Any) -> str:
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        return f"{key}: {there} there, {here} here"
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    each = (f"'{name}' {there.get(name)} there, {here.get(name)} here" for name in names)
    return f"{key}: {', '.join(each)}"
