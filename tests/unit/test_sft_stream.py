"""Conversations in the stream: alike from every format, exact, elastic, resumable, flat memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import prepare_sft
from mini_llm.data import (
    collate,
    one_document_per_row,
    open_sft_stream,
    open_sft_validation,
    open_stream,
    raw_conversations,
    raw_stream,
    train_tokenizer,
)
from mini_llm.data.conversation_files import Found, from_record, read_lines
from mini_llm.data.conversations import ChatEncoder
from mini_llm.data.manifest import TokenizerEntry
from mini_llm.data.sft_files import (
    PackedConversations,
    SftManifest,
    SftSplit,
    write_sft_manifest,
    write_sft_rows,
)
from mini_llm.data.stream import Row, RowStream
from mini_llm.data.text_files import Piece, read_piece
from tests.unit.hub_server import COMMIT, HubServer
from tests.unit.prepare_fixtures import (
    REPOSITORY,
    make_tokenizer,
    prepare,
    write_jsonl,
    write_shards,
)

SEQ_LEN = 128
RECORDS = 230

# A conversation: its ids, and those of its supervised tokens.
Tokens = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("sft") / "tokenizer")


Kind = str  # of record: what its keys are
KINDS = ("messages", "conversations", "deepctrl")


def record(i: int, kind: Kind) -> dict[str, Any]:
    """A conversation, every fifth with a turn before; no two alike."""
    turns = [("早", f"好{i}")] * (i % 5 == 0) + [(f"row {i}", f"训练 {'x' * (i % 20)}{i}")]
    if kind == "deepctrl":
        (question, answer), past = turns[-1], [list(turn) for turn in turns[:-1]]
        return {"instruction": question, "input": "", "output": answer, "history": past}
    role, content, names = (
        ("role", "content", ("user", "assistant"))
        if kind == "messages"
        else ("from", "value", ("human", "gpt"))
    )
    said = [
        {role: name, content: text}
        for turn in turns
        for name, text in zip(names, turn, strict=True)
    ]
    system = [{role: "system", content: "简短"}] * (i % 2)
    return {kind: system + said}


def records(*kinds: Kind, count: int = RECORDS) -> list[dict[str, Any]]:
    """Records of the kinds in turn."""
    return [record(i, kinds[i % len(kinds)]) for i in range(count)]


def encoded(given: Iterable[dict[str, Any]], tokenizer: Path) -> Counter[Tokens]:
    """The conversations of records, by ChatEncoder directly."""
    encoder = ChatEncoder(tokenizer)
    tokens: Counter[Tokens] = Counter()
    for one_record in given:
        found = from_record(one_record)
        assert isinstance(found, Found)
        one = encoder.encode(found.messages)
        supervised = one.input_ids[1:][one.labels[1:] >= 0]
        tokens[tuple(one.input_ids.tolist()), tuple(supervised.tolist())] += 1
    return tokens


def conversations_of(rows: Iterable[Row]) -> Counter[Tokens]:
    """The conversations of rows; what follows them must be padding."""
    tokens: Counter[Tokens] = Counter()
    for row in rows:
        assert row["loss_mask"].dtype == bool and row["loss_mask"].shape == (SEQ_LEN,)
        assert row["loss_mask"].any()
        ends = np.cumsum(row["doc_lens"])
        for start, end in zip(ends - row["doc_lens"], ends, strict=True):
            ids, mask = row["input_ids"][start:end], row["loss_mask"][start:end]
            tokens[tuple(ids.tolist()), tuple(ids[mask].tolist())] += 1
        assert not row["input_ids"][ends[-1] :].any() and not row["loss_mask"][ends[-1] :].any()
    return tokens


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_jsonl(folder / "chat.jsonl", records(*KINDS))
    flags = ["--input", folder / "chat.jsonl", "--tokenizer", tokenizer, "--output_dir"]
    flags += [folder / "packed", "--seq_len", SEQ_LEN, "--self_awareness", 0, "--num_proc", 1]
    flags += ["--validation_fraction", 0.1, "--rows_per_file", 40, "--row_group_rows", 7]
    manifest = prepare_sft.prepare(prepare_sft.parse_arguments([str(flag) for flag in flags]))
    assert isinstance(manifest, SftManifest) and len(manifest.splits["train"].files) > 1
    return folder / "packed"


@pytest.fixture
def open_chat(tokenizer: Path) -> Any:
    def open_it(path: object, **options: Any) -> RowStream:
        defaults: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 1}
        defaults |= {"tokenizer": tokenizer, "prefetch": False}
        return open_sft_stream({"chat": {"path": path}}, **(defaults | options))

    return open_it


def test_prepared_folder_gives_the_conversations_of_its_input_once_an_epoch(
    prepared: Path, open_chat: Any, tokenizer: Path
) -> None:
    with open_chat(prepared) as stream:
        rows = [next(stream) for _ in range(stream.rows_per_epoch)]
        again = [next(stream) for _ in range(stream.rows_per_epoch)]
    held_out = open_sft_validation(
        {"chat": {"path": prepared}}, seq_len=SEQ_LEN, tokenizer=tokenizer
    )["chat"]
    assert held_out.total == len(held_out.rows) > 0
    train = conversations_of(rows)
    assert train == conversations_of(again)
    assert train + conversations_of(held_out.rows) == encoded(records(*KINDS), tokenizer)


def test_every_row_of_an_epoch_comes_once_over_any_ranks_and_after_a_resume_with_others(
    prepared: Path, open_chat: Any
) -> None:
    with open_chat(prepared, rows_per_step=6) as stream:
        rows_per_epoch = stream.rows_per_epoch
        steps = 2 * rows_per_epoch // 6
        expected = [next(stream)["input_ids"].tobytes() for _ in range(6 * steps)]
    assert len(set(expected[:rows_per_epoch])) == rows_per_epoch
    state, got = None, []
    for step, world_size in zip(range(steps), [1, 2, 3, 2] * steps, strict=False):
        for rank in range(world_size):
            with open_chat(prepared, rows_per_step=6, rank=rank, world_size=world_size) as stream:
                if state is not None:
                    stream.load_state_dict(json.loads(json.dumps(state)))
                got += [next(stream)["input_ids"].tobytes() for _ in range(6 // world_size)]
                after = stream.state_dict()
        state = after
        assert got == expected[: 6 * (step + 1)]


def test_collate_labels_supervised_tokens_and_rows_without_a_mask_all_but_first_ones(
    prepared: Path, open_chat: Any
) -> None:
    with open_chat(prepared) as stream:
        supervised = next(stream)
    plain = Row(input_ids=supervised["input_ids"], doc_lens=supervised["doc_lens"], source="x")
    batch = collate([supervised, plain])
    ids = supervised["input_ids"].astype(np.int64)
    expected = np.where(supervised["loss_mask"], ids, -100)
    assert batch["labels"][0].tolist() == expected.tolist()
    lengths = supervised["doc_lens"]
    assert int((batch["labels"][1] >= 0).sum()) == int((lengths - 1).sum())
    count = int(supervised["loss_mask"].sum()) + int((lengths - 1).sum())
    assert batch["num_target_tokens"] == count


def test_one_document_per_row_keeps_every_document_and_its_supervised_tokens(
    prepared: Path, open_chat: Any
) -> None:
    with open_chat(prepared) as stream:
        rows = [next(stream) for _ in range(5)]
    padding = Row(
        input_ids=np.zeros(SEQ_LEN, np.uint16), doc_lens=np.zeros(0, np.int32), source="chat"
    )
    unpacked = one_document_per_row([*rows, padding])
    longest = max(int(row["doc_lens"].max()) for row in rows)
    assert len(unpacked) == sum(len(row["doc_lens"]) for row in rows) > len(rows)
    assert {row["input_ids"].shape for row in unpacked} == {(longest,)}
    packed, apart = collate(rows), collate(unpacked)
    assert packed["num_target_tokens"] == apart["num_target_tokens"] > 0
    for name in ("input_ids", "labels"):
        ends = [np.cumsum(row["doc_lens"]) for row in rows]
        documents = [
            part.tolist()
            for row, cuts in zip(packed[name].numpy(), ends, strict=True)
            for part in np.split(row, cuts)[:-1]
        ]
        alone = apart[name].numpy()
        lengths = [int(row["doc_lens"][0]) for row in unpacked]
        assert [row[:n].tolist() for row, n in zip(alone, lengths, strict=True)] == documents


def test_folder_for_the_other_recipe_is_refused_with_the_command_that_takes_it(
    prepared: Path, open_chat: Any, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds packed conversations.*launch\.sh sft"):
        open_stream({"a": {"path": prepared}}, seq_len=SEQ_LEN, seed=0, rows_per_step=1)
    write_shards(tmp_path / "text", 1)
    prepare(tmp_path / "text", tokenizer, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"packed text for pretraining.*launch\.sh pretrain"):
        open_chat(tmp_path / "packed")


def test_prepared_rows_of_another_length_or_tokenizer_name_the_flag(
    prepared: Path, open_chat: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"--seq_len 64: .* use --seq_len {SEQ_LEN}"):
        open_chat(prepared, seq_len=64)
    train_tokenizer(["other words than those " * 9], 270).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="--tokenizer: the data 'chat' was packed with another"):
        open_chat(prepared, tokenizer=tmp_path)


def test_prepared_file_that_was_replaced_is_known_by_its_sha256(
    prepared: Path, open_chat: Any, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    shard = tmp_path / "copy/train/000000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with (
        open_chat(tmp_path / "copy") as stream,
        pytest.raises(ValueError, match=r"000000\.parquet is not the file of its manifest"),
    ):
        for _ in range(stream.rows_per_epoch):
            next(stream)


# Ready-made rows


def ready_made(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Rows in the columns that ready-made data has."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        length = int(row["doc_lens"].sum())
        ids = row["input_ids"].astype(np.int64)
        positions = np.concatenate([np.arange(n) for n in row["doc_lens"]])
        values = {
            "token_ids": ids.tolist(),
            "labels": np.where(row["loss_mask"], ids, -100).tolist(),
            "position_ids": np.pad(positions, (0, len(ids) - length)).tolist(),
            "attention_mask": (np.arange(len(ids)) < length).astype(int).tolist(),
            "length": length,
            "type": "packed",
            "num_samples": len(row["doc_lens"]),
            "sample_lengths": row["doc_lens"].tolist(),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns


@pytest.fixture(scope="module")
def packed_rows(prepared: Path, tokenizer: Path) -> list[Row]:
    """The rows of the prepared folder, over and over, as many as make 250."""
    data = {"chat": {"path": prepared}}
    with open_sft_stream(
        data, seq_len=SEQ_LEN, seed=0, rows_per_step=1, tokenizer=tokenizer
    ) as stream:
        return [next(stream) for _ in range(250)]


def key(row: Row) -> tuple[bytes, bytes, bytes]:
    return row["input_ids"].tobytes(), row["loss_mask"].tobytes(), row["doc_lens"].tobytes()


def test_ready_made_rows_are_read_as_our_own_and_every_hundredth_is_held_out(
    packed_rows: list[Row], open_chat: Any, tokenizer: Path, tmp_path: Path
) -> None:
    table = pa.table(ready_made(packed_rows))
    pq.write_table(table.slice(0, 130), tmp_path / "a.parquet", row_group_size=60)
    pq.write_table(table.slice(130), tmp_path / "b.parquet", row_group_size=7)
    expected = Counter(key(row) for i, row in enumerate(packed_rows) if i % 100 != 99)
    got: Counter[Any] = Counter()
    for rank in range(2):
        with open_chat(tmp_path, rank=rank, world_size=2, rows_per_step=248) as stream:
            assert stream.rows_per_epoch == 248
            got.update(key(next(stream)) for _ in range(124))
    assert got == expected
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "tokenizer": tokenizer}
    held_out = open_sft_validation({"chat": {"path": tmp_path}}, **options)["chat"]
    assert [key(row) for row in held_out.rows] == [key(packed_rows[i]) for i in (99, 199)]
    assert held_out.total == 2
    pq.write_table(table.slice(0, 99), tmp_path / "few.parquet")
    few = {"chat": {"path": [tmp_path / "few.parquet"]}}
    assert open_sft_validation(few, **options)["chat"].total == 0
    with open_chat(tmp_path / "few.parquet") as stream:
        assert stream.rows_per_epoch == 99


def test_ready_made_rows_resume_with_other_ranks_and_are_known_by_size_and_rows(
    packed_rows: list[Row], open_chat: Any, tmp_path: Path
) -> None:
    table = pa.table(ready_made(packed_rows[:50]))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    with open_chat(tmp_path, rows_per_step=6) as stream:
        rows = [key(next(stream)) for _ in range(60)]
    got = []
    for rank in range(3):
        with open_chat(tmp_path, rows_per_step=6, rank=rank, world_size=3) as stream:
            got += [key(next(stream)) for _ in range(2)]
            state = stream.state_dict()
    with open_chat(tmp_path, rows_per_step=6) as stream:
        stream.load_state_dict(json.loads(json.dumps(state)))
        assert got + [key(next(stream)) for _ in range(54)] == rows
    pq.write_table(table.slice(1), tmp_path / "a.parquet", row_group_size=8)
    with open_chat(tmp_path) as stream, pytest.raises(ValueError, match="fingerprint: 'chat'"):
        stream.load_state_dict(state)


def test_ready_made_single_conversations_become_padded_rows(
    packed_rows: list[Row], open_chat: Any, tmp_path: Path
) -> None:
    row = packed_rows[0]
    n = int(row["doc_lens"][0])
    ids, mask = row["input_ids"][:n], row["loss_mask"][:n]
    labels = np.where(mask, ids.astype(int), -100).tolist()
    columns: dict[str, Any] = {"token_ids": [ids.tolist()], "labels": [labels]}
    columns |= {"position_ids": [list(range(n))], "attention_mask": [[1] * n], "length": [n]}
    pq.write_table(pa.table(columns), tmp_path / "one.parquet")
    with open_chat(tmp_path) as stream:
        found = next(stream)
    assert found["doc_lens"].tolist() == [n]
    assert found["input_ids"].tolist() == ids.tolist() + [0] * (SEQ_LEN - n)
    assert found["loss_mask"].tolist() == mask.tolist() + [False] * (SEQ_LEN - n)
    with pytest.raises(ValueError, match=rf"row 0: it has {n} tokens; use --seq_len {n}"):
        open_chat(tmp_path, seq_len=n - 1)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("length", lambda v: v - 1, "length is"),
        ("num_samples", lambda v: v + 1, "sample_lengths has"),
        ("sample_lengths", lambda v: [*v[:-1], v[-1] + 1], "sample_lengths has"),
        ("position_ids", lambda v: list(range(len(v))), "position_ids do not count"),
        ("labels", lambda v: [*v[1:], -100], "labels are not"),
        ("labels", lambda v: [-100] * len(v), "no token is supervised"),
        ("token_ids", lambda v: [60000, *v[1:]], "an id outside 0..363; give the --tokenizer"),
        ("token_ids", lambda v: v[:-1], "differ in size"),
        ("labels", None, "lacks the columns labels"),
        ("num_samples", None, "lacks the columns num_samples"),
    ],
)  # fmt: skip
def test_ready_made_row_that_does_not_hold_together_is_refused_by_name(
    packed_rows: list[Row], open_chat: Any, tmp_path: Path, column: str, change: Any, message: str
) -> None:
    columns = ready_made(packed_rows[:30])
    if change is None:
        del columns[column]
    else:
        # Behind the conversations that are looked at when the data is opened.
        place = next(i for i, n in enumerate(columns["num_samples"]) if n > 1 and i > 25)
        columns[column][place] = change(columns[column][place])
        message = f"row {place}: .*{message}"
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet", row_group_size=3)
    with (
        pytest.raises(ValueError, match=f"--data: .*bad.parquet.*{message}"),
        open_chat(tmp_path) as stream,
    ):
        for _ in range(30):
            next(stream)


def test_ready_made_rows_of_another_tokenizer_are_refused(
    packed_rows: list[Row], open_chat: Any, tmp_path: Path
) -> None:
    pq.write_table(pa.table(ready_made(packed_rows[:30])), tmp_path / "rows.parquet")
    texts = ["".join(random.Random(i).choices("qwertyuiop asdf", k=80)) for i in range(200)]
    train_tokenizer(texts, 400).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="--tokenizer: .* was not made with"):
        open_chat(tmp_path / "rows.parquet", tokenizer=tmp_path / "other")


# Raw conversations


@pytest.fixture
def many_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_conversations, "HELD_OUT_FRACTION", 0.1)
    monkeypatch.setattr(raw_stream, "WINDOW_DOCUMENTS", 16)


def rows_of_an_epoch(stream: RowStream) -> Iterator[Row]:
    while stream.state_dict()["raw"]["chat"]["epoch"] == 0:
        yield next(stream)


def write_raw(folder: Path, suffix: str, kind: Kind, files: int) -> list[dict[str, Any]]:
    """Write records to so many files and return them."""
    found = records(*KINDS) if suffix == "jsonl" else records(kind)
    for file in range(files):
        path = folder / f"{file}.{suffix}"
        if suffix == "jsonl":
            write_jsonl(path, found[file::files])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(found[file::files]), path, row_group_size=20)
    return found


@pytest.mark.usefixtures("many_held_out")
@pytest.mark.parametrize(
    ("suffix", "kind", "files", "world_size"),
    [
        ("jsonl", "all", 1, 3),
        ("jsonl", "all", 20, 1),
        ("parquet", "messages", 2, 2),
        ("parquet", "conversations", 1, 1),
        ("parquet", "deepctrl", 1, 3),
    ],
)
def test_raw_files_give_the_conversations_of_chat_encoder_once_an_epoch_over_all_ranks(
    open_chat: Any,
    tokenizer: Path,
    tmp_path: Path,
    suffix: str,
    kind: Kind,
    files: int,
    world_size: int,
) -> None:
    given = write_raw(tmp_path / "chat", suffix, kind, files)
    rows: list[Row] = []
    for rank in range(world_size):
        with open_chat(
            tmp_path / "chat", rank=rank, world_size=world_size, rows_per_step=world_size
        ) as stream:
            assert stream.rows_per_epoch is None
            rows += rows_of_an_epoch(stream)
            assert stream.rejected_per_source == {"chat": {}}
    held_out = open_sft_validation(
        {"chat": {"path": tmp_path / "chat"}}, seq_len=SEQ_LEN, tokenizer=tokenizer, max_rows=99
    )["chat"]
    assert conversations_of(rows) + conversations_of(held_out.rows) == encoded(given, tokenizer)
    assert held_out.rows


@pytest.mark.usefixtures("many_held_out")
def test_raw_conversations_resume_exactly_with_as_many_ranks_only(
    open_chat: Any, tmp_path: Path
) -> None:
    write_raw(tmp_path / "chat", "jsonl", "all", 2)
    options = {"rows_per_step": 2, "world_size": 2, "rank": 1}
    with open_chat(tmp_path / "chat", prefetch=True, **options) as stream:
        expected = [key(next(stream)) for _ in range(60)]
        assert stream.state_dict()["raw"]["chat"]["epoch"] > 0
    got, state = [], None
    for steps in (1, 7, 30, 22):
        with open_chat(tmp_path / "chat", **options) as stream:
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            got += [key(next(stream)) for _ in range(steps)]
            state = stream.state_dict()
    assert got == expected
    refusal = r"raw conversations \(chat\) goes on only with as many.*prepare_sft\.py"
    with open_chat(tmp_path / "chat") as stream, pytest.raises(ValueError, match=refusal):
        stream.load_state_dict(state)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


BAD = {
    "no_assistant_turn": [turn("user", "a")],
    "roles_out_of_order": [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")],
    "role_tool": [turn("user", "a"), turn("tool", "b"), turn("assistant", "c")],
    "tool_calls": [turn("user", "a"), turn("assistant", "b", tool_calls=[{"name": "f"}])],
    "ends_without_answer": [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    "empty_assistant_turn": [turn("user", "a"), turn("assistant", " ")],
    "no_messages": [],
    "too_long": [turn("user", "a"), turn("assistant", "x y z " * SEQ_LEN)],
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_no_conversation_to_train_on_is_counted_by_reason(
    open_chat: Any, tokenizer: Path, tmp_path: Path, suffix: str
) -> None:
    good = records("messages", count=40)
    bad = [{"messages": messages} for messages in BAD.values()]
    if suffix == "jsonl":
        file = write_jsonl(tmp_path / "a.jsonl", [*good, *bad, bad[0]])
        with file.open("ab") as lines:
            lines.write(b'{"messages": \n\xff\xfe\n{"text": 1}\n')
        others = {"invalid_json": 1, "not_utf8": 1, "wrong_fields": 1}
    else:
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([*good, *bad, bad[0], {"messages": None}]), file)
        others = {"wrong_fields": 1}
    with open_chat(file) as stream:
        rows = list(rows_of_an_epoch(stream))
        assert stream.rejected_per_source["chat"] == {
            **dict.fromkeys(BAD, 1),
            "no_assistant_turn": 2,
            **others,
        }
    missing = encoded(good, tokenizer) - conversations_of(rows)
    assert missing.total() <= 2  # of the held-out ones
    write_jsonl(tmp_path / "none.jsonl", [*bad, bad[0]])
    reasons = "left out: 2 no_assistant_turn, 1 roles_out_of_order"
    with open_chat(tmp_path / "none.jsonl") as stream, pytest.raises(ValueError, match=reasons):
        next(stream)


def test_row_of_parquet_that_is_not_utf8_costs_one_row(open_chat: Any, tmp_path: Path) -> None:
    texts = [text for i in range(20) for text in (f"row {i}".encode(), f"训练{i}".encode())]
    texts[7] = b"\xff\xfe"
    turns = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"] * 20),
            pa.array(texts, pa.binary()).view(pa.string()),
        ],
        ["role", "content"],
    )
    messages = pa.ListArray.from_arrays(np.arange(0, 41, 2, np.int32), turns)
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    with open_chat(tmp_path / "a.parquet") as stream:
        rows = list(rows_of_an_epoch(stream))
        assert stream.rejected_per_source["chat"] == {"not_utf8": 1}
    assert conversations_of(rows).total() in (18, 19)  # one may be held out


def test_reading_a_file_that_became_shorter_ends(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records("deepctrl", count=3))
    beyond = file.stat().st_size + 9
    assert len(list(read_lines(file, 0, beyond))) == 3
    assert len(list(read_piece(Piece(file, 0, beyond, 0, 0)))) == 3


def test_held_out_conversations_are_those_of_prepare_sft_by_default(tmp_path: Path) -> None:
    flags = ["--input", "a", "--tokenizer", "b", "--output_dir", "c"]
    default = prepare_sft.parse_arguments(flags).validation_fraction
    assert default == raw_conversations.HELD_OUT_FRACTION


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("a.parquet", {"text": ["a"], "score": [1.0], "source": ["b"]}, "it has the columns text,"),
        ("a.parquet", {"messages": ["[]"]}, "column messages of .* is string, not a list of turns"),
        ("a.jsonl", {"text": "a"}, "holds no conversations: it has the fields text; needed are me"),
        ("a.json", {"messages": []}, r"a\.json is neither \.parquet nor \.jsonl"),
    ],
)
def test_file_that_holds_no_conversations_is_refused_when_the_stream_is_opened(
    open_chat: Any, tmp_path: Path, name: str, columns: dict[str, Any], message: str
) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table(columns), tmp_path / name)
    else:
        write_jsonl(tmp_path / name, [columns])
    write_raw(tmp_path / "good", "jsonl", "all", 1)
    with pytest.raises(ValueError, match=f"--data: .*{message}"):
        open_chat([tmp_path / "good/0.jsonl", tmp_path / name])


def test_missing_folder_and_misplaced_keys_of_the_hub_are_refused(
    open_chat: Any, tokenizer: Path, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone does not exist; run data_tools/prepare_sft"):
        open_chat(tmp_path / "gone")
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 1}
    options |= {"tokenizer": tokenizer}
    with pytest.raises(ValueError, match="a has a config, which belongs to a data set on the hub"):
        open_sft_stream({"a": {"path": prepared, "config": "x"}}, **options)
    with pytest.raises(ValueError, match="a has config; it takes path and weight"):
        open_stream({"a": {"path": prepared, "config": "x"}}, **options)


# Memory


def measured(read: Callable[[], Iterator[Any]]) -> int:
    """Return the bytes at most in use, of Python and numpy and, between rows, of Arrow."""
    before, arrow = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in read():
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak + arrow


def write_rows_of_conversations(
    folder: Path, kind: str, rows: int, encoder: ChatEncoder, seq_len: int
) -> None:
    """Write a prepared folder, or ready-made rows, in row groups of 8 rows."""
    one = encoder.encode([turn("user", "row 1"), turn("assistant", "训练 2")])
    times = seq_len // len(one)
    ids = np.zeros(seq_len, encoder.dtype)
    ids[: times * len(one)] = np.tile(one.input_ids, times)
    mask = np.zeros(seq_len, bool)
    mask[: times * len(one)] = np.tile(one.labels >= 0, times)
    doc_lens = np.full(times, len(one), np.int32)
    if kind == "ready_made":
        row = Row(input_ids=ids, doc_lens=doc_lens, source="", loss_mask=mask)
        table = pa.table({name: value * rows for name, value in ready_made([row]).items()})
        pq.write_table(table, folder / "a.parquet", row_group_size=8)
        return
    packed = PackedConversations(
        np.tile(ids, (rows, 1)), np.tile(mask, (rows, 1)), [doc_lens] * rows
    )
    entry = write_sft_rows(folder, "train/0.parquet", packed, row_group_rows=8)
    counts = {"tokens": entry.tokens, "supervised_tokens": 0, "conversations": rows * times}
    splits = {
        "train": SftSplit(rows, **counts, conversations_per_kind={}, utilisation=1, files=[entry]),
        "validation": SftSplit(0, 0, 0, 0, {}, 0.0, []),
    }
    tokenizer = TokenizerEntry(encoder.fingerprint, encoder.vocab_size)
    write_sft_manifest(folder, SftManifest(seq_len, tokenizer, splits, 0, {}, 0, {}, {}, {}))


@pytest.mark.parametrize("kind", ["prepared", "ready_made", "jsonl", "parquet"])
def test_memory_is_flat_in_the_number_of_rows(
    open_chat: Any, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(raw_stream, "WINDOW_DOCUMENTS", 16)
    monkeypatch.setattr(raw_stream, "WINDOW_BYTES", 1 << 15)
    seq_len, row_bytes = 2048, 3 * 2048
    encoder = ChatEncoder(tokenizer)
    peaks = []
    for rows in (128, 8 * 128):
        path = tmp_path / f"{kind}{rows}"
        path.mkdir()
        if kind in ("jsonl", "parquet"):
            texts = ["".join(random.Random(i).choices("abcdef ", k=1500)) for i in range(rows)]
            given = [{"messages": [turn("user", "a"), turn("assistant", text)]} for text in texts]
            if kind == "jsonl":
                write_jsonl(path / "a.jsonl", given)
            else:
                pq.write_table(pa.Table.from_pylist(given), path / "a.parquet", row_group_size=8)
        else:
            write_rows_of_conversations(path, kind, rows, encoder, seq_len)

        def read(path: Path = path, rows: int = rows) -> Iterator[Any]:
            with open_chat(path, seq_len=seq_len) as stream:
                if stream.rows_per_epoch is None:
                    yield from rows_of_an_epoch(stream)
                else:
                    yield from (next(stream) for _ in range(stream.rows_per_epoch))

        list(read())  # what is allocated once
        peaks.append(measured(read))
    assert peaks[1] - peaks[0] < 7 * 128 * row_bytes / 10


# The hub


HUB_SCRIPT = """
import json, sys
from mini_llm.data import open_sft_stream, open_sft_validation

