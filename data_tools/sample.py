"""Take a sample of text, the same share of every source, decided by a hash of each document.

    python data_tools/sample.py --input data/fineweb/4_5 --output_dir data/fineweb_5 --ratio 0.05

Reads parquet with the columns text, score, source and writes the same; reads DeepCtrl jsonl (its
source: data_source, else the file's name) and writes its lines as they are, byte for byte.

Of the n documents of a source, ratio * n are taken: those with the smallest hashes of text and
seed. A number with a fraction is rounded up with the probability of the fraction, else down, as a
hash of source and seed says. Therefore
- the sample is a matter of the documents alone: not of their files, their order or --num_proc;
- every document is as likely to be in it as any other: over many seeds a source with 3 documents
  gives 3 * ratio documents on average, not always 0 or always 1;
- with the same seed, a larger ratio contains the sample of a smaller one, rounding included;
- documents with the same text are taken or left together, but where the last one of a source is
  among them: then by their score, or the rest of their line.
It is written in the order of the hashes, which is a shuffled one, so the same documents and options
give the same bytes, also after an interruption.

1. Processes hash the documents of one part of a file each, into OUTPUT_DIR/unfinished/. The largest
   source then takes 8 bytes of memory per document.
2. Processes read again and keep what is taken; it is merged with about 60 bytes of memory per
   document of the sample. The disk holds the sample twice until it is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.sample_charts import draw_source_shares
from mini_llm.data.durable import complete_or_absent
from mini_llm.data.input_files import InputFile, check_unchanged
from mini_llm.data.jobs import available_cpus, run_jobs
from mini_llm.data.manifest import FileEntry
from mini_llm.data.output_folder import (
    check_no_foreign_files,
    check_same_preparation,
    clear_unfinished,
    explained_full_disk,
    only_preparation_of,
)
from mini_llm.data.progress import Progress
from mini_llm.data.text_files import (
    MAX_LINE_BYTES,
    TEXT_SUFFIXES,
    BadFileError,
    Document,
    Piece,
    Rejected,
    check_text_file,
    list_files,
    read_piece,
    text_pieces,
)
from mini_llm.data.unit_files import read_array, read_record, write_unit

# A job reads so many documents or bytes of text, whichever is less, and holds what it takes.
JOB_DOCUMENTS = 65536
JOB_BYTES = 64 << 20
# So much text is merged at once, at least one output file.
MERGED_BYTES = 512 << 20
ROW_GROUP_ROWS = 1024
LISTED_SOURCES = 40
LONGEST_NAME = 48

# Part of what makes a sample: raise it when the same input should give another one.
FORMAT_VERSION = 1
WORK_NAME = "unfinished"
SUMMARY_NAME = "sample.json"
CHART_NAME = "source_shares.png"
OUTPUT_FILE = re.compile(r"sample-\d{6,}\.(parquet|jsonl)")
PARQUET, JSONL = ".parquet", ".jsonl"
HASH, TAKE = "hash", "take"


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        sample(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="parquet (text, score, source) or DeepCtrl jsonl: files, or folders of them",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--ratio", type=float, required=True, help="share of the documents to take, above 0 to 1"
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="NAME=RATIO",
        help="another ratio for the documents of some sources; 0 leaves a source out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out files that are damaged or have other columns, and list them in "
        f"{SUMMARY_NAME}, instead of stopping",
    )
    parser.add_argument(
        "--num_proc", type=int, default=available_cpus(), help="processes that read"
    )
    parser.add_argument("--rows_per_file", type=int, default=16384, help="documents per file")
    return parser.parse_args(command_line)


def sample(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the sample, or find it finished; return the content of its sample.json.

    Raises ValueError or OSError, naming the flag, for bad input.
    """
    ratios = check_arguments(arguments)
    output_dir, work = arguments.output_dir, arguments.output_dir / WORK_NAME
    paths = check_inputs(arguments.input, output_dir)
    skipped: dict[str, str] = {}
    for path in paths:
        try:
            if unused := check_text_file(path):
                print(f"{path}: the columns {', '.join(unused)} are not kept")
        except BadFileError as error:
            skip_or_raise(error, skipped, arguments.skip_bad_files)
    files = [InputFile.of(path) for path in paths]
    options = {
        # In an order of their own: that of the files does not matter.
        "inputs": sorted((file.description for file in files), key=lambda d: list(d.values())),
        "ratio": arguments.ratio,
        "source": ratios,
        "seed": arguments.seed,
        "skip_bad_files": arguments.skip_bad_files,
        "rows_per_file": arguments.rows_per_file,
    }
    said = f"{output_dir} already holds this sample: nothing to do"
    if (summary := finished_sample(output_dir, options)) is not None and not work.exists():
        print(said)
        return summary
    # Files that look like ours are ours only beside what says so.
    ours = [path.name for path in output_dir.glob("*") if OUTPUT_FILE.fullmatch(path.name)]
    if summary is None and not work.exists():
        ours = []
    check_no_foreign_files(output_dir, {WORK_NAME, SUMMARY_NAME, CHART_NAME, *ours})
    with only_preparation_of(output_dir, work):
        if (summary := finished_sample(output_dir, options)) is not None:
            print(said)
        else:
            clear_unfinished(output_dir, work, [*ours, CHART_NAME])
            files = [file for file in files if str(file.path) not in skipped]
            needs = "a sample takes twice its size in all"
            with explained_full_disk(output_dir, work, needs=needs, units="*-*.json"):
                summary = write_sample(files, arguments, ratios, options, skipped)
        shutil.rmtree(work)
    return summary


