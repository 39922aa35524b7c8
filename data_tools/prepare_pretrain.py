"""Tokenise text and pack it into shuffled parquet rows with a manifest and a held-out split.

    python data_tools/prepare_pretrain.py --input data/fineweb/4_5 --tokenizer data/tokenizer \\
        --output_dir data/fineweb_packed --seq_len 2048

Reads parquet with the columns text, score, source and DeepCtrl jsonl. The result depends on the
text, the tokenizer and the options, not on --num_proc. The rows are shuffled in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from mini_llm.data.packed_files import write_rows
from mini_llm.data.packing import (
    MIN_SEQ_LEN,
    PackedRows,
    PackingStats,
    pack_documents,
)
from mini_llm.data.text_files import (
    Document,
    Rejected,
    find_text_files,
    read_documents,
)
from mini_llm.data.tokenizer import (
    load_tokenizer,
    text_encoder,
    tokenizer_fingerprint,
)

DOCUMENTS_PER_BATCH = 256
# Best fit needs choice: with 8,192 documents at hand a row of 2,048 is > 99.5% full.
WINDOW_DOCUMENTS = 8192
BATCHES_IN_FLIGHT_PER_PROCESS = 4
PROGRESS_SECONDS = 10.0
SAMPLED_BYTES = 64 * 1024


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
        default=8_000_000_000,
        help="stop when the rows to shuffle exceed this (2 bytes per token, twice at the end)",
    )
    return parser.parse_args(command_line)


def available_cpus() -> int:
    """Return the number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare(arguments: argparse.Namespace) -> Manifest:
    """Run the whole preparation, or return the manifest of one that is already done.

    Raises ValueError or OSError, naming the flag, for bad input.
    """
    check_arguments(arguments)
    files = find_text_files(arguments.input)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer: {arguments.tokenizer} has no end-of-document token (eos)")
    vocabulary = TokenizerEntry(tokenizer_fingerprint(arguments.tokenizer), len(tokenizer))
    options = {
        "inputs": [describe_file(file) for file in files],
        "validation_fraction": arguments.validation_fraction,
        "seed": arguments.seed,
        "rows_per_file": arguments.rows_per_file,
        "row_group_rows": arguments.row_group_rows,
    }
    finished = reusable_manifest(arguments.output_dir, options, vocabulary, arguments.seq_len)
    if finished is not None:
        print(f"{arguments.output_dir} is already prepared with these options: nothing to do")
        return finished
    clear_unfinished(arguments.output_dir)

    started = time.monotonic()
    rejected: Counter[str] = Counter()
    dtype = np.dtype(np.uint16 if vocabulary.vocab_size <= 2**16 else np.uint32)
    outputs = {name: SplitRows(name, arguments.seq_len, dtype) for name in (TRAIN, VALIDATION)}
    progress = Progress()
    batches = tokenise_batches(
        document_batches(files, rejected),
        Encoder(arguments.tokenizer, tokenizer.eos_token_id, arguments.validation_fraction, dtype),
        arguments.num_proc,
    )
    for batch in batches:
        for name, output in outputs.items():
            output.add(batch, np.asarray(batch.is_validation) == (name == VALIDATION))
        tokens = sum(output.tokens for output in outputs.values())
        if tokens > arguments.max_tokens_in_memory:
            raise ValueError(
                f"--input: more than {arguments.max_tokens_in_memory:,} tokens to shuffle in "
                "memory; prepare fewer files at a time into several folders, or raise "
                "--max_tokens_in_memory"
            )
        progress.report(tokens)

    splits = {
        name: output.write(
            arguments.output_dir,
            arguments.seed,
            rows_per_file=arguments.rows_per_file,
            row_group_rows=arguments.row_group_rows,
        )
        for name, output in outputs.items()
    }
    if not splits[TRAIN].rows:
        raise ValueError(
            f"--input: no training document is left ({sum(rejected.values())} rows rejected); "
            "give more text or a smaller --validation_fraction"
        )
    manifest = write_manifest(
        arguments.output_dir,
        Manifest(
            seq_len=arguments.seq_len,
            tokenizer=vocabulary,
            splits=splits,
            rejected=dict(sorted(rejected.items())),
            options=options,
        ),
    )
    report(manifest, time.monotonic() - started)
    return manifest


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a flag that is out of range."""
    if arguments.seq_len < MIN_SEQ_LEN:
        raise ValueError(f"--seq_len must be at least {MIN_SEQ_LEN}, got {arguments.seq_len}")
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(
            f"--validation_fraction must lie in [0, 1), got {arguments.validation_fraction}"
        )
    for flag in ("num_proc", "rows_per_file", "row_group_rows", "max_tokens_in_memory"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(arguments, flag)}")


def describe_file(file: Path) -> dict[str, Any]:
    """Return what identifies an input file: name, bytes, sha256 of its first and last 64 KiB.

    The end of a parquet file is its footer, with the sizes and statistics of all its columns, so a
    changed file shows without reading gigabytes.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        digest = hashlib.sha256(content.read(SAMPLED_BYTES))
        content.seek(max(0, size - SAMPLED_BYTES))
        digest.update(content.read())
    return {"name": file.name, "bytes": size, "sampled_sha256": digest.hexdigest()}


