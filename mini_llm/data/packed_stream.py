"""Packed rows on disk as sources of the stream: any row by its number, every epoch in a new order.

The rows are those of a prepared folder, of text or of conversations, or of ready-made files
(`ready_made.py`).

A shard is checked before its first row is used: that it is there with the manifest's size when the
stream opens, its sha256 when it is first read, and that it is still the same file at every later
read.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import pyarrow as pa
from datasets import IterableDataset

from .manifest import (
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    FileEntry,
    Manifest,
    check_manifest,
    check_seq_len,
    load_manifest,
)
from .sft_files import SftManifest, load_sft_manifest
from .shard_cache import ShardCache, file_sha256, is_remote
from .tokenizer import tokenizer_fingerprint

# A rank reads its source front to back, so one row group is in use and the next one starts.
CACHED_ROW_GROUPS = 2
CACHED_FILES = 4
# sha256 reads a whole shard (1.8 GB/s: 36 ms for 64 MB). Every rank of a small run pays that; in a
# large one, where a rank reads little of each shard, so many ranks share each shard's check.
HASHING_RANKS = 8
STEPS_AHEAD = 8


class Row(TypedDict):
    """A packed row: `input_ids` [seq_len] uint16 or uint32, `doc_lens` int32, and its source.

    Rows of conversations have a `loss_mask`, bool [seq_len]: whether a token is supervised. Rows
    of text that was tokenised to be evaluated have `token_bytes`, int32 [seq_len]: the UTF-8 bytes
    of the text that each token stands for.
    """

    input_ids: np.ndarray
    doc_lens: np.ndarray
    source: str
    loss_mask: NotRequired[np.ndarray]
    token_bytes: NotRequired[np.ndarray]


class PackedData(Protocol):
    """Rows on disk with a number each: a `PreparedFolder` or `ReadyMadeFiles`."""

    @property
    def fingerprint(self) -> str:
        """The sha256 of what decides over the rows."""

    @property
    def location(self) -> str:
        """The path or URL of --data."""

    def check_fit(self, name: str, *, seq_len: int, tokenizer: str | Path | None) -> None:
        """Raise ValueError, naming the flag, when the rows of data source `name` do not fit."""

    def reader(self, split: str, *, rank: int = 0, world_size: int = 1) -> RowGroupReader:
        """Return the rows of a split; all ranks together check the files that they read."""


class PackedSource:
    """The `train` rows of packed data, addressed by an ordinal 0, 1, 2, … without end.

    Every epoch visits each row once: files in an order drawn from (seed, name, epoch), the row
    groups of a file likewise, the rows of a group as they are on disk, where the preparation has
    shuffled them. File by file, so that a remote shard is fetched once and its neighbours ahead.
    """

    def __init__(
        self,
        name: str,
        data: PackedData,
        *,
        seq_len: int,
        seed: int,
        tokenizer: str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        data.check_fit(name, seq_len=seq_len, tokenizer=tokenizer)
        self.name = name
        self.fingerprint = data.fingerprint
        self.reader = data.reader(TRAIN, rank=rank, world_size=world_size)
        self.rows = self.reader.rows
        if not self.rows:
            raise ValueError(
                f"--data: {data.location} has no training rows; prepare it from more text"
            )
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self._starts: list[int] = []

    @property
    def rows_decoded(self) -> int:
        """Rows read from disk so far, with those of row groups that were read ahead."""
        return self.reader.rows_decoded

    def row(self, ordinal: int) -> Row:
        """Return the row with this ordinal."""
        unit, index = self._place(ordinal)
        return self.reader.row(unit, index, self.name)

    def read_ahead(self, ordinal: int, ordinals_per_step: int) -> None:
        """Fetch the next remote shard that the steps after `ordinal` need, in the background."""
        if not self.reader.files.remote:
            return
        here = self.reader.entry_of(self._place(ordinal)[0])
        for step in range(1, STEPS_AHEAD + 1):
            # Beyond the epoch the order is another; the step that enters it asks again.
            ahead = ordinal + step * ordinals_per_step
            if ahead // self.rows != ordinal // self.rows:
                return
            entry = self.reader.entry_of(self._place(ahead)[0])
            if entry != here:
                self.reader.files.fetch_in_background(entry)
                return

    def position(self) -> None:
        """Nothing: the ordinals are all there is to a packed source's place."""

    def _place(self, ordinal: int) -> tuple[int, int]:
        epoch, position = divmod(ordinal, self.rows)
        if epoch != self._epoch:
            self._order = self._order_of_epoch(epoch)
            rows = np.array([self.reader.unit_rows[unit] for unit in self._order])
            self._starts = (np.cumsum(rows) - rows).tolist()
            self._epoch = epoch
        place = bisect_right(self._starts, position) - 1
        return self._order[place], position - self._starts[place]

    def _order_of_epoch(self, epoch: int) -> list[int]:
        file_of_unit = np.array(self.reader.unit_files)
        # The raw output of a bit generator and SHA-256 never change; Generator.permutation may
        # with the numpy version, and then a run would not resume.
        digest = hashlib.sha256(f"{self._seed}/{self.name}/{epoch}".encode()).digest()
        generator = np.random.PCG64(int.from_bytes(digest[:16]))
        file_keys = generator.random_raw(int(file_of_unit.max()) + 1)
        unit_keys = generator.random_raw(len(file_of_unit))
        return np.lexsort((unit_keys, file_of_unit, file_keys[file_of_unit])).tolist()


