"""Which documents are a sample, and their way from the input files into the sample's files.

`SamplingWorker` first hashes every document; `plan_shares` finds the greatest hash that each source
gives; the worker then reads again and keeps what is below it; `write_sample_files` merges that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..durable import complete_or_absent
from .input_files import InputFile, check_unchanged
from .progress import Progress
from .text_files import (
    MAX_LINE_BYTES,
    BadFileError,
    ParquetReader,
    Piece,
    Rejected,
    read_piece,
    text_pieces,
)
from .unit_files import read_array, write_unit

# A job reads so many documents or bytes of text, whichever is less, and holds what it takes.
JOB_DOCUMENTS = 65536
JOB_BYTES = 64 << 20
# So many bytes of text are merged at once, at least one output file.
MERGED_BYTES = 256 << 20
ROW_GROUP_ROWS = 1024
# Part of what makes a sample: raise it when the same input should give another one.
SAMPLE_VERSION = 1
HASH, TAKE = "hash", "take"
JSONL = ".jsonl"


def document_hash(text: str, seed: int) -> int:
    """Return the 64 bits that decide whether a document is taken: the smallest are."""
    return _hash64(text.encode(), seed, b"document")


def sample_size(documents: int, ratio: float, source: str, seed: int) -> int:
    """Return how many documents of a source are taken: on average over seeds ratio * documents.

    floor(ratio * documents + u) with u in [0, 1) of this source and seed, so that a larger ratio
    never takes fewer. In exact numbers, so that 1.0 takes all and no more.
    """
    draw = Fraction(_hash64(source.encode(), seed, b"rounding"), 2**64)
    return math.floor(Fraction(repr(ratio)) * documents + draw)


def _hash64(content: bytes, seed: int, purpose: bytes) -> int:
    # Of its own kind: what other tools choose by their hash of a text has nothing to do with it.
    person = b"sample " + purpose
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode(), person=person)
    return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class Share:
    """What is taken of a source: hashes below `threshold`, and `ties` documents that are at it."""

    source: str
    before: int
    after: int
    threshold: int
    ties: int


def plan_shares(
    records: Mapping[str, dict[str, Any]],
    folder: Path,
    ratio: float,
    ratios: Mapping[str, float],
    seed: int,
) -> list[Share]:
    """Return the share of every source, by name, from the hashes in the units of `records`.

    `ratios` are those of single sources. Holds the hashes of one source, 8 bytes per document.
    Raises ValueError for a source of `ratios` that no document has.
    """
    sources = sorted({source for record in records.values() for source in record["sources"]})
    if unknown := [name for name in ratios if name not in sources]:
        raise ValueError(
            f"--source: the input has no source {', '.join(unknown)}; its sources are "
            f"{', '.join(sources[:40]) or 'none'}{', …' if len(sources) > 40 else ''}"
        )
    shares = []
    for source in sources:
        ranges = {
            name: record["sources"][source]
            for name, record in records.items()
            if source in record["sources"]
        }
        hashes = np.empty(sum(stop - start for start, stop in ranges.values()), np.uint64)
        filled = 0
        for name, (start, stop) in ranges.items():
            hashes[filled : filled + stop - start] = read_array(folder, name, "hashes", start, stop)
            filled += stop - start
        after = sample_size(len(hashes), ratios.get(source, ratio), source, seed)
        threshold = ties = 0  # that takes nothing
        if after:
            hashes.partition(after - 1)
            threshold = int(hashes[after - 1])
            ties = after - int(np.count_nonzero(hashes < hashes[after - 1]))
        shares.append(Share(source, len(hashes), after, threshold, ties))
    return shares


# Reading, in processes


@dataclass(frozen=True)
class SamplingSettings:
    """What a process needs to know; `shares` once it is known what is taken."""

    folder: str
    seed: int
    shares: tuple[Share, ...] = ()

    def fingerprint(self) -> str:
        """Return the sha256 of all that the result of a job depends on beside its piece."""
        content = [SAMPLE_VERSION, self.seed, [asdict(share) for share in self.shares]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class SamplingJob:
    """A piece of a file to hash, or to take documents from."""

    stage: str
    index: int
    file: InputFile
    piece: Piece
    depends_on: str

    @property
    def name(self) -> str:
        """Of the unit that it writes."""
        return f"{self.stage}-{self.index:06d}"

    @property
    def key(self) -> str:
        """Return the sha256 of all that its result depends on."""
        content: list[Any] = [self.stage, self.depends_on, self.file.description]
        content += [self.file.stamp[:2], self.piece.start, self.piece.stop]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def amount(self) -> int:
        """Of work, in bytes of text."""
        return self.piece.num_bytes


def plan_sampling(files: Sequence[InputFile], settings: SamplingSettings) -> list[SamplingJob]:
    """Cut the files into jobs that hash; how they are cut makes no difference to the sample."""
    jobs: list[SamplingJob] = []
    for file in files:
        pieces = text_pieces(file.path, max_documents=JOB_DOCUMENTS, max_bytes=JOB_BYTES)
        if not pieces:
            print(f"{file.path}: has no rows")
        for piece in pieces:
            jobs.append(SamplingJob(HASH, len(jobs), file, piece, settings.fingerprint()))
    return jobs


class SamplingWorker:
    """Reads the documents of a job and writes what its stage needs as a unit."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._parquet = ParquetReader()
        self._codes = {share.source: code for code, share in enumerate(settings.shares)}

    def __call__(self, job: SamplingJob) -> int | BadFileError:
        """Return 0, or the file when it is bad."""
        check_unchanged(job.file)
        try:
            try:
                read = self._hash if job.stage == HASH else self._take
                arrays, record = read(job.piece)
            finally:
                check_unchanged(job.file)  # else a file that was replaced would be called damaged
        except BadFileError as error:
            return error
        write_unit(Path(self._settings.folder), job.name, arrays, {"key": job.key, **record})
        return 0

    def _hash(self, piece: Piece) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the hashes, source by source, and what is rejected."""
        hashes: dict[str, list[int]] = {}
        rejected: Counter[str] = Counter()
        for row in read_piece(piece, self._parquet):
            if isinstance(row, Rejected):
                rejected[row.reason] += 1
            else:
                text_hash = document_hash(row.text, self._settings.seed)
                hashes.setdefault(row.source, []).append(text_hash)
        _scores(piece)  # damage shows before it is decided what is taken
        ranges, stop = {}, 0
        for source in sorted(hashes):
            start, stop = stop, stop + len(hashes[source])
            ranges[source] = (start, stop)
        in_order = [text_hash for source in ranges for text_hash in hashes[source]]
        record = {
            "input_rows": stop + rejected.total(),
            "rejected": rejected,
            "sources": ranges,
        }
        return {"hashes": np.array(in_order, np.uint64)}, record

    def _take(self, piece: Piece) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the documents up to the threshold of their source, ties included, in order."""
        scores = _scores(piece)
        taken: list[tuple[int, int, int, float, bytes]] = []
        with piece.file.open("rb") as lines:
            for row in read_piece(piece, self._parquet):
                if isinstance(row, Rejected):
                    continue
                text_hash = document_hash(row.text, self._settings.seed)
                code = self._codes[row.source]
                if text_hash > self._settings.shares[code].threshold:
                    continue
                place = int(row.place.split()[-1])  # "row N" or "byte N"
                if scores is None:
                    lines.seek(place)
                    content = lines.readline(MAX_LINE_BYTES).removesuffix(b"\n")
                    score = math.nan
                else:
                    content = row.text.encode()
                    score = float(scores[place - piece.start])
                # Orders equal texts; what is equal in this too is written the same.
                rest = _hash64(f"{row.source}\n{score}\n".encode() + content, 0, b"rest")
                taken.append((text_hash, rest, code, score, content))
        taken.sort(key=lambda row: row[:2])
        arrays: dict[str, np.ndarray] = {
            "hashes": np.array([row[0] for row in taken], np.uint64),
            "rests": np.array([row[1] for row in taken], np.uint64),
            "sources": np.array([row[2] for row in taken], np.int32),
            "scores": np.array([row[3] for row in taken], np.float64),
            "sizes": np.array([len(row[4]) for row in taken], np.int32),
            "contents": np.frombuffer(b"".join(row[4] for row in taken), np.uint8),
        }
        return arrays, {}


