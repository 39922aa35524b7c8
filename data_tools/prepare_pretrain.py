"""Tokenise text and pack it into shuffled parquet rows with a manifest and a held-out split.

    python data_tools/prepare_pretrain.py --input data/fineweb/4_5 --tokenizer data/tokenizer \\
        --output_dir data/fineweb_packed --seq_len 2048

Reads parquet with the columns text, score, source and DeepCtrl jsonl; with --input_format tokens,
ready-made headerless uint16 .bin files. The same text, tokenizer and options give the same bytes,
whatever --num_proc is and however often the preparation was interrupted.

The input is cut into units of some files, or of a part of one, with about 8,000 documents each.
1. Processes tokenise and pack one unit each, into OUTPUT_DIR/unfinished/. Run again after an
   interruption, units that are done are kept.
2. The rows of all units are shuffled over the disk into the final files; the manifest comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.command_line import HelpFormatter, Parser
from mini_llm.data.input_files import InputFile, check_unchanged, skip_or_raise
from mini_llm.data.jobs import available_cpus, run_jobs
from mini_llm.data.manifest import (
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    Manifest,
    Split,
    TokenizerEntry,
    load_manifest,
    write_manifest,
)
from mini_llm.data.output_folder import (
    check_no_foreign_files,
    check_outside_input,
    check_same_preparation,
    clear_unfinished,
    explained_full_disk,
    only_preparation_of,
)
from mini_llm.data.packing import MIN_SEQ_LEN, PackingStats, pack_documents
from mini_llm.data.progress import Progress
from mini_llm.data.text_files import (
    TEXT_SUFFIXES,
    BadFileError,
    Document,
    ParquetReader,
    Piece,
    Rejected,
    check_text_file,
    clean_text,
    list_files,
    read_piece,
    text_pieces,
)
from mini_llm.data.token_files import (
    TOKEN_SUFFIXES,
    TokenReader,
    check_token_file,
    token_pieces,
)
from mini_llm.data.tokenizer import encode_function, load_tokenizer, tokenizer_fingerprint
from mini_llm.data.unit_files import (
    read_array,
    read_record,
    row_arrays,
    write_shuffled,
    write_unit,
)
from mini_llm.durable import complete_or_absent

# A unit is full with so many documents or bytes of text, whichever comes first. Best fit needs
# choice: with 8,192 documents at hand a row of 2,048 is > 99.5% full.
UNIT_DOCUMENTS = 8192
UNIT_BYTES = 64 << 20
# Part of what makes a unit: raise it when the same input should give other units.
UNIT_VERSION = 1
WORK_NAME = "unfinished"
QUARANTINE_NAME = "quarantine.jsonl"
DUPLICATE = "duplicate"
DUPLICATE_PARTITIONS = 16


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        prepare(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="parquet (text, score, source) or DeepCtrl jsonl: files, or folders of them",
    )
    parser.add_argument(
        "--input_format",
        choices=["text", "tokens"],
        default="text",
        help="tokens: headerless uint16 .bin files made with --tokenizer, each document ending "
        "with its end-of-document id; what follows the last end of a file is counted, not used",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seq_len", type=int, default=2048, help="tokens per row")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.005,
        help="share of the documents, chosen by a hash of their text, that is held out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of the rows")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="line ends to \\n; without control characters, byte order marks, white space at the "
        "end of lines and empty lines around the text; else a text is kept exactly as it is",
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="keep only the first of documents with the same text (by 64 bits of its SHA-256); "
        "reads the input twice and takes about 16 bytes of memory per document",
    )
    parser.add_argument(
        "--skip_bad_files",
        action="store_true",
        help="leave out files that are damaged or have other columns, and list them in the "
        "manifest, instead of stopping",
    )
    parser.add_argument(
        "--num_proc", type=int, default=available_cpus(), help="processes that tokenise"
    )
    parser.add_argument("--rows_per_file", type=int, default=16384, help="rows per parquet file")
    parser.add_argument(
        "--row_group_rows",
        type=int,
        default=64,
        help="rows per row group, the unit that a rank reads and that an epoch shuffles",
    )
    parser.add_argument(
        "--max_tokens_in_memory",
        type=int,
        default=2**28,
        help="tokens that the shuffle holds at once (2 bytes each, 4 with more than 65,536 ids); "
        "more is faster and gives the same result",
    )
    return parser.parse_args(command_line)


def prepare(arguments: argparse.Namespace) -> Manifest:
    """Run the whole preparation, or return the manifest of one that is already done.

    Raises ValueError or OSError, naming the flag, for bad input.
    """
    check_arguments(arguments)
    check_outside_input(arguments.output_dir, arguments.input)
    is_text = arguments.input_format == "text"
    paths = list_files(arguments.input, TEXT_SUFFIXES if is_text else TOKEN_SUFFIXES)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer: {arguments.tokenizer} has no end-of-document token (eos)")
    vocabulary = TokenizerEntry(tokenizer_fingerprint(arguments.tokenizer), len(tokenizer))
    settings = Settings(
        tokenizer=str(arguments.tokenizer),
        tokenizer_fingerprint=vocabulary.fingerprint,
        vocab_size=vocabulary.vocab_size,
        end_of_document=tokenizer.eos_token_id,
        is_text=is_text,
        clean=arguments.clean,
        validation_fraction=arguments.validation_fraction,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
    )
    skipped: dict[str, str] = {}
    for path in paths:
        try:
            check_file(path, settings)
        except BadFileError as error:
            skip_or_raise(error, skipped, arguments.skip_bad_files)
    files = [InputFile.of(path) for path in paths]
    options = {
        "inputs": [file.description for file in files],
        "input_format": arguments.input_format,
        "validation_fraction": arguments.validation_fraction,
        "seed": arguments.seed,
        "clean": arguments.clean,
        "deduplicate": arguments.deduplicate,
        "skip_bad_files": arguments.skip_bad_files,
        "rows_per_file": arguments.rows_per_file,
        "row_group_rows": arguments.row_group_rows,
    }

    output_dir, work = arguments.output_dir, arguments.output_dir / WORK_NAME

    def finished() -> Manifest | None:
        return reusable_manifest(output_dir, options, vocabulary, arguments.seq_len)

    said = f"{output_dir} is already prepared with these options: nothing to do"
    if (manifest := finished()) is not None and not work.exists():
        print(said)
        return manifest
    check_no_foreign_files(output_dir, {WORK_NAME, QUARANTINE_NAME, MANIFEST_NAME})
    with only_preparation_of(output_dir, work):
        if (manifest := finished()) is not None:
            print(said)
        else:
            clear_unfinished(output_dir, work, [TRAIN, VALIDATION, QUARANTINE_NAME])
            files = [file for file in files if str(file.path) not in skipped]
            needs = "a preparation takes up to 4 bytes per token in all"
            with explained_full_disk(output_dir, work, needs=needs, units="unit-*.json"):
                manifest = prepare_files(
                    files, arguments, replace(settings, work=str(work)), options, skipped
                )
        shutil.rmtree(work)
    return manifest


def prepare_files(
    files: list[InputFile],
    arguments: argparse.Namespace,
    settings: Settings,
    options: dict[str, Any],
    skipped: dict[str, str],
) -> Manifest:
    """Go through all stages and write the manifest; `skipped` gets the bad files that turn up."""
    started = time.monotonic()
    units = plan_units(files, settings)

    work = Path(settings.work)
    make_worker = partial(Worker, settings)
    resumed = any(read_record(work, unit.name) is not None for unit in units)

    def run(stage: str, jobs: Callable[[], list[UnitJob]]) -> None:
        # Without the files that turned out to be bad, other units have to be done again.
        while bad := run_jobs(stage, jobs(), work, make_worker, arguments.num_proc):
            for error in bad:
                skip_or_raise(error, skipped, arguments.skip_bad_files)

    def kept_units() -> list[Unit]:
        return [unit.without(skipped) for unit in units]

    if arguments.deduplicate:
        run("hash", lambda: [UnitJob(HASH, unit, settings) for unit in kept_units()])
    run("tokenise", lambda: tokenise_jobs(kept_units(), arguments.deduplicate, settings))

    names = [unit.name for unit in units]
    records = [record for name in names if (record := read_record(work, name)) is not None]
    rejected: Counter[str] = Counter()
    for record in records:
        rejected.update(record["rejected"])
    held_out, held_out_stats = pack_held_out(names, settings)
    train_stats = sum((PackingStats(**record["packing"]) for record in records), PackingStats())
    if not train_stats.rows:
        raise ValueError(
            f"--input: no training document is left ({sum(rejected.values())} rows rejected); "
            "give more text or a smaller --validation_fraction"
        )
    splits = {}
    for split, units_of_split, stats in (
        (TRAIN, names, train_stats),
        (VALIDATION, held_out, held_out_stats),
    ):
        progress = Progress(f"shuffle {split}", stats.rows)
        entries = []
        for entry in write_shuffled(
            arguments.output_dir,
            split,
            work,
            units_of_split,
            rows_per_file=arguments.rows_per_file,
            row_group_rows=arguments.row_group_rows,
            max_rows_in_memory=arguments.max_tokens_in_memory // arguments.seq_len,
        ):
            entries.append(entry)
            progress.add(entry.rows, entry.tokens)
        sources: Counter[str] = Counter()
        for record in records:
            sources.update(record["documents_per_source"][split])
        splits[split] = Split(
            rows=stats.rows,
            tokens=stats.tokens,
            documents=stats.documents,
            bytes=sum(record["bytes"][split] for record in records),
            documents_per_source=dict(sorted(sources.items())),
            utilisation=round(stats.utilisation(arguments.seq_len), 6),
            split_fraction=round(stats.split_fraction, 6),
            files=entries,
        )
    input_rows = sum(record["input_rows"] for record in records)
    documents = sum(split.documents for split in splits.values())
    if input_rows != documents + sum(rejected.values()):
        raise RuntimeError(
            f"{input_rows} rows were read but {documents} documents written and "
            f"{sum(rejected.values())} rejected: a mistake of this program"
        )
    write_quarantine(arguments.output_dir / QUARANTINE_NAME, names, work)
    manifest = write_manifest(
        arguments.output_dir,
        Manifest(
            seq_len=arguments.seq_len,
            tokenizer=TokenizerEntry(settings.tokenizer_fingerprint, settings.vocab_size),
            splits=splits,
            rejected=dict(sorted(rejected.items())),
            options=options,
            input_rows=input_rows,
            skipped_files=[
                {"name": Path(file).name, "reason": reason} for file, reason in skipped.items()
            ],
        ),
    )
    report(manifest, arguments.output_dir, time.monotonic() - started, resumed=resumed)
    return manifest


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a flag that is out of range."""
    if arguments.seq_len < MIN_SEQ_LEN:
        raise ValueError(f"--seq_len must be at least {MIN_SEQ_LEN}, got {arguments.seq_len}")
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(
            f"--validation_fraction must lie in [0, 1), got {arguments.validation_fraction}"
        )
    for flag in ("num_proc", "rows_per_file", "row_group_rows"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}")
    tokens_per_file = arguments.rows_per_file * arguments.seq_len
    if arguments.max_tokens_in_memory < tokens_per_file:
        raise ValueError(
            f"--max_tokens_in_memory {arguments.max_tokens_in_memory} is less than one output file "
            f"({tokens_per_file:,} tokens); raise it or lower --rows_per_file"
        )
    if arguments.clean and arguments.input_format == "tokens":
        raise ValueError("--clean works on text; leave it out with --input_format tokens")


