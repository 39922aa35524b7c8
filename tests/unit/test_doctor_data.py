"""`doctor --data`: what data is taken for, what is found in it, and what is refused."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import prepare_sft
from mini_llm import doctor
from mini_llm.data import shard_cache
from mini_llm.data.packed_stream import open_prepared
from mini_llm.data.packing import PackedRows
from mini_llm.data.tokenizer import text_encoder, train_tokenizer
from mini_llm.data_doctor import common, conversations, documents, examine, shards
from mini_llm.finding import Finding
from mini_llm.training.arguments import PretrainArguments, check_arguments, parse_arguments
from tests.unit.prepare_fixtures import (
    CHINESE,
    conversation,
    example_texts,
    make_tokenizer,
    prepare,
    write_jsonl,
    write_shard,
    write_shards,
)

SEQ_LEN = 64
CONFIG = "recipes/configs/quickstart/pretrain.yaml"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("doctor") / "tokenizer")


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "other"
    train_tokenizer(["zxcvbnm qwerty " * 9, "asdfgh"], 270).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_shards(folder / "text", shards=2)
    prepare(folder / "text", tokenizer, folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def packed_sft(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed_sft")
    write_jsonl(folder / "chat.jsonl", deepctrl(60))
    flags = ["--input", folder / "chat.jsonl", "--tokenizer", tokenizer, "--output_dir"]
    flags += [folder / "packed", "--seq_len", SEQ_LEN, "--self_awareness", 0, "--num_proc", 1]
    prepare_sft.prepare(prepare_sft.parse_arguments([str(flag) for flag in flags]))
    return folder / "packed"


def deepctrl(count: int) -> list[dict[str, Any]]:
    """Records with an empty instruction; every fifth has a turn before and an empty one."""
    return [
        conversation(
            f" {i} row",
            input=f"训练 {i}",
            history=[["数据", "model"], ["", ""]] if i % 5 == 0 else [],
            type=i % 2,
            data_source="alpaca" if i % 4 else "firefly",
        )
        for i in range(count)
    ]


def write_tokens(path: Path, tokenizer: Path, texts: list[str]) -> Path:
    encoder = text_encoder(tokenizer)
    ids = [token for text in texts for token in [*encoder.encode(text).ids, 0]]
    np.array(ids, "<u2").tofile(path)
    return path


def write_ready_made(path: Path, packed_sft: Path, tokenizer: Path) -> Path:
    """Write the rows of a prepared folder in the columns that ready-made data has."""
    rows = []
    reader = open_prepared(packed_sft, of_conversations=True).reader("train")
    for row in (reader.row_at(number, "") for number in range(reader.rows)):
        lengths = row["doc_lens"]
        rows.append(
            {
                "token_ids": row["input_ids"].tolist(),
                "labels": np.where(row["loss_mask"], row["input_ids"].astype(int), -100).tolist(),
                "position_ids": np.resize(
                    np.concatenate([np.arange(n) for n in lengths]), SEQ_LEN
                ).tolist(),
                "attention_mask": (np.arange(SEQ_LEN) < lengths.sum()).astype(int).tolist(),
                "length": int(lengths.sum()),
                "num_samples": len(lengths),
                "sample_lengths": lengths.tolist(),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def report(
    data: Path | str, tokenizer: Path | None = None, seq_len: int | None = SEQ_LEN
) -> list[Finding]:
    return list(examine(str(data), None if tokenizer is None else str(tokenizer), seq_len))


def ok(found: list[Finding]) -> dict[str, str]:
    """Return subject → detail of a report in which nothing is FAIL and each finding is a line."""
    assert [finding for finding in found if finding.status == "FAIL"] == []
    assert not any("\n" in str(finding) for finding in found)
    assert found[-1].subject == "verdict" and found[-1].detail.startswith("ready; next: ")
    return {finding.subject: finding.detail for finding in found}


def only_failure(found: list[Finding]) -> str:
    """Return the detail of the one FAIL before the verdict, which is FAIL too; each is a line."""
    assert not any("\n" in str(finding) for finding in found)
    failed = [finding for finding in found if finding.status == "FAIL"]
    assert len(failed) == 2 and failed[-1] is found[-1] and found[-1].subject == "verdict", failed
    return failed[0].detail


# Each kind


def test_fineweb_parquet_goes_through_the_whole_pipeline(tokenizer: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, shards=3)
    found = ok(report(tmp_path, tokenizer))
    assert "FineWeb-shaped parquet" in found["data"]
    assert "the first of 3 files" in found["data"] and "000000.parquet" in found["data"]
    assert found["documents"].startswith("60 with ")
    assert found["sources"] == "web 100.0% of the documents"
    assert "overall; web " in found["characters per token"]
    assert " tokens/s" in found["speed"]
    assert "60 documents decoded" in found["round trip"]
    assert "4 rows collated" in found["stream step"]
    assert f"prepare_pretrain.py --input {tmp_path} --tokenizer {tokenizer}" in found["verdict"]
    _, command = found["verdict"].split("or ./launch.sh pretrain ")
    check_arguments(parse_arguments(PretrainArguments, CONFIG, shlex.split(command)), world_size=1)


def test_numbers_are_those_of_the_preparation(tokenizer: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "text", shards=1, documents=200)
    found = ok(report(tmp_path / "text", tokenizer))
    flags = ("--validation_fraction", 0)
    split = prepare(tmp_path / "text", tokenizer, tmp_path / "packed", *flags).splits["train"]
    assert found["packing"].startswith(
        f"{split.utilisation:.2%} used: {split.tokens:,} tokens in {split.rows:,} rows of 64"
    )
    assert f"documents split ({split.split_fraction:.2%})" in found["packing"]
    assert found["tokens in all"].startswith(f"{split.tokens:,} (counted")


def test_rows_that_are_no_documents_are_counted_by_reason_with_the_first_place(
    tokenizer: Path, tmp_path: Path
) -> None:
    texts: list[str | None] = [*example_texts(20)]
    texts[3] = texts[7] = " "
    texts[5] = None
    (finding,) = [
        finding
        for finding in report(write_shard(tmp_path / "a.parquet", texts), tokenizer)
        if finding.subject == "rejected"
    ]
    assert finding.status == "note"
    assert finding.detail == "3 of 20: 2 empty (first: row 3), 1 not_a_string (first: row 5)"


def test_special_tokens_in_a_text_are_counted_and_stay_text(
    tokenizer: Path, tmp_path: Path
) -> None:
    texts = ["<|im_start|> and <|im_start|>", "plain", "<|endoftext|> <think>"]
    found = ok(report(write_shard(tmp_path / "a.parquet", texts), tokenizer))
    assert found["special-token text"] == (
        "1 × <|endoftext|>, 2 × <|im_start|>, 1 × <think>; it is encoded as text"
    )


def test_estimate_of_three_equal_files_is_three_times_one_and_called_an_estimate(
    tokenizer: Path, tmp_path: Path
) -> None:
    texts = example_texts(50)
    for name in ("a", "b", "c"):
        write_shard(tmp_path / f"{name}.parquet", texts)
    encoder = text_encoder(tokenizer)
    tokens = sum(len(encoder.encode(text).ids) + 1 for text in texts)
    found = ok(report(tmp_path, tokenizer))
    assert found["tokens in all"].startswith(
        f"ESTIMATE: about {common.number_in_words(3 * tokens)} in 3 files"
    )


def test_deepctrl_is_examined_as_text_and_as_conversations(tokenizer: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sft_data_zh.jsonl", deepctrl(40))
    with file.open("ab") as lines:
        lines.write(b'{"broken\n')
    report_lines = report(file, tokenizer)
    found = ok(report_lines)
    assert "DeepCtrl jsonl" in found["data"]
    assert found["sources"] == "alpaca 75.0%, firefly 25.0% of the documents"
    assert found["conversations"].startswith("40: 32 single-turn, 8 multi-turn")
    assert found["mended"] == "40 empty_instruction, 8 empty_history_exchange"
    assert found["types"] == "type 0 50.0%, type 1 50.0%"
    reasons = [f.detail for f in report_lines if f.subject == "rejected"]
    assert len(reasons) == 2
    assert all(reason.startswith("1 of 41: 1 invalid_json (first: byte ") for reason in reasons)
    trips = [f.detail for f in report_lines if f.subject == "round trip"]
    assert len(trips) == 2 and "40 conversations" in trips[1]
    assert "prepare_pretrain.py" in found["verdict"] and "prepare_sft.py" in found["verdict"]


def test_what_is_supervised_is_marked_and_its_share_is_exact(
    tokenizer: Path, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": " Yes.\n"}]
    found = ok(report(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer))
    assert "conversations (jsonl or parquet)" in found["data"]
    assert found["the shortest one"] == (
        "«supervised»: <|im_start|>user\\nHi?<|im_end|>\\n<|im_start|>assistant\\n"
        "« Yes.\\n<|im_end|>»\\n"
    )
    encoder = text_encoder(tokenizer)
    supervised = len(encoder.encode(" Yes.\n").ids) + 1
    assert f"({supervised} of " in found["supervised"]
    assert "prepare_sft.py" in found["verdict"] and "prepare_pretrain" not in found["verdict"]


def test_conversations_longer_than_a_row_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    records = [*deepctrl(10), conversation("model " * 200, input="训练")]
    del records[10]["history"]  # so the first record, not this one, tells the kind
    file = write_jsonl(tmp_path / "a.jsonl", records)
    notes = {f.subject: f.detail for f in report(file, tokenizer) if f.status == "note"}
    assert notes["too long"].startswith("1 of 11 are longer than --seq_len 64")


def test_token_file_is_examined_with_its_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    texts = example_texts(50)
    file = write_tokens(tmp_path / "a.bin", tokenizer, texts)
    found = ok(report(file, tokenizer))
    assert "headerless uint16 tokens" in found["data"]
    assert found["documents"].startswith(f"50 with {sum(map(len, texts)):,} characters")
    assert found["tokens in all"].startswith(f"{file.stat().st_size // 2:,} in 1 file(s)")
    assert found["verdict"].endswith("--input_format tokens")


def test_prepared_folder_is_checked_and_decoded(tokenizer: Path, packed: Path) -> None:
    found = ok(report(packed, tokenizer, seq_len=None))
    assert "prepare_pretrain.py" in found["data"]
    assert "is the manifest's" in found["first file"]
    assert "documents of a row give their ids again" in found["decoded"]
    assert f"--tokenizer {tokenizer} --seq_len {SEQ_LEN}" in found["verdict"]


def test_prepared_folder_without_its_tokenizer_is_not_decoded_and_that_is_said(
    packed: Path,
) -> None:
    found = report(packed, None, seq_len=None)
    (note,) = [finding for finding in found if finding.status == "note"]
    assert note.subject == "tokenizer" and "give --tokenizer" in note.detail
    assert "decoded" not in ok(found)


def test_prepared_conversations_are_checked_and_decoded(tokenizer: Path, packed_sft: Path) -> None:
    found = ok(report(packed_sft, tokenizer, seq_len=None))
    assert "prepare_sft.py" in found["data"]
    assert "single_turn 80.0%" in found["types"]
    assert found["the shortest one"].startswith("«supervised»: <|im_start|>user")
    assert "mini_llama3/sft.yaml --data" in found["verdict"]


def test_ready_made_conversations_are_examined(
    tokenizer: Path, packed_sft: Path, tmp_path: Path
) -> None:
    file = write_ready_made(tmp_path / "a.parquet", packed_sft, tokenizer)
    found = ok(report(file, tokenizer))
    assert "ready-made SFT parquet" in found["data"]
    assert "each holds together" in found["rows"]
    assert "mini_llama3/sft.yaml --data" in found["verdict"]


def test_conversations_in_parquet_are_examined_and_streamed_from_as_they_are(
    tokenizer: Path, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    bad = [{"role": "user", "content": "Hi?"}]
    rows = [{"messages": messages}] * 3 + [{"messages": bad}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = report(tmp_path / "a.parquet", tokenizer)
    assert "1 no_assistant_turn (first: row 3)" in {f.subject: f.detail for f in found}["rejected"]
    assert ok(found)["conversations"].startswith("3: 3 single-turn")
    assert "./launch.sh sft" in found[-1].detail and "prepare_sft" not in found[-1].detail


def test_the_projects_tokenizer_is_the_default(tmp_path: Path) -> None:
    found = ok(report(write_shard(tmp_path / "a.parquet", CHINESE), None))
    assert "32,004 ids" in found["tokenizer"] and "mini_llm/tokenizer" in found["verdict"]


def test_names_in_the_data_cannot_break_a_line(tokenizer: Path, tmp_path: Path) -> None:
    table = {"text": ["a"], "score": [0.5], "source": ["web\n\x1b[31mFAIL"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = ok(report(tmp_path, tokenizer))
    assert found["sources"] == "web\\n\\x1b[31mFAIL 100.0% of the documents"


# Bounds


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_large_shard_is_not_read_whole(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for module in (documents, conversations, common):
        monkeypatch.setattr(module, "MAX_DOCUMENTS", 300)
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_shard(file, example_texts(3000), row_group_size=600)
        content = bytearray(file.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 1000] = bytes(1000)  # unreadable from here
        file.write_bytes(content)
    else:
        write_jsonl(file, deepctrl(3000))
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = b"\xff\n" * 10000
        file.write_bytes(content)
    found = ok(report(file, tokenizer))
    assert found["documents"].startswith("300 with ")
    assert "of the file (300 documents" in found["documents"]
    assert found["tokens in all"].startswith("ESTIMATE")
    assert found["rejected"] == "none of 300"
    for module in (documents, conversations):  # what was not read is really bad
        monkeypatch.setattr(module, "MAX_DOCUMENTS", 5000)
    assert {f.status for f in report(file, tokenizer) if f.subject in ("data", "rejected")} != {
        "ok"
    }


def test_reading_ends_after_so_many_bytes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["数据 " * 100] * 50  # 700 bytes each
    monkeypatch.setattr(documents, "MAX_BYTES", 7000)
    found = ok(report(write_shard(tmp_path / "a.parquet", texts), tokenizer))
    assert found["documents"].startswith("10 with ")
    assert "the first 20.00% of the file" in found["documents"]


# What is broken


def cut_off(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-50])
    return file


def edited(file: Path, at: float, change: int = 0xFF) -> Path:
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= change
    file.write_bytes(content)
    return file


def text_file(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def other_columns(folder: Path) -> Path:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), folder / "a.parquet")
    return folder / "a.parquet"


def text_without_source(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["a"]}), folder / "a.parquet")
    return folder / "a.parquet"


def wrong_type(folder: Path) -> Path:
    columns: dict[str, Any] = {"text": [1], "score": [0.5], "source": ["web"]}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "gone", "does not exist"),
    "empty folder": (lambda folder: folder, "it has nothing"),
    "other suffix": (lambda folder: text_file(folder / "a.txt", "a").parent, "it has a.txt"),
    "no byte": (lambda folder: text_file(folder / "a.jsonl", ""), "is empty (0 bytes)"),
    "no row": (lambda folder: write_shard(folder / "a.parquet", []), "has 0 rows"),
    "cut off": (
        lambda folder: cut_off(write_shard(folder / "a.parquet", CHINESE)),
        "is not a readable parquet file, cut off perhaps",
    ),
    "damaged": (
        lambda folder: edited(
            write_shard(folder / "a.parquet", example_texts(500), write_page_checksum=True), 0.2
        ),
        "is damaged",
    ),
    "other columns": (other_columns, "has the columns content, url; needed are text, score, sour"),
    "no source": (text_without_source, "has the columns text; needed are text, score, source"),
    "numbers as text": (wrong_type, "column text of"),
    "other fields": (
        lambda folder: write_jsonl(folder / "a.jsonl", [{"text": "a", "url": "b"}]),
        "has the fields text, url; needed are instruction, input, output, history",
    ),
    "no json": (lambda folder: text_file(folder / "a.jsonl", "a\nb\n"), "no line that is a JSON"),
    "nothing but empty": (
        lambda folder: write_shard(folder / "a.parquet", ["", " "]),
        "0 with 0 characters",
    ),
    "odd bytes": (lambda folder: text_file(folder / "a.bin", "abc"), "an odd number of bytes (3)"),
    "unfinished": (
        lambda folder: text_file(make_folder(folder / "unfinished") / "unit.bin", "ab").parents[1],
        "did not finish",
    ),
    "manifest of nothing": (
        lambda folder: text_file(folder / "manifest.json", "{").parent,
        "is not valid JSON",
    ),
}


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_one_line_that_says_it(
    tokenizer: Path, tmp_path: Path, fault: str
) -> None:
    make, words = BROKEN[fault]
    assert words in only_failure(report(make(tmp_path), tokenizer))


def test_tokens_need_the_tokenizer_they_were_made_with(
    tokenizer: Path, other_tokenizer: Path, packed_sft: Path, tmp_path: Path
) -> None:
    tokens = write_tokens(tmp_path / "a.bin", tokenizer, example_texts(50))
    rows = write_ready_made(tmp_path / "a.parquet", packed_sft, tokenizer)
    for file in (tokens, rows):
        assert "--tokenizer is needed" in only_failure(report(file, None))
    assert "made with another --tokenizer" in only_failure(report(tokens, other_tokenizer))
    assert "give the --tokenizer that" in only_failure(report(rows, other_tokenizer))


def test_prepared_folder_with_other_flags_is_refused(
    tokenizer: Path, other_tokenizer: Path, packed: Path, packed_sft: Path
) -> None:
    for folder in (packed, packed_sft):
        assert "another tokenizer" in only_failure(report(folder, other_tokenizer))
        assert "--seq_len 32: the rows of" in only_failure(report(folder, tokenizer, 32))


@pytest.mark.parametrize("kind", ["packed", "packed_sft"])
def test_prepared_folder_that_was_changed_is_refused(
    tokenizer: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(kind), folder)
    shard = edited(folder / "train" / "000000.parquet", 0.4)
    assert "is not the file of its manifest" in only_failure(report(folder, tokenizer))
    shard.unlink()
    assert "000000.parquet is missing" in only_failure(report(folder, tokenizer))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"seq_len": {SEQ_LEN}', '"seq_len": 32', 1))
    assert "was changed after it was written" in only_failure(report(folder, tokenizer))
    manifest.unlink()
    shutil.rmtree(folder / "stages", ignore_errors=True)
    shutil.copy(request.getfixturevalue(kind) / "train" / "000000.parquet", shard)
    assert "packed rows without the manifest.json" in only_failure(report(folder, tokenizer))


def test_ready_made_row_that_does_not_hold_together_is_named(
    tokenizer: Path, packed_sft: Path, tmp_path: Path
) -> None:
    file = write_ready_made(tmp_path / "a.parquet", packed_sft, tokenizer)
    rows = pq.read_table(file).to_pylist()
    rows = (rows * 100)[: max(80, len(rows))]  # beyond those that opening the file looks at
    rows[-1] = rows[-1] | {"labels": [7] * SEQ_LEN}
    pq.write_table(pa.Table.from_pylist(rows), file)
    detail = only_failure(report(file, tokenizer))
    assert f"1 of {len(rows)} do not fit" in detail and f"a.parquet row {len(rows) - 1}" in detail


@pytest.mark.parametrize("content", [None, "{}", "nothing"])
def test_tokenizer_that_does_not_open_is_named(tmp_path: Path, content: str | None) -> None:
    folder = make_folder(tmp_path / "tokenizer")
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    shard = write_shard(tmp_path / "a.parquet", CHINESE)
    assert f"--tokenizer: {folder} " in only_failure(report(shard, folder))


def test_row_length_out_of_range_names_the_flag(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", CHINESE)
    assert "--seq_len must be at least 4" in only_failure(report(shard, None, 3))


# The comparison can fail


def test_round_trip_fails_where_decoding_is_broken(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = common.OpenTokenizer.decode

    def broken(self: Any, sequences: Any) -> list[str]:
        return [text.replace("狗", "猫") for text in decode(self, sequences)]

    monkeypatch.setattr(common.OpenTokenizer, "decode", broken)
    texts = ["猫", "狗", "row"]
    detail = only_failure(report(write_shard(tmp_path / "a.parquet", texts), tokenizer))
    assert detail == "not exact: 1 of 3 documents do not come back (first: row 1)"


def test_round_trip_fails_where_packing_changes_a_token(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = documents.pack_documents

    def broken(*arguments: Any) -> PackedRows:
        packed = pack(*arguments)
        packed.input_ids[0, 0] ^= 1
        return packed

    monkeypatch.setattr(documents, "pack_documents", broken)
    # One of them is longer than a row: its parts are compared too.
    texts = ["row " * 150, "训练"]
    detail = only_failure(report(write_shard(tmp_path / "a.parquet", texts), tokenizer))
    assert "1 of 2 documents do not come back (first: row 0)" in detail
    assert "parts in the rows are of no document" in detail


def test_round_trip_fails_where_a_question_is_supervised(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = conversations.pack_conversations

    def broken(tokens: Any, supervised: Any, lengths: Any, seq_len: int) -> Any:
        return pack(tokens, np.ones_like(supervised), lengths, seq_len)

    monkeypatch.setattr(conversations, "pack_conversations", broken)
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    assert "1 of 1 conversations do not come back" in only_failure(report(file, tokenizer))


def test_control_tokens_that_come_out_of_text_fail(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "encode_function", lambda _: lambda text: np.array([0, 1]))
    found = report(write_shard(tmp_path / "a.parquet", ["a"]), tokenizer)
    failed = {finding.subject for finding in found if finding.status == "FAIL"}
    assert "special-token text" in failed


# Remote


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server's address; it serves tmp_path/served."""
    monkeypatch.setenv("MINI_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shard_cache, "FIRST_WAIT_SECONDS", 0.001)

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Silent, directory=str(make_folder(tmp_path / "served")))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_file_and_prepared_folder_by_url(
    tokenizer: Path, packed: Path, packed_sft: Path, tmp_path: Path, url: str
) -> None:
    write_shard(tmp_path / "served" / "a.parquet", example_texts(20))
    found = ok(report(f"{url}/a.parquet", tokenizer))
    assert f"{url}/a.parquet" in found["data"] and found["documents"].startswith("20 with")
    assert "./launch.sh pretrain" in found["verdict"]
    assert "prepare_pretrain.py" not in found["verdict"]  # which reads local files only
    shutil.copytree(packed, tmp_path / "served" / "packed")
    assert "decoded" in ok(report(f"{url}/packed", tokenizer, None))
    shutil.copytree(packed_sft, tmp_path / "served" / "sft")
    assert "./launch.sh sft" in ok(report(f"{url}/sft", tokenizer))["verdict"]