def look(**entry):
    try:
        data = {"chat": {"path": "someone/chats", **entry}}
        options = {"seq_len": int(sys.argv[2]), "tokenizer": sys.argv[1]}
        with open_sft_stream(data, seed=0, rows_per_step=1, **options) as stream:
            rows = []
            while stream.state_dict()["raw"]["chat"]["epoch"] == 0:
                rows.append(next(stream))
        rows += open_sft_validation(data, max_rows=99, **options)["chat"].rows
        documents = []
        for row in rows:
            end = 0
            for length in row["doc_lens"].tolist():
                ids = row["input_ids"][end : end + length]
                mask = row["loss_mask"][end : end + length]
                documents.append([ids.tolist(), ids[mask].tolist()])
                end += length
        return documents
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([look(**entry) for entry in json.loads(sys.argv[3])]))
"""


def look_at_hub(
    server: HubServer, tokenizer: Path, cache: Path, entries: list[dict[str, str]]
) -> list[Any]:
    """Return the conversations, or the error, of every entry; in a process of its own."""
    # The hub's address is read when its libraries are imported.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache / "hf"),
        "no_proxy": "127.0.0.1",
    }
    environment |= {"MINI_LLM_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HUB_SCRIPT, str(tokenizer), str(SEQ_LEN), json.dumps(entries)]
    found = subprocess.run(
        command, cwd=cache, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_data_set_of_the_hub_is_streamed_by_its_name_configuration_and_split(
    tokenizer: Path, tmp_path: Path
) -> None:
    def parquet(given: list[dict[str, Any]]) -> bytes:
        file = BytesIO()
        pq.write_table(pa.Table.from_pylist(given), file)
        return file.getvalue()

    train, test = records("messages", count=40), records("conversations", count=9)
    card = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: tables
  data_files:
  - {split: train, path: tables/a.csv}
---
"""
    lines = "".join(json.dumps(one) + "\n" for one in test).encode()
    server = HubServer(
        {
            "README.md": card.encode(),
            "main/train-0.parquet": parquet(train[:25]),
            "main/train-1.parquet": parquet(train[25:]),
            "main/test-0.parquet": parquet(test),
            "tables/a.csv": b"a,b\n1,2\n",
            "unrelated.jsonl": lines,
        }
    )
    entries: list[dict[str, str]] = [{}, {"split": "test"}, {"config": "main", "split": "train"}]
    entries += [{"split": "nope"}, {"config": "nope"}, {"config": "tables"}]
    entries += [{"path": "someone/nothing"}]
    server.unknown = {"someone/nothing"}
    try:
        found = look_at_hub(server, tokenizer, tmp_path, entries)
        pinned = [path for path, _ in server.requests if "train-" in path and "resolve" in path]
    finally:
        server.close()
    for got, given in zip(found, (train, test, train), strict=False):
        assert not isinstance(got, str), got
        tokens = Counter((tuple(ids), tuple(supervised)) for ids, supervised in got)
        assert tokens == encoded(given, tokenizer)
    assert pinned and all(f"/resolve/{COMMIT}/" in path for path in pinned)
    assert "ValueError: --data: someone/chats has no split 'nope'" in found[3]
    assert "train, test" in found[3]
    assert "'nope' not found. Available: ['main', 'tables']" in found[4]
    assert "has the file a.csv, which is not read while training: only .parquet and" in found[5]
    assert "--data: someone/nothing is neither a local path nor reachable on the hub" in found[6]
    assert "doesn't exist on the Hub" in found[6] and "HF_TOKEN" in found[6]


def test_data_set_of_the_hub_is_refused_by_name_in_offline_mode(
    open_chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal = "someone/chats is neither a local path nor reachable.*HF_HUB_OFFLINE is set"
    with pytest.raises(ConnectionError, match=refusal):
        open_chat("someone/chats")