# Files and units


def check_file(file: Path, settings: Settings) -> None:
    """Raise BadFileError for a file that cannot be used; say which columns are not used."""
    if settings.is_text:
        if unused := check_text_file(file):
            print(f"{file}: the columns {', '.join(unused)} are not used")
    else:
        check_token_file(
            file, Path(settings.tokenizer), settings.vocab_size, settings.end_of_document
        )


@dataclass(frozen=True)
class Unit:
    """Pieces of files that are tokenised and packed together, by one process."""

    index: int
    pieces: tuple[Piece, ...]
    files: tuple[InputFile, ...]  # of each piece

    @property
    def name(self) -> str:
        return f"unit-{self.index:06d}"

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    def without(self, skipped: dict[str, str]) -> Unit:
        """Return the unit without the pieces of skipped files; the other units stay as they are."""
        kept = [i for i, piece in enumerate(self.pieces) if str(piece.file) not in skipped]
        return Unit(
            self.index,
            tuple(self.pieces[i] for i in kept),
            tuple(self.files[i] for i in kept),
        )


def plan_units(files: list[InputFile], settings: Settings) -> list[Unit]:
    """Divide the files, in order, into units; depends on their sizes and number of rows only."""
    units: list[Unit] = []
    pieces: list[Piece] = []
    owners: list[InputFile] = []

    def close_unit() -> None:
        if pieces:
            units.append(Unit(len(units), tuple(pieces), tuple(owners)))
            pieces.clear()
            owners.clear()

    cut = text_pieces if settings.is_text else token_pieces
    for file in files:
        found = cut(file.path, max_documents=UNIT_DOCUMENTS, max_bytes=UNIT_BYTES)
        if not found:
            print(f"{file.path}: has no rows")
        for piece in found:
            pieces.append(piece)
            owners.append(file)
            if (
                sum(piece.documents for piece in pieces) >= UNIT_DOCUMENTS
                or sum(piece.num_bytes for piece in pieces) >= UNIT_BYTES
            ):
                close_unit()
    close_unit()
    return units