def reusable_manifest(
    output_dir: Path, options: dict[str, Any], tokenizer: TokenizerEntry, seq_len: int
) -> Manifest | None:
    """Return the manifest of a finished folder, None when there is none yet.

    Raises ValueError, naming what differs, when the folder was prepared with other options.
    """
    if not (output_dir / MANIFEST_NAME).exists():
        return None
    found = load_manifest(output_dir)
    differing = [key for key in options if options[key] != found.options.get(key)]
    differing += ["tokenizer"] if found.tokenizer != tokenizer else []
    differing += ["seq_len"] if found.seq_len != seq_len else []
    if differing:
        flags = ", ".join("--" + ("input" if key == "inputs" else key) for key in differing)
        raise ValueError(
            f"--output_dir: {output_dir} was prepared with another {flags}; give another folder or "
            "remove this one"
        )
    for split in found.splits.values():
        for entry in split.files:
            path = output_dir / entry.file
            if not path.is_file() or path.stat().st_size != entry.bytes_on_disk:
                raise ValueError(
                    f"--output_dir: {path} is missing or was changed; remove {output_dir} and "
                    "prepare it again"
                )
    return found


def clear_unfinished(output_dir: Path) -> None:
    """Remove what an interrupted preparation left; ValueError when other things are there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    own = {TRAIN, VALIDATION, f"{MANIFEST_NAME}.tmp"}
    foreign = sorted(path.name for path in output_dir.iterdir() if path.name not in own)
    for name in (TRAIN, VALIDATION):
        foreign += sorted(
            f"{name}/{path.name}"
            for path in (output_dir / name).glob("*")
            if path.suffix != ".parquet"
        )
    if foreign:
        raise ValueError(
            f"--output_dir: {output_dir} holds other files ({', '.join(foreign[:3])}); give a new "
            "or empty folder"
        )
    for name in (TRAIN, VALIDATION):
        if (output_dir / name).exists():
            shutil.rmtree(output_dir / name)


# Tokenising


@dataclass(frozen=True)
class TokenisedBatch:
    """Documents in order: `tokens` is all of them, one after the other, each with its end token."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    is_validation: np.ndarray
    sources: list[str]