def test_url_that_is_wrong_or_too_large_is_named(
    tokenizer: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = only_failure(report(f"{url}/gone.parquet", tokenizer))
    assert f"{url}/gone.parquet does not exist (HTTP 404)" in gone
    assert "a URL is that of a prepared folder or of one" in only_failure(report(f"{url}/texts"))
    write_shard(tmp_path / "served" / "a.parquet", CHINESE)
    monkeypatch.setattr(shards, "MAX_REMOTE_BYTES", 10)
    large = only_failure(report(f"{url}/a.parquet", tokenizer))
    assert "download it (data_tools/download.py)" in large
    assert not list((tmp_path / "cache").rglob("a.parquet"))


def test_first_file_of_a_hub_folder_is_examined(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "hf://datasets/someone/texts/4_5"
    file = write_shard(tmp_path / "000000.parquet", example_texts(20))
    size = file.stat().st_size
    listed = {f"{folder}/000000.parquet": size, f"{folder}/000002.parquet": 9 * size}
    monkeypatch.setattr(shards, "list_hub_files", lambda _: listed)
    monkeypatch.setattr(shards.ShardCache, "fetch", lambda *_, **__: file)
    found = ok(report(folder, tokenizer))
    assert "the first of 2 files" in found["data"]
    assert f"({common.bytes_in_words(10 * size)})" in found["tokens in all"]


def test_hub_in_offline_mode_is_one_line(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    detail = only_failure(report("hf://datasets/someone/texts/4_5", tokenizer))
    assert "HF_HUB_OFFLINE is set" in detail


# The command


def test_doctor_data_exits_with_1_on_a_failure_and_leaves_the_machine_alone(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(doctor, "check_everything", lambda: pytest.fail("the machine is examined"))
    shard = write_shard(tmp_path / "a.parquet", CHINESE)
    flags = ["--data", str(shard), "--tokenizer", str(tokenizer), "--seq_len", "64"]
    monkeypatch.setattr(sys, "argv", ["doctor", *flags])
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    data") and lines[-1].startswith("ok    verdict")
    shard.unlink()
    assert doctor.main() == 1
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["FAIL", "FAIL"]


def test_flags_of_the_data_without_data_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--seq_len", "64"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    assert stopped.value.code == 2 and "belong to --data" in capsys.readouterr().err


def test_check_of_the_machine_loads_nothing_of_the_data_code() -> None:
    code = "import json, sys, mini_llm.doctor; print(json.dumps(list(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True
    ).stdout
    loaded = json.loads(output)
    assert not {"torch", "pyarrow", "transformers", "datasets", "numpy"} & set(loaded)