def validation_rows(
    folder: str | Path, *, rank: int = 0, world_size: int = 1, max_rows: int | None = None
) -> Iterator[Row]:
    """Iterate over this rank's contiguous slice of the first `max_rows` held-out rows, in order.

    `folder` is a prepared folder or its URL. All rows together are those of one rank, but ranks may
    get unequal counts, even none: a caller whose ranks must step together pads to
    ceil(rows / world_size). `source` is the folder's name.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in 0..world_size-1 (world_size {world_size})")
    name = str(folder).rstrip("/").rsplit("/", 1)[-1]
    return slice_of_rows(open_prepared(folder), name, rank, world_size, max_rows)[1]


def slice_of_rows(
    data: PackedData, name: str, rank: int, world_size: int, max_rows: int | None
) -> tuple[int, Iterator[Row]]:
    """Return how many held-out rows all ranks read, and an iterator over this rank's of them."""
    # Each rank hashes what it reads: the split is small.
    reader = data.reader(VALIDATION)
    total = reader.rows if max_rows is None else min(max_rows, reader.rows)
    first, end = rank * total // world_size, (rank + 1) * total // world_size
    return total, (reader.row_at(number, name) for number in range(first, end))


@dataclass(frozen=True)
class PreparedFolder:
    """A prepared folder: the local folder of its files, its manifest, its cache if it is remote."""

    location: str
    folder: Path
    manifest: Manifest | SftManifest
    cache: ShardCache | None

    @property
    def fingerprint(self) -> str:
        """Of its manifest."""
        return self.manifest.fingerprint

    def check_fit(self, name: str, *, seq_len: int, tokenizer: str | Path | None) -> None:
        """Raise ValueError, naming the flag, when the rows of data source `name` do not fit.

        Without `tokenizer`, a folder, its fingerprint is not compared.
        """
        if tokenizer is None:
            return check_seq_len(self.manifest, name=name, seq_len=seq_len)
        fingerprint = tokenizer_fingerprint(tokenizer)
        check_manifest(self.manifest, name=name, tokenizer_fingerprint=fingerprint, seq_len=seq_len)

    def reader(self, split: str, *, rank: int = 0, world_size: int = 1) -> RowGroupReader:
        """Return the rows of a split; all ranks together check the files that they read."""
        entries, rows = self.manifest.splits[split].files, self.manifest.splits[split].rows
        files = ShardFiles(self.folder, entries, self.cache, rank, world_size)
        reader = RowGroupReader(
            files, self.manifest.seq_len, has_loss_mask=isinstance(self.manifest, SftManifest)
        )
        if reader.rows != rows:
            raise ValueError(
                f"--data: the row groups in the manifest of {self.folder} hold {reader.rows} rows, "
                f"not {rows}; prepare the folder again"
            )
        return reader


