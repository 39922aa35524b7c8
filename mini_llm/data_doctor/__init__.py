"""`./launch.sh doctor --data PATH`: one shard of anything through the pipeline that trains on it.

Takes the first file at PATH, reads a bounded part of it and does with it what a preparation and a
run would do, by the same code: read, tokenise, pack, write, open, collate, decode. What comes out
is compared with what went in.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from mini_llm.data.packing import MIN_SEQ_LEN
from mini_llm.data.shard_cache import is_remote
from mini_llm.data.text_files import BadFileError
from mini_llm.finding import Finding

from .common import bytes_in_words, default_tokenizer, one_line, open_tokenizer, printable
from .conversations import examine_conversations, examine_ready_made
from .documents import examine_text, examine_token_file
from .prepared import examine_prepared, examine_prepared_sft
from .shards import Kind, Shard, find_shard, kind_of, prepared_kind

DEFAULT_SEQ_LEN = 2048


def examine(data: str, tokenizer: str | None, seq_len: int | None) -> Iterator[Finding]:
    """Yield the findings about the first shard at `data`, a path or URL; the last is the verdict.

    Without `tokenizer`, a folder, it is the project's own; without `seq_len` what a prepared folder
    says, else 2,048.
    """
    failed = 0
    next_commands: list[str] = []
    for finding in _failures_as_findings(data, _examined(data, tokenizer, seq_len, next_commands)):
        failed += finding.status == "FAIL"
        yield replace(finding, detail=printable(finding.detail))
    if failed:
        yield Finding(
            "FAIL", "verdict", "not usable as it is: put right what FAIL says and run this again"
        )
    else:
        yield Finding("ok", "verdict", f"ready; next: {'; or '.join(next_commands)}")


def _failures_as_findings(data: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """End with a FAIL where something raises for the data, the flags, the disk or the network."""
    try:
        yield from findings
    except BadFileError as error:  # its message is about the --input of the preparations
        yield Finding("FAIL", "data", f"{error.fault}; get it again or leave it out")
    except (OSError, ValueError, NotImplementedError, pa.ArrowException) as error:
        message = one_line(error)
        named = message if message.startswith("--") else f"--data: {data}: {message}"
        yield Finding("FAIL", "data", named)


def _examined(
    data: str, tokenizer: str | None, seq_len: int | None, next_commands: list[str]
) -> Iterator[Finding]:
    """Yield the findings, and put into `next_commands` what to run when none is a FAIL."""
    if seq_len is not None and seq_len < MIN_SEQ_LEN:
        raise ValueError(f"--seq_len must be at least {MIN_SEQ_LEN}, got {seq_len}")
    # The flags of the next command: what was given here belongs to it too.
    folder = tokenizer or default_tokenizer()
    flags = f"--tokenizer {shlex.quote(folder)} --seq_len {seq_len or DEFAULT_SEQ_LEN}"
    quoted = shlex.quote(data)
    mapping = shlex.quote(json.dumps({"name": {"path": data, "weight": 1.0}}, ensure_ascii=False))
    prepare_text = f"python data_tools/prepare_pretrain.py --input {quoted} {flags}"
    prepare_text += " --output_dir data/packed"
    prepare_chat = f"python data_tools/prepare_sft.py --input {quoted} {flags}"
    prepare_chat += " --output_dir data/sft_packed"
    # Without --config they would be the quickstart's runs, into its folders.
    pretrain, sft = (
        f"./launch.sh {recipe} --config recipes/configs/mini_llama3/{recipe}.yaml --data {mapping}"
        for recipe in ("pretrain", "sft")
    )
    sft_raw = f"{sft} {flags} --max_steps 1000"  # epochs are not counted beforehand

    kind = prepared_kind(data)
    if kind is Kind.PREPARED:
        fitting = yield from examine_prepared(data, tokenizer, seq_len)
        next_commands.append(f"{pretrain} {fitting}")
        return
    if kind is Kind.PREPARED_SFT:
        fitting = yield from examine_prepared_sft(data, tokenizer, seq_len)
        next_commands.append(f"{sft} {fitting}")
        return

    shard = find_shard(data)
    kind = kind_of(shard.path)
    yield Finding("ok", "data", f"{kind.value}; {_described(shard)}")
    if shard.others:
        yield Finding("note", "other files", f"not examined, give their paths: {shard.others}")
    if kind in (Kind.TOKENS, Kind.READY_MADE_SFT) and tokenizer is None:
        raise ValueError(
            "--tokenizer is needed: nothing in ready-made tokens says which one they were made with"
        )
    opened = open_tokenizer(folder)
    yield Finding("ok", "tokenizer", f"{folder}, {opened.vocab_size:,} ids")
    row = seq_len or DEFAULT_SEQ_LEN
    if kind is Kind.TOKENS:
        yield from examine_token_file(shard, opened, row)
        next_commands.append(f"{prepare_text} --input_format tokens")
    elif kind is Kind.READY_MADE_SFT:
        yield from examine_ready_made(shard, opened, row)
        if not is_remote(data):
            next_commands.append(f"{sft} {flags}")
    elif kind is Kind.CONVERSATIONS:
        yield from examine_conversations(shard, opened, row)
        if shard.path.suffix == ".jsonl":
            next_commands.append(prepare_chat)
        next_commands.append(sft_raw)
    elif kind is Kind.FINEWEB:
        yield from examine_text(shard, opened, row)
        next_commands += [prepare_text, f"{pretrain} {flags}"]
    else:
        # Either way may fail while the other is fine, and both are worth knowing.
        yield Finding("ok", "1. as text", "a record is one document: all its turns, one a line")
        yield from _failures_as_findings(data, examine_text(shard, opened, row))
        yield Finding("ok", "2. as conversations", "answers are supervised, nothing is split")
        yield from _failures_as_findings(data, examine_conversations(shard, opened, row))
        next_commands += [f"{prepare_text} (as text)", f"{prepare_chat} (as conversations)"]
        next_commands.append(f"{sft_raw} (as conversations)")
    if is_remote(data):  # which the preparations do not read
        next_commands[:] = [c for c in next_commands if not c.startswith("python data_tools/")]
        next_commands.append("download it, and doctor --data FOLDER says what else can be done")


def _described(shard: Shard) -> str:
    first = f"{shard.name} ({bytes_in_words(shard.path.stat().st_size)})"
    if shard.files == 1:
        return first
    return f"the first of {shard.files:,} files, {bytes_in_words(shard.total_bytes)}: {first}"
