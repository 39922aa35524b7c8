"""Raw text in the stream: nothing lost or repeated over ranks, exact resume, named errors."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_llm.data import raw_stream, text_files
from mini_llm.data.manifest import TokenizerEntry, write_manifest
from mini_llm.data.stream import RowStream, open_stream, open_validation
from mini_llm.data.tokenizer import text_encoder, tokenizer_fingerprint
from tests.unit.data_fixtures import write_packed_folder
from tests.unit.prepare_fixtures import (
    conversation,
    example_texts,
    make_tokenizer,
    write_jsonl,
    write_shard,
    write_shards,
)

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("raw") / "tokenizer")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_stream, "WINDOW_DOCUMENTS", 16)


@pytest.fixture
def open_raw(tokenizer: Path) -> Any:
    def open_it(path: object, **options: Any) -> RowStream:
        defaults: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 1}
        defaults |= {"tokenizer": tokenizer, "prefetch": False}
        return open_stream({"raw": {"path": path}}, **(defaults | options))

    return open_it


def epoch_of(stream: RowStream) -> int:
    return stream.state_dict()["raw"]["raw"]["epoch"]


def rows_of_an_epoch(stream: RowStream) -> Iterator[Any]:
    epoch = epoch_of(stream)
    while epoch_of(stream) == epoch:
        yield next(stream)


def texts_of(rows: Any, tokenizer: Path) -> Counter[str]:
    """Decode the documents of rows; a document that was cut comes back as several."""
    encoder = text_encoder(tokenizer)
    texts: Counter[str] = Counter()
    for row in rows:
        ends = np.cumsum(row["doc_lens"])
        for end, length in zip(ends, row["doc_lens"], strict=True):
            ids = row["input_ids"][end - length : end].tolist()
            assert ids[-1] == 0
            texts[encoder.decode(ids[:-1])] += 1
        assert not row["input_ids"][ends[-1] :].any()
    return texts


def write_packed(folder: Path, files: list[int], tokenizer: Path) -> None:
    manifest = write_packed_folder(folder, files, seq_len=SEQ_LEN)
    entry = TokenizerEntry(tokenizer_fingerprint(tokenizer), 360)
    write_manifest(folder, replace(manifest, tokenizer=entry))


def trained(texts: list[str]) -> Counter[str]:
    return Counter(t for t in texts if not raw_stream.is_held_out(raw_stream.Document(t, "")))


def test_a_row_has_the_fields_and_types_of_a_packed_one(tmp_path: Path, open_raw: Any) -> None:
    write_shards(tmp_path / "text", 1)
    with open_raw(tmp_path / "text") as stream:
        row = next(stream)
    assert row["input_ids"].dtype == np.uint16 and row["input_ids"].shape == (SEQ_LEN,)
    assert row["doc_lens"].dtype == np.int32 and row["doc_lens"].sum() <= SEQ_LEN
    assert row["source"] == "raw"


# One file for all ranks; few files, which all ranks share; many, of which each has its own.
@pytest.mark.parametrize(("files", "world_size"), [(1, 1), (1, 3), (3, 2), (20, 1), (34, 2)])
def test_ranks_together_read_every_document_once_an_epoch(
    tmp_path: Path, open_raw: Any, tokenizer: Path, files: int, world_size: int
) -> None:
    texts = write_shards(tmp_path / "text", files, documents=max(120 // files, 10))
    seed_order = []
    streams = [
        open_raw(tmp_path / "text", rank=rank, world_size=world_size, rows_per_step=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        rows = [row for stream in streams for row in rows_of_an_epoch(stream)]
        assert texts_of(rows, tokenizer) == trained(texts)
        assert {epoch_of(stream) for stream in streams} == {epoch + 1}
        seed_order.append([row["input_ids"].tolist() for row in rows])
    assert seed_order[0] != seed_order[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_of_one_large_row_group_is_decoded_once_an_epoch(
    tmp_path: Path, open_raw: Any, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    write_shard(tmp_path / "a.parquet", example_texts(1000))
    decoded = 0
    batches_of = pq.ParquetFile.iter_batches

    def counted(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal decoded
        for batch in batches_of(*arguments, **options):
            decoded += batch.num_rows
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with open_raw(tmp_path, world_size=world_size, rows_per_step=world_size) as stream:
        list(rows_of_an_epoch(stream))
    assert 1000 - text_files.READ_BATCH_ROWS <= decoded <= 1000 + text_files.READ_BATCH_ROWS


def test_more_ranks_than_documents_in_a_file_lose_none(
    tmp_path: Path, open_raw: Any, tokenizer: Path
) -> None:
    texts = write_shards(tmp_path / "text", 8, documents=5)
    options = {"world_size": 8, "rows_per_step": 8}
    rows = []
    for rank in range(8):
        rows += list(rows_of_an_epoch(open_raw(tmp_path / "text", rank=rank, **options)))
    assert texts_of(rows, tokenizer) == trained(texts)
    # One file of 5 documents is not enough for 8 ranks, and that is no endless loop.
    stream = open_raw(tmp_path / "text/000000.parquet", rank=7, **options)
    with pytest.raises(ValueError, match="hold no document for rank 7 of 8; give more text"):
        next(stream)


def test_deepctrl_jsonl_is_rendered_with_its_history_and_bad_lines_are_counted(
    tmp_path: Path, open_raw: Any, tokenizer: Path
) -> None:
    records = [
        conversation(f"答{i}", instruction="问", history=[["早", f"好{i}"]]) for i in range(40)
    ]
    file = write_jsonl(tmp_path / "sft_data_zh.jsonl", records)
    with file.open("ab") as lines:
        lines.write(b'{"broken": \n\xff\xfe\n{"output": 1}\n')
    with open_raw(file) as stream:
        rows = list(rows_of_an_epoch(stream))
        expected = trained([f"早\n好{i}\n问\n答{i}" for i in range(40)])
        assert texts_of(rows, tokenizer) == expected
        rejected = stream.rejected_per_source["raw"]
    assert rejected == {"invalid_json": 1, "not_utf8": 1, "wrong_fields": 1}


def test_rejected_rows_are_counted_the_same_with_and_without_a_resume(
    tmp_path: Path, open_raw: Any
) -> None:
    for file in range(2):
        texts = [text for good in example_texts(60, seed=file) for text in (good, "")]
        write_shard(tmp_path / f"text/{file}.parquet", texts)

    def counts_of(stream: RowStream, steps: int) -> list[int]:
        counts = []
        for _ in range(steps):
            next(stream)
            counts.append(stream.rejected_per_source["raw"]["empty"])
        return counts

    steps = len(list(rows_of_an_epoch(open_raw(tmp_path / "text"))))
    with open_raw(tmp_path / "text", prefetch=True) as stream:
        expected = counts_of(stream, steps)
    assert expected[-1] == 120 and expected == sorted(expected) and len(set(expected)) > 3
    state: Any = None
    got: list[int] = []
    while len(got) < steps:
        with open_raw(tmp_path / "text") as stream:
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            got += counts_of(stream, min(3, steps - len(got)))
            state = stream.state_dict()
    assert got == expected


def test_jsonl_shared_by_ranks_gives_every_line_to_one(
    tmp_path: Path, open_raw: Any, tokenizer: Path
) -> None:
    records = [conversation(f"answer {i} " + "x" * (i % 50)) for i in range(200)]
    file = write_jsonl(tmp_path / "sft_data_en.jsonl", records)
    rows = []
    for rank in range(5):
        stream = open_raw([str(file)], rank=rank, world_size=5, rows_per_step=5)
        rows += list(rows_of_an_epoch(stream))
    assert texts_of(rows, tokenizer) == trained([record["output"] for record in records])


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    world_size=st.integers(1, 4),
    rows_per_rank=st.integers(1, 5),
    weight=st.floats(0.2, 5),
    stops=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    prefetch=st.booleans(),
)
def test_mixture_with_raw_text_resumes_exactly_at_the_same_world_size(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Path,
    shards: list[int],
    world_size: int,
    rows_per_rank: int,
    weight: float,
    stops: list[int],
    prefetch: bool,
) -> None:
    root = tmp_path_factory.mktemp("mixture")
    for index, documents in enumerate(shards):
        # At least as many documents as ranks, in every file.
        write_shard(root / f"text/{index}.parquet", example_texts(documents + 8, seed=index))
    write_packed(root / "packed", [9, 4], tokenizer)
    data = {
        "packed": {"path": root / "packed", "weight": 1.0},
        "raw": {"path": root / "text", "weight": round(weight, 2)},
    }

    def open_rank(rank: int) -> RowStream:
        return open_stream(
            data,
            seq_len=SEQ_LEN,
            seed=3,
            rows_per_step=rows_per_rank * world_size,
            rank=rank,
            world_size=world_size,
            tokenizer=tokenizer,
            prefetch=prefetch,
        )

    def take(stream: RowStream, steps: int) -> list[tuple[str, list[int]]]:
        rows = [next(stream) for _ in range(steps * rows_per_rank)]
        return [(row["source"], row["input_ids"].tolist()) for row in rows]

    delivered: Counter[str] = Counter()
    for rank in range(world_size):
        with open_rank(rank) as whole:
            expected = take(whole, sum(stops))
            final = whole.state_dict()
        delivered.update(source for source, _ in expected)
        got: list[tuple[str, list[int]]] = []
        state: Any = None
        for steps in stops:
            with open_rank(rank) as stream:
                if state is not None:
                    stream.load_state_dict(json.loads(json.dumps(state)))
                got += take(stream, steps)
                state = stream.state_dict()
            assert len(json.dumps(state)) <= 1024
        assert got == expected
        assert state == final
    # All ranks together keep to the weights at the end of a step.
    rows = sum(delivered.values())
    share = data["raw"]["weight"] / (1 + data["raw"]["weight"])
    assert abs(delivered["raw"] - share * rows) < 1 + 1e-9


def test_no_rank_gets_all_raw_rows_of_a_mixture_in_step_with_the_batch(
    tmp_path: Path, tokenizer: Path
) -> None:
    # One raw row in four, four ranks with one row a step: unrotated, always the same rank's.
    write_shards(tmp_path / "text", 4)
    write_packed(tmp_path / "packed", [50], tokenizer)
    data = {
        "packed": {"path": tmp_path / "packed", "weight": 3},
        "raw": {"path": tmp_path / "text", "weight": 1},
    }
    raw_rows = []
    for rank in range(4):
        with open_stream(
            data,
            seq_len=SEQ_LEN,
            seed=0,
            rows_per_step=4,
            rank=rank,
            world_size=4,
            tokenizer=tokenizer,
        ) as stream:
            raw_rows.append(sum(next(stream)["source"] == "raw" for _ in range(80)))
    assert sum(raw_rows) == 80
    assert min(raw_rows) >= 10


def test_other_world_size_is_refused_by_name_with_the_fix(tmp_path: Path, open_raw: Any) -> None:
    write_shards(tmp_path / "text", 2)
    with open_raw(tmp_path / "text", rows_per_step=2, world_size=2) as stream:
        next(stream)
        assert stream.state_is_per_rank
        state = stream.state_dict()
    refusal = "of 2 ranks, this run has 1.*raw text \\(raw\\).*prepare_pretrain.py"
    for given_state in (state, [state, state | {"rank": 1}]):
        with (
            open_raw(tmp_path / "text", rows_per_step=2) as stream,
            pytest.raises(ValueError, match=refusal),
        ):
            stream.load_state_dict(given_state)


def test_every_rank_takes_its_own_state_from_the_list(tmp_path: Path, open_raw: Any) -> None:
    write_shards(tmp_path / "text", 2)
    options = {"rows_per_step": 2, "world_size": 2}
    states, expected = [], []
    for rank in (0, 1):
        with open_raw(tmp_path / "text", rank=rank, **options) as stream:
            for _ in range(7):
                next(stream)
            states.append(stream.state_dict())
            expected.append(next(stream)["input_ids"].tolist())
    assert expected[0] != expected[1]
    for rank in (0, 1):
        with open_raw(tmp_path / "text", rank=rank, **options) as stream:
            stream.load_state_dict(states)
            assert next(stream)["input_ids"].tolist() == expected[rank]
    with (
        open_raw(tmp_path / "text", rank=0, **options) as stream,
        pytest.raises(ValueError, match="is of rank 1, this is rank 0"),
    ):
        stream.load_state_dict(states[1])


def test_file_replaced_or_deleted_during_the_run_is_named(tmp_path: Path, open_raw: Any) -> None:
    write_shards(tmp_path / "text", 2)
    file = tmp_path / "text/000001.parquet"
    with open_raw(tmp_path / "text") as stream:
        write_shard(file, example_texts(60, seed=9))
        os.utime(file, ns=(1, 1))
        with pytest.raises(ValueError, match=r"000001\.parquet was replaced during the run"):
            list(rows_of_an_epoch(stream))
    with open_raw(tmp_path / "text") as stream:
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"000001\.parquet was deleted during the run"):
            list(rows_of_an_epoch(stream))


def test_file_replaced_between_save_and_resume_is_named(tmp_path: Path, open_raw: Any) -> None:
    texts = example_texts(12)
    file = write_shard(tmp_path / "0.parquet", texts, compression="none", use_dictionary=False)
    with open_raw(file) as stream:
        next(stream)
        state = stream.state_dict()
    size = file.stat().st_size
    write_shard(
        file, [*texts[:-1], texts[-1].replace("11", "12")], compression="none", use_dictionary=False
    )
    assert file.stat().st_size == size
    with (
        open_raw(file) as stream,
        pytest.raises(ValueError, match=r"the text of .*0\.parquet is not what it was"),
    ):
        stream.load_state_dict(state)
    write_shard(file, example_texts(13))  # another size: known without reading
    with open_raw(file) as stream, pytest.raises(ValueError, match=r"\(fingerprint: 'raw' "):
        stream.load_state_dict(state)


def test_bad_file_is_named_under_data(tmp_path: Path, open_raw: Any) -> None:
    file = tmp_path / "text/0.parquet"
    file.parent.mkdir()
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--data: .*0\.parquet is empty \(0 bytes\)"):
        open_raw(tmp_path / "text")


def test_unfinished_preparation_is_not_taken_for_raw_text(tmp_path: Path, open_raw: Any) -> None:
    write_packed_folder(tmp_path, [4], seq_len=SEQ_LEN)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"--data: .*lacks the columns.*no manifest.json"):
        open_raw(tmp_path)


def test_raw_text_without_a_tokenizer_names_the_flag(tmp_path: Path, open_raw: Any) -> None:
    write_shards(tmp_path / "text", 1)
    with pytest.raises(ValueError, match="--tokenizer: the raw data 'raw' needs one"):
        open_raw(tmp_path / "text", tokenizer=None)


def test_held_out_documents_are_those_that_training_leaves_out(
    tmp_path: Path, open_raw: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_stream, "HELD_OUT_FRACTION", 0.3)
    texts = write_shards(tmp_path / "text", 2)
    with open_raw(tmp_path / "text") as stream:
        seen = texts_of(rows_of_an_epoch(stream), tokenizer)
    data = {"raw": {"path": tmp_path / "text"}}
    options = {"seq_len": SEQ_LEN, "tokenizer": tokenizer}
    parts = [
        open_validation(data, max_rows=10_000, rank=rank, world_size=3, **options)["raw"]
        for rank in range(3)
    ]
    held_out = texts_of([row for part in parts for row in part.rows], tokenizer)
    assert seen == trained(texts)
    assert held_out == Counter(texts) - seen
    assert held_out
    assert {part.total for part in parts} == {sum(len(part.rows) for part in parts)}
    assert len(open_validation(data, max_rows=2, **options)["raw"].rows) == 2
    with pytest.raises(ValueError, match="--max_eval_rows: the raw data 'raw' needs a limit"):
        open_validation(data, **options)