def reusable_manifest(
    output_dir: Path, options: dict[str, Any], tokenizer: TokenizerEntry, seq_len: int
) -> Manifest | None:
    """Return the manifest of a finished folder, None when there is none yet.

    Raises ValueError, naming what differs, when the folder was prepared with other options.
    """
    if not (output_dir / MANIFEST_NAME).exists():
        return None
    found = load_manifest(output_dir)
    check_same_preparation(
        output_dir,
        {**options, "tokenizer": tokenizer, "seq_len": seq_len},
        {**found.options, "tokenizer": found.tokenizer, "seq_len": found.seq_len},
        [entry for split in found.splits.values() for entry in split.files],
        advice="remove this one",
    )
    return found


# Tokenising and packing, in processes

HASH = "hash"
TOKENISE = "tokenise"


@dataclass(frozen=True)
class Settings:
    """What a process needs to know, the same for all units."""

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    is_text: bool
    clean: bool
    validation_fraction: float
    seq_len: int
    seed: int
    work: str = ""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class UnitJob:
    """A unit to hash or to tokenise; `duplicates` has a bit for each of its documents to drop."""

    kind: str
    unit: Unit
    settings: Settings
    duplicates: bytes | None = None

    @property
    def name(self) -> str:
        """Of what it writes."""
        return self.unit.name if self.kind == TOKENISE else f"hash-{self.unit.name}"

    @property
    def amount(self) -> int:
        """Of work, in bytes of text."""
        return self.unit.num_bytes

    @property
    def key(self) -> str:
        """Return the sha256 of all that its result depends on."""
        content = [
            UNIT_VERSION,
            self.kind,
            asdict(self.settings) | {"tokenizer": "", "work": ""},
            self.unit.index,
            [
                [file.description, file.stamp[:2], piece.start, piece.stop]
                for file, piece in zip(self.unit.files, self.unit.pieces, strict=True)
            ],
            None if self.duplicates is None else self.duplicates.hex(),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tokenise_jobs(units: list[Unit], deduplicate: bool, settings: Settings) -> list[UnitJob]:
    """Return the job of every unit, with its duplicates when the units have been hashed."""
    if not deduplicate:
        return [UnitJob(TOKENISE, unit, settings) for unit in units]
    names = [UnitJob(HASH, unit, settings).name for unit in units]
    hashes = [read_array(Path(settings.work), name, "hashes") for name in names]
    lengths = [len(array) for array in hashes]
    duplicates = later_duplicates(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    ends = accumulate(lengths)
    return [
        UnitJob(TOKENISE, unit, settings, np.packbits(duplicates[end - length : end]).tobytes())
        for unit, end, length in zip(units, ends, lengths, strict=True)
    ]


def later_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return bool [count]: whether an equal hash (uint64) stands earlier.

    Part by part, so that sorting takes little more memory than the hashes themselves.
    """
    duplicate = np.zeros(len(hashes), dtype=bool)
    for part in range(DUPLICATE_PARTITIONS):
        members = np.flatnonzero(hashes % DUPLICATE_PARTITIONS == part)
        order = members[np.argsort(hashes[members], kind="stable")]
        duplicate[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return duplicate


class Worker:
    """Reads the documents of a unit and writes what the job asks for to the work folder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._validation_threshold = int(settings.validation_fraction * 2**64)
        self._encode: Callable[[str], np.ndarray] | None = None  # opened when it is first used
        self._read_piece = (
            partial(read_piece, parquet=ParquetReader())
            if settings.is_text
            else TokenReader(
                Path(settings.tokenizer), settings.vocab_size, settings.end_of_document
            ).read_piece
        )

    def __call__(self, job: UnitJob) -> int | BadFileError:
        """Return the number of tokens, or the first file of the unit that is bad."""
        try:
            return self._hash(job) if job.kind == HASH else self._tokenise(job)
        except BadFileError as error:
            return error

    def _hash(self, job: UnitJob) -> int:
        hashes = [
            text_hash(document.text.encode())
            for _, document in self._documents(job.unit)
            if isinstance(document, Document)
        ]
        self._write(job, {"hashes": np.array(hashes, np.uint64)}, {})
        return 0

    def _tokenise(self, job: UnitJob) -> int:
        settings = self._settings
        splits = {name: Documents(settings.dtype) for name in (TRAIN, VALIDATION)}
        rejected: Counter[str] = Counter()
        quarantine = bytearray()
        input_rows = 0
        for file, document in self._without_duplicates(job):
            input_rows += 1
            if isinstance(document, Document):
                text = document.text.encode()
                held_out = text_hash(text) < self._validation_threshold
                splits[VALIDATION if held_out else TRAIN].add(
                    self._token_ids(document), len(text), document.source
                )
                continue
            rejected[document.reason] += 1
            if document.reason != DUPLICATE:  # which is not bad, and stands elsewhere
                quarantine += quarantine_line(file, document)
        packed = pack_documents(splits[TRAIN].tokens(), splits[TRAIN].lengths(), settings.seq_len)
        arrays = row_arrays(packed, f"{settings.seed}/{TRAIN}/{job.unit.index}")
        arrays["held_out_tokens"] = splits[VALIDATION].tokens()
        arrays["held_out_lengths"] = splits[VALIDATION].lengths()
        arrays["quarantine"] = np.frombuffer(quarantine, np.uint8)
        self._write(
            job,
            arrays,
            {
                "input_rows": input_rows,
                "rejected": rejected,
                "packing": asdict(packed.stats),
                "bytes": {name: split.text_bytes for name, split in splits.items()},
                "documents_per_source": {name: split.sources for name, split in splits.items()},
            },
        )
        return packed.stats.tokens + int(splits[VALIDATION].lengths().sum())

    def _write(self, job: UnitJob, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
        record = {"key": job.key, **record}
        write_unit(Path(self._settings.work), job.name, arrays, record)

    def _documents(self, unit: Unit) -> Iterator[tuple[Path, Document | Rejected]]:
        for piece, file in zip(unit.pieces, unit.files, strict=True):
            check_unchanged(file)  # else a replaced file would be called damaged
            try:
                for document in self._read_piece(piece):
                    yield piece.file, self._cleaned(document)
            finally:
                check_unchanged(file)

    def _cleaned(self, document: Document | Rejected) -> Document | Rejected:
        if isinstance(document, Rejected) or not self._settings.clean:
            return document
        text = clean_text(document.text)
        return replace(document, text=text) if text else Rejected("empty", document.place)

    def _without_duplicates(self, job: UnitJob) -> Iterator[tuple[Path, Document | Rejected]]:
        if job.duplicates is None:
            yield from self._documents(job.unit)
            return
        is_duplicate = iter(np.unpackbits(np.frombuffer(job.duplicates, np.uint8)).tolist())
        for file, document in self._documents(job.unit):
            drop = isinstance(document, Document) and next(is_duplicate)
            yield file, Rejected(DUPLICATE) if drop else document

    def _token_ids(self, document: Document) -> np.ndarray:
        """Return the ids of a document with its end token."""
        found = document.token_ids
        if found is None:
            if self._encode is None:
                self._encode = encode_function(self._settings.tokenizer)
            found = self._encode(document.text)
        return np.append(found, self._settings.end_of_document).astype(self._settings.dtype)


class Documents:
    """Tokenised documents of one split, and what the manifest counts of them."""

    def __init__(self, dtype: np.dtype) -> None:
        self.text_bytes = 0
        self.sources: Counter[str] = Counter()
        self._ids: list[np.ndarray] = [np.zeros(0, dtype)]

    def add(self, ids: np.ndarray, text_bytes: int, source: str) -> None:
        """Add one document."""
        self._ids.append(ids)
        self.text_bytes += text_bytes
        self.sources[source] += 1

    def tokens(self) -> np.ndarray:
        """Return all documents, one after the other."""
        return np.concatenate(self._ids)

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each document."""
        return np.array([len(ids) for ids in self._ids[1:]], np.int64)


def text_hash(text: bytes) -> int:
    """Return 64 bits that decide whether a text is held out and which texts are equal."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8])


def quarantine_line(file: Path, rejected: Rejected) -> bytes:
    """Return a rejected row as a line of the quarantine file."""
    content = {"file": file.name, **asdict(rejected)}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


# The stages after it


def pack_held_out(names: list[str], settings: Settings) -> tuple[list[str], PackingStats]:
    """Pack the held-out documents of all units together, because a unit alone has too few.

    Returns the names of the units that hold their rows.
    """
    work = Path(settings.work)
    stats = PackingStats()
    packed_units: list[str] = []
    tokens: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for position, name in enumerate(names):
        tokens.append(read_array(work, name, "held_out_tokens"))
        lengths.append(read_array(work, name, "held_out_lengths"))
        full = (
            sum(map(len, lengths)) >= UNIT_DOCUMENTS
            or sum(array.nbytes for array in tokens) >= UNIT_BYTES
        )
        if full or position == len(names) - 1:
            packed = pack_documents(
                np.concatenate(tokens), np.concatenate(lengths), settings.seq_len
            )
            held_out = f"{VALIDATION}-{len(packed_units):06d}"
            key = f"{settings.seed}/{VALIDATION}/{len(packed_units)}"
            write_unit(work, held_out, row_arrays(packed, key), {})
            packed_units.append(held_out)
            stats += packed.stats
            tokens, lengths = [], []
    return packed_units, stats


def write_quarantine(path: Path, names: list[str], work: Path) -> None:
    """Write the rejected rows of all units, in the order of the input; no file when none is."""
    lines = (read_array(work, name, "quarantine").tobytes() for name in names)
    first = next((line for line in lines if line), None)
    if first is None:
        return
    with complete_or_absent(path) as file:
        file.write(first)
        for line in lines:
            file.write(line)


# What the user sees


def report(manifest: Manifest, output_dir: Path, seconds: float, *, resumed: bool) -> None:
    """Print what was prepared, and how fast unless an earlier run did a part of it."""
    tokens = sum(split.tokens for split in manifest.splits.values())
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {split.rows:,} "
            f"rows of {manifest.seq_len}; {split.utilisation:.2%} used, "
            f"{split.split_fraction:.2%} of documents split"
        )
    if not manifest.splits[VALIDATION].rows:
        print("validation: empty; raise --validation_fraction to hold documents out")
    rejected = sum(manifest.rejected.values())
    print(
        f"input: {manifest.input_rows:,} rows = {manifest.input_rows - rejected:,} documents + "
        f"{rejected:,} rejected"
    )
    if manifest.rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
        print(f"rejected: {reasons}")
    if (output_dir / QUARANTINE_NAME).exists():
        print(f"rejected rows: {output_dir / QUARANTINE_NAME}")
    if manifest.skipped_files:
        names = ", ".join(file["name"] for file in manifest.skipped_files)
        print(f"skipped files: {len(manifest.skipped_files)} ({names})")
    if resumed:
        print(f"{seconds:.1f} s, after what an earlier run had done")
    else:
        print(f"{tokens / seconds:,.0f} tokens/s over {seconds:.1f} s")


if __name__ == "__main__":
    main()