def _scores(piece: Piece) -> np.ndarray | None:
    """Return float64 [rows of the piece], NaN where there is no score; None for jsonl."""
    if piece.file.suffix == JSONL:
        return None
    parts = []
    start = 0
    try:
        with pq.ParquetFile(piece.file, page_checksum_verification=True) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                if stop > piece.start and start < piece.stop:
                    column = parquet.read_row_group(group, ["score"], use_threads=False)["score"]
                    scores = column.cast(pa.float64()).to_numpy()
                    parts.append(scores[max(piece.start - start, 0) : piece.stop - start])
                start = stop
    except (pa.ArrowException, OSError) as error:
        fault = f"{piece.file} is damaged ({' '.join(str(error).split())})"
        raise BadFileError(str(piece.file), fault) from error
    return np.concatenate(parts)


# Writing


def write_sample_files(
    output_dir: Path,
    folder: Path,
    units: Sequence[str],
    shares: Sequence[Share],
    *,
    rows_per_file: int,
    suffix: str,
) -> Iterator[dict[str, Any]]:
    """Write what the `units` took to `output_dir`, sample-000000`suffix` and so on.

    Yields the name, rows, bytes and sha256 of each file.
    """
    taken = TakenRows(folder, units, shares)
    files_at_once = MERGED_BYTES * len(taken.order) // taken.num_bytes // rows_per_file
    rows_at_once = max(files_at_once, 1) * rows_per_file
    progress = Progress("write", len(taken.order))
    for first in range(0, len(taken.order), rows_at_once):
        contents, scores, sources = taken.read(first, first + rows_at_once)
        for start in range(0, len(contents), rows_per_file):
            part = slice(start, start + rows_per_file)
            path = output_dir / f"sample-{(first + start) // rows_per_file:06d}{suffix}"
            _write_file(path, contents[part], scores[part], sources[part])
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            rows = len(contents[part])
            yield {
                "file": path.name,
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": sha256,
            }
            progress.add(rows, 0)