class Encoder:
    """Turns documents into tokens; it is sent to each process, which opens the tokenizer itself."""

    def __init__(
        self, tokenizer: Path, end_of_document: int, validation_fraction: float, dtype: np.dtype
    ) -> None:
        self._folder = tokenizer
        self._end_of_document = end_of_document
        self._validation_threshold = int(validation_fraction * 2**64)
        self._dtype = dtype
        self._tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokenizer": None}

    def __call__(self, documents: list[Document]) -> TokenisedBatch:
        """Tokenise and choose the held-out documents by the SHA-256 of their text alone."""
        if self._tokenizer is None:
            self._tokenizer = text_encoder(self._folder)
        texts = [document.text for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        raw = [text.encode() for text in texts]
        keys = [int.from_bytes(hashlib.sha256(text).digest()[:8]) for text in raw]
        ids = [np.array([*e.ids, self._end_of_document], dtype=self._dtype) for e in encodings]
        return TokenisedBatch(
            tokens=np.concatenate(ids),
            lengths=np.array([len(document) for document in ids]),
            text_bytes=np.array([len(text) for text in raw]),
            is_validation=np.array([key < self._validation_threshold for key in keys]),
            sources=[document.source for document in documents],
        )


def document_batches(files: Iterable[Path], rejected: Counter[str]) -> Iterator[list[Document]]:
    """Yield the documents of all files in lists; count in `rejected` the rows that are none."""
    batch: list[Document] = []
    for file in files:
        for document in read_documents(file):
            if isinstance(document, Rejected):
                rejected[document.reason] += 1
                continue
            batch.append(document)
            if len(batch) == DOCUMENTS_PER_BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def tokenise_batches(
    batches: Iterable[list[Document]], encoder: Encoder, num_proc: int
) -> Iterator[TokenisedBatch]:
    """Yield the tokenised batches in the order of the input, whatever the number of processes."""
    # One thread per process: num_proc says how many cores are used.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if num_proc == 1:
        yield from map(encoder, batches)
        return
    with ProcessPoolExecutor(
        num_proc, get_context("spawn"), initializer=_remember_encoder, initargs=(encoder,)
    ) as pool:
        waiting: deque[Future[TokenisedBatch]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) >= num_proc * BATCHES_IN_FLIGHT_PER_PROCESS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder_of_process: Encoder


def _remember_encoder(encoder: Encoder) -> None:
    global _encoder_of_process
    _encoder_of_process = encoder


def _encode(documents: list[Document]) -> TokenisedBatch:
    return _encoder_of_process(documents)


# Packing and writing


class SplitRows:
    """The rows of one split: packed window by window, kept in memory, shuffled when written."""

    def __init__(self, name: str, seq_len: int, dtype: np.dtype) -> None:
        self.tokens = 0
        self._name = name
        self._seq_len = seq_len
        self._dtype = dtype
        self._window_tokens: list[np.ndarray] = []
        self._window_lengths: list[np.ndarray] = []
        self._window_documents = 0
        self._packed: list[PackedRows] = []
        self._text_bytes = 0
        self._documents_per_source: Counter[str] = Counter()

    def add(self, batch: TokenisedBatch, chosen: np.ndarray) -> None:
        """Add the documents of a batch where `chosen` is true."""
        if not chosen.any():
            return
        lengths = batch.lengths[chosen]
        self._window_tokens.append(batch.tokens[np.repeat(chosen, batch.lengths)])
        self._window_lengths.append(lengths)
        self._window_documents += len(lengths)
        self.tokens += int(lengths.sum())
        self._text_bytes += int(batch.text_bytes[chosen].sum())
        self._documents_per_source.update(
            source for source, keep in zip(batch.sources, chosen, strict=True) if keep
        )
        if self._window_documents >= WINDOW_DOCUMENTS:
            self._pack_window()

    def write(
        self, output_dir: Path, seed: int, *, rows_per_file: int, row_group_rows: int
    ) -> Split:
        """Pack what is left, shuffle all rows with `seed` and write the parquet files."""
        self._pack_window()
        stats = sum((packed.stats for packed in self._packed), PackingStats())
        doc_lens = [lengths for packed in self._packed for lengths in packed.doc_lens]
        input_ids = (
            np.concatenate([packed.input_ids for packed in self._packed])
            if self._packed
            else np.zeros((0, self._seq_len), self._dtype)
        )
        self._packed.clear()
        order = shuffled_order(stats.rows, f"{seed}/{self._name}")
        files = [
            write_rows(
                output_dir,
                f"{self._name}/{index:06d}.parquet",
                input_ids,
                doc_lens,
                order[start : start + rows_per_file],
                row_group_rows=row_group_rows,
            )
            for index, start in enumerate(range(0, stats.rows, rows_per_file))
        ]
        return Split(
            rows=stats.rows,
            tokens=stats.tokens,
            documents=stats.documents,
            bytes=self._text_bytes,
            documents_per_source=dict(sorted(self._documents_per_source.items())),
            utilisation=round(stats.utilisation(self._seq_len), 6),
            split_fraction=round(stats.split_fraction, 6),
            files=files,
        )

    def _pack_window(self) -> None:
        if not self._window_documents:
            return
        self._packed.append(
            pack_documents(
                np.concatenate(self._window_tokens),
                np.concatenate(self._window_lengths),
                self._seq_len,
            )
        )
        self._window_tokens.clear()
        self._window_lengths.clear()
        self._window_documents = 0


def shuffled_order(rows: int, key: str) -> np.ndarray:
    """Return a permutation of range(rows) that depends on `key` alone, not on the numpy version."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16])
    return np.argsort(np.random.PCG64(seed).random_raw(rows), kind="stable")


# What the user sees


class Progress:
    """Prints a line now and then while documents are tokenised."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def report(self, tokens: int) -> None:
        """Say how far it is, if the last line is some seconds old."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            print(f"{tokens:,} tokens, {tokens / (now - self._started):,.0f} tokens/s", flush=True)


def report(manifest: Manifest, seconds: float) -> None:
    """Print what was prepared."""
    tokens = sum(split.tokens for split in manifest.splits.values())
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {split.rows:,} "
            f"rows of {manifest.seq_len}; {split.utilisation:.2%} used, "
            f"{split.split_fraction:.2%} of documents split"
        )
    if not manifest.splits[VALIDATION].rows:
        print("validation: empty; raise --validation_fraction to hold documents out")
    if manifest.rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rejected.items())
        print(f"rejected: {reasons}")
    print(f"{tokens / seconds:,.0f} tokens/s over {seconds:.1f} s")


if __name__ == "__main__":
    main()