def open_prepared(location: str | Path, *, of_conversations: bool = False) -> PreparedFolder:
    """Read the manifest of a prepared folder, or of its URL: of text or of conversations.

    A remote one is fetched each time, because it says which files there are valid.
    """
    folder, cache = Path(location), None
    if is_remote(location):
        cache = ShardCache(str(location))
        cache.fetch(MANIFEST_NAME, refresh=True)
        folder = cache.folder
    manifest = load_sft_manifest(folder) if of_conversations else load_manifest(folder)
    return PreparedFolder(str(location), folder, manifest, cache)


class ShardFiles:
    """Files of packed rows, fetched if they are remote.

    What is not the file of its entry is refused; an entry without sha256 has only its size.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[FileEntry],
        cache: ShardCache | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.folder = folder
        self.entries = entries
        self.remote = cache is not None
        self._cache = cache
        self._identities: dict[str, tuple[int, int, int]] = {}
        self._unverified: set[str] = set()
        groups = -(-world_size // HASHING_RANKS)
        for index, entry in enumerate(entries):
            if cache is not None:  # which checks what it fetches and what it has
                continue
            self._identities[entry.file] = _checked_identity(folder / entry.file, entry)
            if entry.sha256 and index % groups == rank // HASHING_RANKS:
                self._unverified.add(entry.file)

    def path(self, entry: FileEntry) -> Path:
        """Return the local path of a file, checked; FileNotFoundError or ValueError names it."""
        path = self.folder / entry.file
        if self._cache is not None and entry.file not in self._identities:
            self._cache.fetch(entry.file, size=entry.bytes_on_disk, sha256=entry.sha256)
            self._identities[entry.file] = _checked_identity(path, entry)
        try:
            identity = file_identity(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--data: {path} was deleted during the run; put it back and resume"
            ) from None
        if identity != self._identities[entry.file]:
            raise ValueError(
                f"--data: {path} was replaced during the run; put back the file that was there, "
                "or start a new run with another --output_dir"
            )
        if entry.file in self._unverified:
            sha256 = file_sha256(path)
            if sha256 != entry.sha256:
                raise ValueError(
                    f"--data: {path} is not the file of its manifest (sha256 {sha256[:12]}, the "
                    f"manifest says {entry.sha256[:12]}); it was replaced or damaged: prepare the "
                    "folder again"
                )
            self._unverified.remove(entry.file)
        return path

    def fetch_in_background(self, entry: FileEntry) -> None:
        """Start to fetch a remote file."""
        if self._cache is not None and entry.file not in self._identities:
            self._cache.fetch_in_background(
                entry.file, size=entry.bytes_on_disk, sha256=entry.sha256
            )


def file_identity(path: Path) -> tuple[int, int, int]:
    """Return size, time of the last change and inode: a file that is replaced gets others."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _checked_identity(path: Path, entry: FileEntry) -> tuple[int, int, int]:
    if not path.is_file():
        raise FileNotFoundError(f"--data: {path} is missing; prepare the folder again")
    identity = file_identity(path)
    if identity[0] != entry.bytes_on_disk:
        raise ValueError(
            f"--data: {path} has {identity[0]} bytes, the manifest says {entry.bytes_on_disk}; the "
            "file was changed: prepare the folder again"
        )
    return identity


