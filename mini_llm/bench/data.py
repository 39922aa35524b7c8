"""Speed of the data path in one process: text to packed rows, and packed rows read back."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest import (
    TRAIN,
    VALIDATION,
    Manifest,
    Split,
    TokenizerEntry,
    write_manifest,
)
from ..data.packed_files import write_rows
from ..data.packing import PackedRows, pack_documents
from ..data.stream import open_stream
from ..data.text_files import Document, find_text_files, read_documents
from ..data.tokenizer import END_OF_TEXT_ID, encode_function, text_encoder, tokenizer_fingerprint
from .measure import interleaved, machine, markdown_table, median_and_range
from .names import BenchmarkError

STREAM_TOKENS = 16 << 20
ROWS_PER_STEP = 256


def run(inputs: list[Path], tokenizer: Path, seq_len: int, repeats: int) -> dict[str, Any]:
    """Measure both, print each figure when it is there, and return them all.

    `inputs` is text as for data_tools/prepare_pretrain.py. Raises ValueError or OSError for bad
    input.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as in each of our processes
    documents = [
        document.text
        for file in find_text_files(inputs)
        for document in read_documents(file)
        if isinstance(document, Document)
    ]
    characters = sum(map(len, documents))
    print(f"{len(documents):,} documents, {characters:,} characters")
    ours, theirs = encode_function(tokenizer), text_encoder(tokenizer)
    vocab_size = theirs.get_vocab_size()

    def tokenise_and_pack() -> PackedRows:
        return _packed([ours(text) for text in documents], seq_len, vocab_size)

    def with_encode_batch() -> PackedRows:
        encodings = theirs.encode_batch(documents, add_special_tokens=False)
        return _packed([np.array(encoding.ids) for encoding in encodings], seq_len, vocab_size)

    packed = tokenise_and_pack()
    if not np.array_equal(packed.input_ids, with_encode_batch().input_ids):
        raise BenchmarkError("the two ways to tokenise give other ids: a mistake of this program")
    ways = {"ours": tokenise_and_pack, "encode_batch": with_encode_batch}
    seconds = {way: of["cpu"] for way, of in interleaved(ways, repeats).items()}
    tokens = packed.stats.tokens
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["encode_batch"], strict=True)]
    speeds = {
        name: [tokens / second / 1e6 for second in values] for name, values in seconds.items()
    }
    print(f"tokenise and pack: {median_and_range(speeds['ours'])} M tokens/s")
    print(f"  through encode_batch: {median_and_range(speeds['encode_batch'])} M tokens/s")
    print(f"  ratio of each pair: {median_and_range(ratios)}")

    with tempfile.TemporaryDirectory() as folder:
        written = _write_folder(Path(folder), packed, tokenizer, seq_len, vocab_size)
        rows = ROWS_PER_STEP * max(written // ROWS_PER_STEP, 1)

        def read_an_epoch() -> None:
            data = {"main": {"path": folder}}
            with open_stream(data, seq_len=seq_len, seed=0, rows_per_step=ROWS_PER_STEP) as stream:
                for _ in range(rows):
                    next(stream)

        read = interleaved({"stream": read_an_epoch}, repeats)["stream"]["cpu"]
    stream_speeds = [rows * seq_len / second / 1e6 for second in read]
    print(
        f"stream, 1 rank, opened and checked each time: {median_and_range(stream_speeds)} "
        "M tokens/s"
    )
    print(
        f"packed rows of {seq_len}: {packed.stats.utilisation(seq_len):.2%} used, "
        f"{packed.stats.split_fraction:.2%} of documents split"
    )
    return {
        **machine("tokenizers", "tiktoken", "datasets", "pyarrow", "numpy"),
        "documents": len(documents),
        "tokens": tokens,
        "seq_len": seq_len,
        "repeats": repeats,
        "tokenise_and_pack_tokens_per_second": statistics.median(speeds["ours"]) * 1e6,
        "encode_batch_and_pack_tokens_per_second": statistics.median(speeds["encode_batch"]) * 1e6,
        "ratio": statistics.median(ratios),
        "stream_tokens_per_second": statistics.median(stream_speeds) * 1e6,
        "utilisation": packed.stats.utilisation(seq_len),
        "split_fraction": packed.stats.split_fraction,
    }


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    speeds = {
        "tokenise and pack": "tokenise_and_pack_tokens_per_second",
        "the same through encode_batch of tokenizers": "encode_batch_and_pack_tokens_per_second",
        "stream, 1 rank, opened and checked each time": "stream_tokens_per_second",
    }
    rows = [[name, f"{figures[key] / 1e6:.2f} M"] for name, key in speeds.items()]
    return (
        f"{figures['documents']:,} documents, {figures['tokens']:,} tokens, CPU time, medians of "
        f"{figures['repeats']} calls\n\n" + markdown_table(["", "tokens/s"], rows)
    )


def _packed(ids: list[np.ndarray], seq_len: int, vocab_size: int) -> PackedRows:
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    ended = [np.append(document, END_OF_TEXT_ID).astype(dtype) for document in ids]
    lengths = np.array([len(document) for document in ended])
    return pack_documents(np.concatenate(ended), lengths, seq_len)


def _write_folder(
    folder: Path, packed: PackedRows, tokenizer: Path, seq_len: int, vocab_size: int
) -> int:
    """Write the rows, again and again, until there are STREAM_TOKENS; return how many rows."""
    copies = -(-STREAM_TOKENS // (packed.stats.rows * seq_len))
    rows = np.tile(np.arange(packed.stats.rows), copies)
    entry = write_rows(
        folder,
        f"{TRAIN}/000000.parquet",
        packed.input_ids,
        packed.doc_lens,
        rows,
        row_group_rows=64,
    )
    empty = Split(0, 0, 0, 0, {}, 0.0, 0.0, [])
    train = Split(entry.rows, entry.tokens, 0, 0, {}, 0.0, 0.0, [entry])
    vocabulary = TokenizerEntry(tokenizer_fingerprint(tokenizer), vocab_size)
    splits = {TRAIN: train, VALIDATION: empty}
    write_manifest(folder, Manifest(seq_len, vocabulary, splits, {}, {}))
    return entry.rows
