"""Prepared folders: is everything as their manifest says, and do their rows decode."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from itertools import islice

import numpy as np

from mini_llm.data.collate import collate
from mini_llm.data.conversations import ChatEncoder
from mini_llm.data.manifest import TRAIN, VALIDATION, FileEntry, Manifest
from mini_llm.data.packed_stream import Row, open_prepared
from mini_llm.data.sft_files import SftManifest
from mini_llm.data.stream import open_stream
from mini_llm.data.tokenizer import text_encoder, tokenizer_fingerprint
from mini_llm.finding import Finding

from .common import (
    ROWS_PER_STEP,
    OpenTokenizer,
    clipped,
    default_tokenizer,
    number_in_words,
    open_tokenizer,
    parts_of_rows,
    shares,
)
from .conversations import examine_rows


def examine_prepared(
    location: str, tokenizer: str | None, seq_len: int | None
) -> Generator[Finding, None, str]:
    """Yield the findings about a folder of packed text; return the flags that fit it.

    Without `tokenizer` the rows are decoded where they were made with the project's own.
    """
    prepared = open_prepared(location)
    manifest = prepared.manifest
    assert isinstance(manifest, Manifest)
    train = manifest.splits[TRAIN]
    yield Finding(
        "ok",
        "data",
        f"folder of data_tools/prepare_pretrain.py: {number_in_words(train.tokens)} tokens in "
        f"{train.rows:,} rows of {manifest.seq_len:,}, {len(train.files):,} file(s)",
    )
    yield Finding("ok", "manifest", f"unchanged (fingerprint {manifest.fingerprint[:12]})")
    name = _name(location)
    prepared.check_fit(name, seq_len=seq_len or manifest.seq_len, tokenizer=tokenizer)
    folder, finding = _tokenizer_of(manifest.tokenizer.fingerprint, tokenizer)
    yield finding
    if not train.rows:
        raise ValueError(f"--data: {location} has no training rows; prepare it from more text")
    yield Finding("ok", "sources", f"{shares(train.documents_per_source)} of the documents")
    rejected = sum(manifest.rejected.values())
    yield Finding("ok", "rejected", f"{rejected:,} of {manifest.input_rows:,} rows and lines")
    first = train.files[0]
    # All files are there with their sizes; the first one's sha256 is what the manifest says.
    prepared.reader(TRAIN).files.path(first)
    yield _whole(first, len(train.files))
    data = {name: {"path": location, "weight": 1.0}}
    with open_stream(
        data, seq_len=manifest.seq_len, seed=0, rows_per_step=ROWS_PER_STEP, tokenizer=folder
    ) as stream:
        rows = list(islice(stream, ROWS_PER_STEP))
    batch = collate(rows)
    highest = int(batch["input_ids"].max())
    yield Finding(
        "ok" if highest < manifest.tokenizer.vocab_size else "FAIL",
        "stream step",
        f"{len(rows)} rows collated: {batch['num_target_tokens']:,} targets; the highest id is "
        f"{highest:,} of {manifest.tokenizer.vocab_size:,}",
    )
    yield Finding(
        "ok",
        "packing",
        f"{train.utilisation:.2%} used, {train.split_fraction:.2%} of documents split",
    )
    if folder is not None:
        yield _decoded(rows, open_tokenizer(folder))
    held_out = manifest.splits[VALIDATION].rows
    detail = f"{held_out:,} held-out rows"
    yield Finding("ok" if held_out else "note", "validation", detail)
    return f"--tokenizer {shlex.quote(folder or 'DIR')} --seq_len {manifest.seq_len}"


def examine_prepared_sft(
    location: str, tokenizer: str | None, seq_len: int | None
) -> Generator[Finding, None, str]:
    """Yield the findings about a folder of packed conversations; return the flags that fit it."""
    prepared = open_prepared(location, of_conversations=True)
    manifest = prepared.manifest
    assert isinstance(manifest, SftManifest)
    train = manifest.splits[TRAIN]
    yield Finding(
        "ok",
        "data",
        f"folder of data_tools/prepare_sft.py: {train.conversations:,} conversations, "
        f"{number_in_words(train.tokens)} tokens in {train.rows:,} rows of {manifest.seq_len:,}, "
        f"{len(train.files):,} file(s)",
    )
    yield Finding("ok", "manifest", f"unchanged (fingerprint {manifest.fingerprint[:12]})")
    folder = tokenizer or default_tokenizer()
    ChatEncoder(folder)  # which checks that it is one for chat
    name = _name(location)
    prepared.check_fit(name, seq_len=seq_len or manifest.seq_len, tokenizer=folder)
    yield _tokenizer_of(manifest.tokenizer.fingerprint, tokenizer)[1]
    yield Finding("ok", "types", shares(train.conversations_per_kind))
    rejected = sum(manifest.rejected.values())
    yield Finding(
        "ok",
        "input",
        f"{manifest.input_lines:,} lines: {rejected:,} rejected, {manifest.not_sampled:,} not "
        "sampled",
    )
    if not train.rows:
        raise ValueError(f"--data: {location} has no training rows; prepare it from more text")
    first = train.files[0]
    # All files are there with their sizes; the first one's sha256 is what the manifest says.
    rows = prepared.reader(TRAIN)
    rows.files.path(first)
    yield _whole(first, len(train.files))
    yield from examine_rows(rows, manifest.seq_len, open_tokenizer(folder))
    held_out = manifest.splits[VALIDATION].rows
    yield Finding("ok" if held_out else "note", "validation", f"{held_out:,} held-out rows")
    return f"--tokenizer {shlex.quote(folder)} --seq_len {manifest.seq_len}"


def _name(location: str) -> str:
    return location.rstrip("/").rsplit("/", 1)[-1]


def _tokenizer_of(fingerprint: str, given: str | None) -> tuple[str | None, Finding]:
    """Return the folder of the tokenizer that made a folder, None where it is not known."""
    short = f"fingerprint {fingerprint[:12]}"
    if given is not None:
        return given, Finding("ok", "tokenizer", f"{given} made the rows ({short})")
    if tokenizer_fingerprint(default_tokenizer()) == fingerprint:
        return default_tokenizer(), Finding("ok", "tokenizer", f"the project's own ({short})")
    detail = f"not the project's own ({short}); give --tokenizer to have rows decoded"
    return None, Finding("note", "tokenizer", detail)


def _whole(first: FileEntry, files: int) -> Finding:
    detail = f"{first.file} is the manifest's (sha256 {first.sha256[:12]})"
    if files > 1:
        detail += f"; the sha256 of the other {files - 1:,} was not checked"
    return Finding("ok", "first file", detail)


def _decoded(rows: list[Row], tokenizer: OpenTokenizer) -> Finding:
    """Decode the row with the most documents; those that end in it must give their ids again."""
    row = max(rows, key=lambda row: len(row["doc_lens"]))
    parts = parts_of_rows([row["input_ids"]], [row["doc_lens"]])
    ended = [part[:-1] for part in parts if part[-1] == tokenizer.end_of_document]
    texts = tokenizer.decode(ended)
    encoder = text_encoder(tokenizer.folder)
    again = [np.array(found.ids) for found in encoder.encode_batch_fast(texts)]
    same = sum(np.array_equal(ids, ours) for ids, ours in zip(ended, again, strict=True))
    # The last part of a split document may begin in the middle of a word.
    detail = f"{same} of {len(ended)} documents of a row give their ids again"
    if not ended:
        return Finding("ok", "decoded", f"a part: {clipped(tokenizer.decode(parts[:1])[0])}")
    return Finding("ok" if same else "FAIL", "decoded", f"{detail}, one is: {clipped(texts[0])}")