class RowGroupReader:
    """Random access to rows by unit, which is one row group of one file.

    Units are numbered in the order of the files; `unit_rows` and `unit_files` are their sizes and
    files, `rows` is the sum. `rows_decoded` counts what was read. Raises FileNotFoundError or
    ValueError when the files are not those of their entries.
    """

    def __init__(self, files: ShardFiles, seq_len: int, *, has_loss_mask: bool) -> None:
        self.files = files
        self.units: list[tuple[FileEntry, int]] = []
        self.unit_rows: list[int] = []
        self.unit_files: list[int] = []
        for index, entry in enumerate(files.entries):
            for row_group, rows in enumerate(entry.row_groups):
                if rows:  # datasets makes a shard of an empty row group but no table
                    self.units.append((entry, row_group))
                    self.unit_rows.append(rows)
                    self.unit_files.append(index)
        self.rows_decoded = 0
        self._seq_len = seq_len
        self._columns = ["input_ids", "doc_lens", *(["loss_mask"] if has_loss_mask else [])]
        self._decoded: OrderedDict[int, RowGroup] = OrderedDict()
        self._open_files: OrderedDict[str, Any] = OrderedDict()

    @property
    def rows(self) -> int:
        """Of all units."""
        return sum(self.unit_rows)

    def entry_of(self, unit: int) -> FileEntry:
        """Return the file of a unit."""
        return self.units[unit][0]

    def row_at(self, number: int, source: str) -> Row:
        """Return the row with this number in the order of the units."""
        ends = np.cumsum(self.unit_rows)
        unit = int(np.searchsorted(ends, number, side="right"))
        return self.row(unit, number - int(ends[unit]) + self.unit_rows[unit], source)

    def row(self, unit: int, index: int, source: str) -> Row:
        """Return row `index` of a unit as views of the decoded buffers."""
        if unit not in self._decoded:
            self._decoded[unit] = self.decode(unit)
            self.rows_decoded += self.unit_rows[unit]
            if len(self._decoded) > CACHED_ROW_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(unit)
        return self._decoded[unit].row(index, source)

    def decode(self, unit: int) -> RowGroup:
        """Read a unit."""
        entry, row_group = self.units[unit]
        path = self.files.path(entry)
        shards = self._row_groups_of(entry, path)
        shard = shards.shard(num_shards=shards.num_shards, index=row_group)
        table = pa.concat_tables(list(shard.iter(batch_size=self.unit_rows[unit])))
        if table.num_rows != self.unit_rows[unit]:
            raise ValueError(
                f"--data: row group {row_group} of {path} has {table.num_rows} rows, the manifest "
                f"says {self.unit_rows[unit]}; the file was changed: prepare the folder again"
            )
        input_ids = table.column("input_ids").combine_chunks()
        doc_lens = table.column("doc_lens").combine_chunks()
        offsets = doc_lens.offsets.to_numpy()
        loss_mask = None
        if "loss_mask" in self._columns:
            bits = table.column("loss_mask").combine_chunks().flatten()
            loss_mask = bits.to_numpy(zero_copy_only=False).reshape(-1, self._seq_len)
        return RowGroup(
            input_ids.flatten().to_numpy(zero_copy_only=True).reshape(-1, self._seq_len),
            doc_lens.flatten().to_numpy(zero_copy_only=True),
            (offsets - offsets[0]).tolist(),
            loss_mask,
        )

    def _row_groups_of(self, entry: FileEntry, path: Path) -> Any:
        """Return a streaming dataset of one file in which every row group is a shard."""
        if entry.file not in self._open_files:
            # Not load_dataset, which asks the name server for the hub's address at every call.
            shards = IterableDataset.from_parquet(str(path), columns=self._columns)
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


@dataclass(frozen=True)
class RowGroup:
    """Decoded rows. `faults` has the error of a row that does not hold together, by its index."""

    input_ids: np.ndarray  # [rows, seq_len]
    doc_lens: np.ndarray  # [documents of all rows]
    doc_offsets: list[int]  # [rows + 1]
    loss_mask: np.ndarray | None  # [rows, seq_len]
    faults: dict[int, ValueError] = field(default_factory=dict)

    def row(self, index: int, source: str) -> Row:
        """Return a row as views; ValueError for one that does not hold together."""
        if index in self.faults:
            raise self.faults[index]
        doc_lens = self.doc_lens[self.doc_offsets[index] : self.doc_offsets[index + 1]]
        row = Row(input_ids=self.input_ids[index], doc_lens=doc_lens, source=source)
        if self.loss_mask is not None:
            row["loss_mask"] = self.loss_mask[index]
        return row