def write_sample(
    files: list[InputFile],
    arguments: argparse.Namespace,
    ratios: Mapping[str, float],
    options: dict[str, Any],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Go through all stages and write sample.json; `skipped` gets the bad files that turn up."""
    output_dir, work = arguments.output_dir, arguments.output_dir / WORK_NAME
    settings = Settings(work, arguments.seed)
    jobs = hash_jobs(files, settings)
    while bad := run_jobs("hash", jobs, work, partial(Worker, settings), arguments.num_proc):
        for error in bad:
            skip_or_raise(error, skipped, arguments.skip_bad_files)
        jobs = [job for job in jobs if str(job.file.path) not in skipped]
    records = {job.name: read_record(work, job.name) or {} for job in jobs}
    input_rows = sum(record["input_rows"] for record in records.values())
    rejected: Counter[str] = Counter()
    for record in records.values():
        rejected.update(record["rejected"])

    shares = plan_shares(records, work, arguments.ratio, ratios, arguments.seed)
    documents, sampled = sum(s.before for s in shares), sum(s.after for s in shares)
    if not sampled:
        raise ValueError(
            f"--ratio: none of {documents:,} documents is taken ({input_rows:,} rows, "
            f"{rejected.total():,} rejected); give more text or a larger --ratio"
        )
    settings = replace(settings, shares=tuple(shares))
    jobs = [replace(job, stage=TAKE, depends_on=settings.fingerprint()) for job in jobs]
    for error in run_jobs("take", jobs, work, partial(Worker, settings), arguments.num_proc):
        raise error  # it was whole before
    suffix = files[0].path.suffix
    names = [job.name for job in jobs]
    entries = list(write_files(output_dir, work, names, shares, arguments.rows_per_file, suffix))
    written = sum(entry["rows"] for entry in entries)
    if written != sampled or input_rows != documents + rejected.total():
        raise RuntimeError(
            f"{input_rows} rows were read, {documents} of them documents and {rejected.total()} "
            f"rejected; {written} of {sampled} documents were written: a mistake of this program"
        )
    listed = listed_sources(shares)
    if not draw_source_shares(output_dir / CHART_NAME, listed):
        print(f"{CHART_NAME}: no installed font has all characters of the names of the sources")
    summary = {
        "format_version": FORMAT_VERSION,
        "options": options,
        "input_rows": input_rows,
        "sampled": sampled,
        "not_sampled": documents - sampled,
        "rejected": dict(sorted(rejected.items())),
        "skipped_files": [
            {"name": Path(file).name, "reason": reason}
            for file, reason in sorted(skipped.items(), key=lambda item: Path(item[0]).name)
        ],
        "sources": {s.source: {"before": s.before, "after": s.after} for s in shares},
        "files": entries,
    }
    with complete_or_absent(output_dir / SUMMARY_NAME) as file:
        file.write(json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
    report(summary, listed, output_dir)
    return summary


def check_arguments(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the ratios of --source by name; ValueError for a flag that is out of range."""
    if not 0 < arguments.ratio <= 1:
        raise ValueError(f"--ratio must be above 0 and at most 1, got {arguments.ratio}")
    if not 0 <= arguments.seed < 2**64:
        raise ValueError(f"--seed must lie between 0 and 2^64 - 1, got {arguments.seed}")
    for flag in ("num_proc", "rows_per_file"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ValueError(f"--output_dir: {arguments.output_dir} is a file; give a folder")
    ratios: dict[str, float] = {}
    for given in arguments.source:
        name, _, ratio = given.rpartition("=")
        try:
            ratios[name] = float(ratio)
        except ValueError:
            raise ValueError(f"--source {given} is not NAME=RATIO, like web=0.5") from None
        if "=" not in given or not 0 <= ratios[name] <= 1:
            raise ValueError(f"--source {given} is not NAME=RATIO with a ratio from 0 to 1")
    if len(ratios) < len(arguments.source):
        raise ValueError("--source has a name twice; give each one ratio")
    return dict(sorted(ratios.items()))


def check_inputs(inputs: Sequence[Path], output_dir: Path) -> list[Path]:
    """Return the input files by path, each once and all of one format."""
    for path in inputs:
        if path.is_dir() and output_dir.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output_dir: {output_dir} lies in {path}, so that the sample would become its "
                "own input; give a folder outside"
            )
    paths = sorted(list_files(inputs, TEXT_SUFFIXES))
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("--input: a file is given twice; give each once")
    if len({path.suffix for path in paths}) > 1:
        raise ValueError(
            "--input: parquet and jsonl cannot become one sample; give only the one, then only "
            "the other with another --output_dir"
        )
    return paths


def skip_or_raise(error: BadFileError, skipped: dict[str, str], skip_bad_files: bool) -> None:
    """Note a bad file as skipped, or raise the error when that was not asked for."""
    if not skip_bad_files:
        raise ValueError(f"{error}, or give --skip_bad_files") from error
    if error.file not in skipped:
        # By its name, so that the summary does not depend on where the input lies.
        skipped[error.file] = error.fault.replace(error.file, Path(error.file).name)
        print(f"skipped: {error.fault}", flush=True)


def finished_sample(output_dir: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a finished folder, None when there is none yet.

    Raises ValueError, naming what differs, when the sample was taken with other options.
    """
    path = output_dir / SUMMARY_NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {found['format_version']}")
        files = [
            FileEntry(entry["file"], entry["rows"], 0, [], entry["sha256"], entry["bytes"])
            for entry in found["files"]
        ]
        options_then = found["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--output_dir: {path} was not written by this version of sample.py ({error}); give "
            "another folder or remove this one"
        ) from error
    check_same_preparation(output_dir, options, options_then, files, advice="remove this one")
    return found


# What is taken


def document_hash(text: str, seed: int) -> int:
    """Return the 64 bits that decide whether a document is taken, smallest first."""
    return _hash(text.encode(), seed, b"document")


def sample_size(documents: int, ratio: float, source: str, seed: int) -> int:
    """Return how many documents of a source are taken; over the seeds ratio * documents on average.

    floor(ratio * documents + u), u of this source and seed uniform in [0, 1): never less for a
    larger ratio. In whole numbers, so that 0.29 of 100 is 29.
    """
    draw = Fraction(_hash(source.encode(), seed, b"rounding"), 2**64)
    return math.floor(Fraction(repr(ratio)) * documents + draw)


def _hash(content: bytes, seed: int, purpose: bytes) -> int:
    # Of its own kind: what another tool chose by its hash of the text is no part of it.
    person = b"sample " + purpose
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode(), person=person)
    return int.from_bytes(digest.digest())


@dataclass(frozen=True)
class Share:
    """What is taken of a source: hashes below `threshold`, and `ties` documents just at it."""

    source: str
    before: int
    after: int
    threshold: int
    ties: int


def plan_shares(
    records: Mapping[str, dict[str, Any]],
    work: Path,
    ratio: float,
    ratios: Mapping[str, float],
    seed: int,
) -> list[Share]:
    """Return the share of every source, by name, from the hashes in the units of `records`."""
    sources = sorted({source for record in records.values() for source in record["sources"]})
    if unknown := [name for name in ratios if name not in sources]:
        known = ", ".join(sources[:LISTED_SOURCES]) or "none"
        raise ValueError(
            f"--source: the input has no source {', '.join(unknown)}; its sources are {known}"
        )
    shares = []
    for source in sources:
        parts = []
        for name, record in records.items():
            if source in record["sources"]:
                start, stop = record["sources"][source]
                parts.append(read_array(work, name, "hashes", start, stop))
        hashes = np.concatenate(parts)
        parts.clear()
        after = sample_size(len(hashes), ratios.get(source, ratio), source, seed)
        threshold = ties = 0  # takes nothing: a hash of 0 is at it, and of those none is taken
        if after:
            hashes.partition(after - 1)
            threshold = int(hashes[after - 1])
            ties = after - int(np.count_nonzero(hashes < hashes[after - 1]))
        shares.append(Share(source, len(hashes), after, threshold, ties))
    return shares


# Reading, in processes


@dataclass(frozen=True)
class Settings:
    """What a process needs to know; `shares` when it is known what is taken."""

    work: Path
    seed: int
    shares: tuple[Share, ...] = ()

    def fingerprint(self) -> str:
        """Return the sha256 of all that the result of a job depends on."""
        content = [FORMAT_VERSION, self.seed, [asdict(share) for share in self.shares]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class PieceJob:
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
        content = [self.stage, self.depends_on, self.file.description, self.file.stamp[:2]]
        content += [self.file.path.stem, self.piece.start, self.piece.stop]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def amount(self) -> int:
        """Of work, in bytes of text."""
        return self.piece.num_bytes


def hash_jobs(files: Sequence[InputFile], settings: Settings) -> list[PieceJob]:
    """Cut the files into jobs; only how the work is divided depends on it."""
    jobs: list[PieceJob] = []
    for file in files:
        pieces = text_pieces(file.path, max_documents=JOB_DOCUMENTS, max_bytes=JOB_BYTES)
        if not pieces:
            print(f"{file.path}: has no rows")
        for piece in pieces:
            jobs.append(PieceJob(HASH, len(jobs), file, piece, settings.fingerprint()))
    return jobs


class Worker:
    """Reads the documents of a job and writes what its stage needs as a unit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._codes = {share.source: code for code, share in enumerate(settings.shares)}

    def __call__(self, job: PieceJob) -> int | BadFileError:
        """Return 0, or the file when it is bad."""
        check_unchanged(job.file)  # else a replaced file would be called damaged
        try:
            arrays, record = self._hash(job) if job.stage == HASH else self._take(job)
        except BadFileError as error:
            check_unchanged(job.file)
            return error
        check_unchanged(job.file)
        write_unit(self._settings.work, job.name, arrays, {"key": job.key, **record})
        return 0

    def _hash(self, job: PieceJob) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the hashes, by source, and what is rejected."""
        hashes: dict[str, list[int]] = {}
        rejected: Counter[str] = Counter()
        for document in read_rows(job.piece):
            if isinstance(document, Rejected):
                rejected[document.reason] += 1
            else:
                code = document_hash(document.text, self._settings.seed)
                hashes.setdefault(document.source, []).append(code)
        read_scores(job.piece)  # so that all damage shows before it is decided what is taken
        ranges, stop = {}, 0
        for source in sorted(hashes):
            start, stop = stop, stop + len(hashes[source])
            ranges[source] = (start, stop)
        parts = [np.array(hashes[source], np.uint64) for source in ranges]
        arrays = {"hashes": np.concatenate([np.zeros(0, np.uint64), *parts])}
        input_rows = stop + rejected.total()
        return arrays, {"input_rows": input_rows, "rejected": rejected, "sources": ranges}

    def _take(self, job: PieceJob) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what may be taken, in the order of its hashes: of ties, all."""
        scores = read_scores(job.piece)
        taken: list[tuple[int, int, int, float, bytes]] = []
        with job.piece.file.open("rb") as lines:
            for document in read_rows(job.piece):
                if isinstance(document, Rejected):
                    continue
                text_hash = document_hash(document.text, self._settings.seed)
                code = self._codes[document.source]
                if text_hash > self._settings.shares[code].threshold:
                    continue
                place = int(document.place.split()[-1])  # "row N" or "byte N"
                if scores is None:
                    lines.seek(place)
                    content = lines.readline(MAX_LINE_BYTES).removesuffix(b"\n")
                    score = math.nan
                else:
                    content = document.text.encode()
                    score = float(scores[place - job.piece.start])
                # What follows the text in the order; documents alike in this are alike in all.
                rest = f"{document.source}\n{score}\n".encode() + content
                taken.append((text_hash, _hash(rest, 0, b"rest"), code, score, content))
        taken.sort(key=lambda row: row[:2])
        arrays = {
            "hashes": np.array([row[0] for row in taken], np.uint64),
            "rests": np.array([row[1] for row in taken], np.uint64),
            "sources": np.array([row[2] for row in taken], np.int32),
            "scores": np.array([row[3] for row in taken], np.float64),
            "sizes": np.array([len(row[4]) for row in taken], np.int64),
            "contents": np.frombuffer(b"".join(row[4] for row in taken), np.uint8),
        }
        return arrays, {}


def read_rows(piece: Piece) -> Iterator[Document | Rejected]:
    """Yield every row or line of a piece, rejecting a source that is no valid text either."""
    for document in read_piece(piece):
        if isinstance(document, Document):
            try:
                document.source.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
                document = Rejected("invalid_unicode", document.place)
        yield document


def read_scores(piece: Piece) -> np.ndarray | None:
    """Return float64 [rows of the piece], NaN where there is none; None for jsonl."""
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


def write_files(
    output_dir: Path,
    work: Path,
    names: Sequence[str],
    shares: Sequence[Share],
    rows_per_file: int,
    suffix: str,
) -> Iterator[dict[str, Any]]:
    """Merge the units into files in the order of the hashes; yield what sample.json says of each.

    Each unit is in that order too, so that what some consecutive files need of it is one stretch.
    """
    hashes, rests, sources, sizes = (
        np.concatenate([read_array(work, name, key) for name in names])
        for key in ("hashes", "rests", "sources", "sizes")
    )
    rows_of_unit = [len(read_array(work, name, "sizes")) for name in names]
    units = np.repeat(np.arange(len(names), dtype=np.int32), rows_of_unit)
    first_row = np.cumsum([0, *rows_of_unit])
    order = np.lexsort((rests, hashes))
    order = order[~surplus_ties(hashes[order], sources[order], shares)]
    del hashes, rests
    ends = np.cumsum(sizes)

    def read(rows: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        contents, scores = [b""] * len(rows), np.empty(len(rows))
        by_unit = np.argsort(units[rows], kind="stable")
        changes = np.flatnonzero(np.diff(units[rows[by_unit]])) + 1
        for places in np.split(by_unit, changes):
            wanted = rows[places]
            unit = int(units[wanted[0]])
            first, last, start = int(wanted[0]), int(wanted[-1]), int(first_row[unit])
            before = int(ends[start] - sizes[start])  # bytes of the units before
            begin, end = int(ends[first] - sizes[first]), int(ends[last])
            found = read_array(work, names[unit], "contents", begin - before, end - before)
            text = found.tobytes()
            for place, row in zip(places.tolist(), wanted.tolist(), strict=True):
                stop = int(ends[row]) - begin
                contents[place] = text[stop - int(sizes[row]) : stop]
            found = read_array(work, names[unit], "scores", first - start, last + 1 - start)
            scores[places] = found[wanted - first]
        return contents, scores

    files_at_once = MERGED_BYTES * len(order) // max(int(sizes[order].sum()), 1) // rows_per_file
    rows_at_once = max(files_at_once, 1) * rows_per_file
    progress = Progress("write", len(order))
    for chunk in range(0, len(order), rows_at_once):
        rows = order[chunk : chunk + rows_at_once]
        contents, scores = read(rows)
        for offset in range(0, len(rows), rows_per_file):
            chosen = slice(offset, offset + rows_per_file)
            path = output_dir / f"sample-{(chunk + offset) // rows_per_file:06d}{suffix}"
            names_of_sources = [shares[code].source for code in sources[rows[chosen]]]
            write_file(path, contents[chosen], scores[chosen], names_of_sources)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            count = len(names_of_sources)
            size = path.stat().st_size
            yield {"file": path.name, "rows": count, "bytes": size, "sha256": sha256}
            progress.add(count, 0)


def surplus_ties(hashes: np.ndarray, sources: np.ndarray, shares: Sequence[Share]) -> np.ndarray:
    """Return bool [rows], rows in order: whether a row at its source's threshold is one too many."""
    surplus = np.zeros(len(hashes), bool)
    thresholds = np.array([share.threshold for share in shares], np.uint64)
    seen: Counter[int] = Counter()
    for row in np.flatnonzero(hashes == thresholds[sources]).tolist():
        code = int(sources[row])
        seen[code] += 1
        surplus[row] = seen[code] > shares[code].ties
    return surplus


def write_file(path: Path, contents: list[bytes], scores: np.ndarray, sources: list[str]) -> None:
    """Write one output file, whole or not at all."""
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


# What the user sees


def listed_sources(shares: Sequence[Share]) -> list[tuple[str, int, int]]:
    """Return (name, documents before, after) of the sources, largest first, the rest as one."""
    ordered = sorted(shares, key=lambda share: (-share.before, share.source))
    kept, others = ordered[:LISTED_SOURCES], ordered[LISTED_SOURCES:]
    rows = [(shown_name(share.source), share.before, share.after) for share in kept]
    if others:
        before, after = sum(s.before for s in others), sum(s.after for s in others)
        rows.append((f"{len(others):,} others", before, after))
    return rows


def shown_name(source: str) -> str:
    """Return the name of a source as one short line."""
    line = "".join(c if c.isprintable() else " " for c in source).strip() or "(no name)"
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def report(
    summary: dict[str, Any], listed: Sequence[tuple[str, int, int]], output_dir: Path
) -> None:
    """Print what was sampled; the names last, because Chinese ones are wider than they are long."""
    sampled, documents = summary["sampled"], summary["sampled"] + summary["not_sampled"]
    print(f"{'documents':>14}{'share':>9}{'sampled':>14}{'share':>9}  source")
    for name, before, after in [*listed, ("all", documents, sampled)]:
        shares = before / documents, after / sampled
        print(f"{before:>14,}{shares[0]:>9.2%}{after:>14,}{shares[1]:>9.2%}  {name}")
    rejected = sum(summary["rejected"].values())
    print(
        f"input: {summary['input_rows']:,} rows = {sampled:,} sampled + "
        f"{summary['not_sampled']:,} not sampled + {rejected:,} rejected"
    )
    if rejected:
        reasons = ", ".join(f"{count:,} {why}" for why, count in summary["rejected"].items())
        print(f"rejected: {reasons}")
    if summary["skipped_files"]:
        names = ", ".join(file["name"] for file in summary["skipped_files"])
        print(f"skipped files: {len(summary['skipped_files'])} ({names})")
    print(f"{len(summary['files'])} files and {CHART_NAME}: {output_dir}")


if __name__ == "__main__":
    main()