class TakenRows:
    """The documents of all units in one order, on disk but for their hashes and sizes.

    A unit's own documents are in that order too, so a stretch of it is one of each unit.
    """

    def __init__(self, folder: Path, units: Sequence[str], shares: Sequence[Share]) -> None:
        def column(name: str) -> list[np.ndarray]:
            return [read_array(folder, unit, name) for unit in units]

        self._folder, self._units, self._shares = folder, units, shares
        sizes = column("sizes")
        lengths = [len(array) for array in sizes]
        self._unit_of_row = np.repeat(np.arange(len(units), dtype=np.int32), lengths)
        self._first_row = np.cumsum([0, *lengths])
        self._ends = np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64)  # with a 0 before
        self._sources = np.concatenate(column("sources"))
        hashes = np.concatenate(column("hashes"))
        order = np.lexsort((np.concatenate(column("rests")), hashes))
        self.order = order[~self._too_many(hashes[order], self._sources[order])]
        self.num_bytes = int(self._ends[-1])

    def _too_many(self, hashes: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Return bool [rows]: at its source's threshold, and behind as many as are taken there."""
        too_many = np.zeros(len(hashes), bool)
        thresholds = np.array([share.threshold for share in self._shares], np.uint64)
        seen: Counter[int] = Counter()
        for row in np.flatnonzero(hashes == thresholds[sources]).tolist():
            source = int(sources[row])
            seen[source] += 1
            too_many[row] = seen[source] > self._shares[source].ties
        return too_many

    def read(self, start: int, stop: int) -> tuple[list[bytes], np.ndarray, list[str]]:
        """Return contents, scores and sources of the rows at start..stop in the order."""
        rows = self.order[start:stop]
        contents, scores = [b""] * len(rows), np.empty(len(rows))
        by_unit = np.argsort(self._unit_of_row[rows], kind="stable")
        changes = np.flatnonzero(np.diff(self._unit_of_row[rows[by_unit]])) + 1
        for places in np.split(by_unit, changes):
            wanted = rows[places]
            first, last = int(wanted[0]), int(wanted[-1])
            unit = int(self._unit_of_row[first])
            row_before = int(self._first_row[unit])
            byte_before = int(self._ends[row_before])
            name = self._units[unit]
            begin, end = int(self._ends[first]), int(self._ends[last + 1])
            text = read_array(
                self._folder, name, "contents", begin - byte_before, end - byte_before
            ).tobytes()
            for place, row in zip(places.tolist(), wanted.tolist(), strict=True):
                contents[place] = text[self._ends[row] - begin : self._ends[row + 1] - begin]
            found = read_array(
                self._folder, name, "scores", first - row_before, last + 1 - row_before
            )
            scores[places] = found[wanted - first]
        return contents, scores, [self._shares[code].source for code in self._sources[rows]]


def _write_file(path: Path, contents: list[bytes], scores: np.ndarray, sources: list[str]) -> None:
    with complete_or_absent(path) as file:
        if path.suffix == JSONL:
            file.writelines(content + b"\n" for content in contents)
            return
        table = pa.table(
            {
                "text": pa.array([content.decode() for content in contents], pa.string()),
                "score": pa.array(scores, pa.float64(), from_pandas=True),  # NaN: no score
                "source": pa.array(sources, pa.string()),
            }
        )
        pq.write_table(
            table,
            file,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            use_dictionary=["source"],
            write_page_checksum=True,
        )
