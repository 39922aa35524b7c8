"""The stream: same rows for every world size, exact resume, weights, bounded state, loud errors."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_llm.data.manifest import TokenizerEntry, load_manifest, write_manifest
from mini_llm.data.packed_files import write_rows
from mini_llm.data.packed_stream import ShardFiles
from mini_llm.data.stream import (
    RowStream,
    interleave,
    open_stream,
    open_validation,
    validation_rows,
)
from mini_llm.data.tokenizer import tokenizer_fingerprint
from tests.unit.data_fixtures import SEQ_LEN, write_packed_folder
from tests.unit.prepare_fixtures import make_tokenizer

EASY = settings(
    max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def open_test_stream(folder: Path, **options: Any) -> RowStream:
    defaults: dict[str, Any] = {"seq_len": SEQ_LEN, "seed": 0, "rows_per_step": 4}
    return open_stream({"main": {"path": folder, "weight": 1.0}}, **(defaults | options))


def row_ids(stream: RowStream, count: int) -> list[int]:
    return [int(next(stream)["input_ids"][0]) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_packed_folder(tmp_path / "packed", [7, 5], validation_rows=10)
    yield tmp_path / "packed"
    assert not [t for t in threading.enumerate() if t.name == "mini_llm-stream" and t.is_alive()]


def test_a_row_has_the_documented_fields_types_and_values(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        row = next(stream)
    assert set(row) == {"input_ids", "doc_lens", "source"}
    assert row["input_ids"].dtype == np.uint16 and row["input_ids"].shape == (SEQ_LEN,)
    assert row["input_ids"][1:].tolist() == [7, 0, 8, 0, 0, 0, 0]
    assert row["doc_lens"].dtype == np.int32 and row["doc_lens"].tolist() == [3, 2]
    assert row["source"] == "main"


def test_rows_are_views_of_the_decoded_arrow_buffer(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        assert next(stream)["input_ids"].base is not None
        assert not next(stream)["input_ids"].flags.owndata


def test_every_epoch_visits_each_row_once_in_another_order(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        epochs = [row_ids(stream, 12) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed(folder: Path) -> None:
    orders = set()
    for seed in range(4):
        with open_test_stream(folder, seed=seed) as stream:
            orders.add(tuple(row_ids(stream, 12)))
    assert len(orders) > 1


@EASY
@given(data=st.data())
def test_rows_of_every_step_are_the_same_set_for_any_world_and_any_resume(
    data: st.DataObject,
) -> None:
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    seed = data.draw(st.integers(0, 2**31))
    with tempfile.TemporaryDirectory() as root:
        sources: dict[str, dict[str, Any]] = {}
        rows_of_source = {}
        for index, name in enumerate(names):
            files = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any))
            write_packed_folder(
                Path(root, name),
                files,
                row_group_rows=data.draw(st.integers(1, 5)),
                first_row_id=1000 * index,
            )
            weight = data.draw(st.floats(0.01, 10).map(lambda w: round(w, 3)))
            sources[name] = {"path": Path(root, name), "weight": weight}
            rows_of_source[name] = sum(files)

        def open_at(world_size: int, rank: int, prefetch: bool) -> RowStream:
            return open_stream(
                sources,
                seq_len=SEQ_LEN,
                seed=seed,
                rows_per_step=rows_per_step,
                rank=rank,
                world_size=world_size,
                prefetch=prefetch,
            )

        # The run is stopped after every step and goes on with another number of ranks.
        worlds = data.draw(
            st.lists(st.integers(1, 8), min_size=2, max_size=4).filter(lambda w: lcm(*w) <= 60)
        )
        rows_per_step = lcm(*worlds) * data.draw(st.integers(1, max(1, 24 // lcm(*worlds))))
        steps = len(worlds)
        with open_at(1, 0, True) as whole:
            expected = [
                [(row["source"], int(row["input_ids"][0])) for row in islice(whole, rows_per_step)]
                for _ in range(steps)
            ]
            final_state = whole.state_dict()

        assert len(json.dumps(final_state)) <= 1024
        state: dict[str, Any] | None = None
        for step, world_size in enumerate(worlds):
            got, states = [], []
            for rank in range(world_size):
                with open_at(world_size, rank, data.draw(st.booleans())) as stream:
                    if state is not None:
                        stream.load_state_dict(state)
                    for _ in range(rows_per_step // world_size):
                        row = next(stream)
                        got.append((row["source"], int(row["input_ids"][0])))
                    states.append(stream.state_dict())
            assert got == expected[step]
            assert all(other == states[0] for other in states)
            state = json.loads(json.dumps(states[0]))
        assert state == final_state

        delivered = [row for step_rows in expected for row in step_rows]
        for name, rows in rows_of_source.items():
            ids = [row_id for source, row_id in delivered if source == name]
            for start in range(0, len(ids), rows):
                epoch = ids[start : start + rows]
                assert len(set(epoch)) == len(epoch)
                if len(epoch) == rows:
                    assert len({row_id // 1000 for row_id in epoch}) == 1
        total = sum(source["weight"] for source in sources.values())
        counts: Counter[str] = Counter()
        for position, (source_name, _) in enumerate(delivered, start=1):
            counts[source_name] += 1
            for name in sources:
                share = sources[name]["weight"] / total * position
                assert abs(counts[name] - share) < 1 + 1e-9


def test_rows_per_step_may_change_on_resume(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        expected = row_ids(stream, 20)
    with open_test_stream(folder) as stream:
        first = row_ids(stream, 8)
        state = stream.state_dict()
    with open_test_stream(folder, rows_per_step=6) as stream:
        stream.load_state_dict(state)
        assert first + row_ids(stream, 12) == expected


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
    rows=st.integers(1, 400),
    cut=st.integers(0, 400),
)
def test_mixture_keeps_every_prefix_within_one_row_of_the_weights(
    weights: list[int], rows: int, cut: int
) -> None:
    counts = [0] * len(weights)
    sources, ordinals = interleave(weights, counts, rows)
    seen = [0] * len(weights)
    for position, (source, ordinal) in enumerate(zip(sources, ordinals, strict=True), start=1):
        assert ordinal == seen[source]
        seen[source] += 1
        for weight, count in zip(weights, seen, strict=True):
            assert abs(count * sum(weights) - weight * position) < sum(weights)
    assert counts == seen

    cut = min(cut, rows)
    counts = [0] * len(weights)
    first, _ = interleave(weights, counts, cut)
    rest, _ = interleave(weights, counts, rows - cut)
    assert first + rest == sources


def test_state_is_small_and_json_serialisable_for_many_sources(folder: Path) -> None:
    data = {f"source-{i:02d}": {"path": folder, "weight": 0.123 + i} for i in range(10)}
    with open_stream(data, seq_len=SEQ_LEN, seed=2**31, rows_per_step=100) as stream:
        row_ids(stream, 300)
        assert len(json.dumps(stream.state_dict())) <= 1024


def test_state_inside_a_step_is_refused(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        next(stream)
        with pytest.raises(ValueError, match="between steps"):
            stream.state_dict()
        row_ids(stream, 3)
        assert stream.state_dict()["rows"] == 4


def test_prefetched_rows_do_not_count_as_consumed(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        first = row_ids(stream, 4)
        state = stream.state_dict()
        # Time for the thread to read far ahead.
        threading.Event().wait(0.2)
        assert stream.state_dict() == state
        second = row_ids(stream, 4)
        stream.load_state_dict(state)
        assert row_ids(stream, 4) == second != first


@pytest.mark.parametrize("key", ["seed", "weights", "fingerprint"])
def test_state_of_other_data_seed_or_weights_is_refused_by_name(
    folder: Path, tmp_path: Path, key: str
) -> None:
    data = {"a": {"path": folder, "weight": 1}, "b": {"path": folder, "weight": 1}}
    with open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=4) as stream:
        state = stream.state_dict()
    seed = 0
    if key == "seed":
        seed = 1
    elif key == "weights":
        data["a"]["weight"] = 2
    else:
        write_packed_folder(tmp_path / "other", [9])
        data["a"]["path"] = tmp_path / "other"
    with open_stream(data, seq_len=SEQ_LEN, seed=seed, rows_per_step=4) as stream:
        with pytest.raises(ValueError, match=f"\\({key}: ") as error:
            stream.load_state_dict(state)
        others = {"seed", "weights", "fingerprint"} - {key}
        assert not any(f"{other}: " in str(error.value) for other in others)


def test_weights_of_the_same_proportions_continue_a_state(folder: Path) -> None:
    data = {"a": {"path": folder, "weight": 3}, "b": {"path": folder, "weight": 1}}
    with open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=4) as stream:
        row_ids(stream, 4)
        state = stream.state_dict()
    data = {"b": {"path": folder, "weight": 0.25}, "a": {"path": folder, "weight": 0.75}}
    with open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=4) as stream:
        stream.load_state_dict(state)
        assert stream.rows_per_source == {"a": 3, "b": 1}


def test_a_rank_decodes_only_what_lies_under_its_slice(tmp_path: Path) -> None:
    write_packed_folder(tmp_path, [512], row_group_rows=2)
    for rank in (0, 3, 7):
        # 20 row groups per rank and step, at a place that is not a multiple of a row group.
        stream = open_test_stream(
            tmp_path, rows_per_step=8 * 41, rank=rank, world_size=8, prefetch=False
        )
        row_ids(stream, 41 * 4)
        assert stream.rows_delivered == 41 * 4
        assert stream.rows_decoded / stream.rows_delivered <= 1.1
        stream.close()


@pytest.mark.parametrize("rank", [0, 200, 511])
def test_one_of_512_ranks_decodes_only_what_lies_under_its_slice(tmp_path: Path, rank: int) -> None:
    # 20 row groups of 2 rows and a row more for each of 512 ranks, over one step.
    rows = 512 * 41
    write_packed_folder(tmp_path, [rows // 16] * 16, row_group_rows=2)
    with open_test_stream(
        tmp_path, rows_per_step=rows, rank=rank, world_size=512, prefetch=False
    ) as stream:
        row_ids(stream, 41)
        assert stream.rows_delivered == 41
        assert stream.rows_decoded / stream.rows_delivered <= 1.1


def test_tokens_are_counted_per_source_without_padding(folder: Path) -> None:
    data = {"a": {"path": folder, "weight": 3}, "b": {"path": folder, "weight": 1}}
    with open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=4) as stream:
        row_ids(stream, 8)
        assert stream.tokens_per_source == {"a": 6 * 5, "b": 2 * 5}


def test_state_of_an_older_version_is_refused_by_name(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        state = stream.state_dict() | {"version": 1}
        with pytest.raises(ValueError, match="version 1, this code continues version 2"):
            stream.load_state_dict(state)


def test_all_ranks_states_continue_packed_data_with_any_number_of_ranks(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        expected = row_ids(stream, 8)[4:]
    with open_test_stream(folder) as stream:
        row_ids(stream, 4)
        assert not stream.state_is_per_rank
        states = [stream.state_dict()] * 2
    with open_test_stream(folder) as stream:
        stream.load_state_dict(states)
        assert row_ids(stream, 4) == expected


def test_global_batch_that_the_ranks_cannot_share_names_its_flag(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--global_batch_tokens.*multiple of 24"):
        open_test_stream(folder, rows_per_step=4, world_size=3)


def test_other_seq_len_names_its_flag(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--seq_len 16.*hold 8 tokens"):
        open_test_stream(folder, seq_len=16)


def test_missing_folder_names_its_flag_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data: .*nowhere.*launch.sh quickstart"):
        open_test_stream(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "--data is empty"),
        ({"a": {"weight": 1}}, "a needs a path"),
        ({"a": {"path": "x", "wieght": 1}}, "wieght"),
        ({"a": {"path": "x", "weight": 0}}, "above 0"),
        ({"a": {"path": "x", "weight": float("nan")}}, "above 0"),
        ({"a": {"path": "x", "weight": "1"}}, "give a number"),
    ],
)
def test_malformed_data_mapping_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=1)


def test_missing_file_is_an_error_before_the_first_row(folder: Path) -> None:
    (folder / "train/000001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"000001\.parquet is missing"):
        open_test_stream(folder)


def test_file_of_another_size_is_an_error_before_the_first_row(folder: Path) -> None:
    with (folder / "train/000001.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"000001\.parquet has .* bytes"):
        open_test_stream(folder)


def replace_shard(folder: Path, name: str, rows: int) -> Path:
    """Put another parquet file in the place of a shard."""
    ids = np.zeros((rows, SEQ_LEN), np.uint16)
    lengths = [np.array([1], np.int32)] * rows
    write_rows(folder, f"train/{name}.parquet", ids, lengths, np.arange(rows), row_group_rows=3)
    return folder / f"train/{name}.parquet"


@pytest.mark.parametrize("prefetch", [True, False])
def test_shard_replaced_during_the_run_is_named_in_the_consumer(
    folder: Path, prefetch: bool
) -> None:
    with open_test_stream(folder, prefetch=prefetch) as stream:
        replace_shard(folder, "000000", 6)
        replace_shard(folder, "000001", 4)
        for _ in range(2):  # and it stays an error: the stream does not end quietly
            with pytest.raises(ValueError, match=r"00000[01]\.parquet was replaced during the run"):
                row_ids(stream, 12)


def test_shard_replaced_by_one_of_the_same_size_is_known_by_its_sha256(folder: Path) -> None:
    shard = folder / "train/000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with (
        open_test_stream(folder) as stream,
        pytest.raises(
            ValueError, match=r"000001\.parquet is not the file of its manifest \(sha256"
        ),
    ):
        row_ids(stream, 12)


def test_shard_replaced_between_save_and_resume_is_named(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        row_ids(stream, 4)
        state = stream.state_dict()
    replace_shard(folder, "000001", 9)
    with pytest.raises(ValueError, match=r"000001\.parquet has \d+ bytes, the manifest says"):
        open_test_stream(folder).load_state_dict(state)


def test_folder_prepared_again_between_save_and_resume_is_named(folder: Path) -> None:
    with open_test_stream(folder) as stream:
        row_ids(stream, 4)
        state = stream.state_dict()
    write_packed_folder(folder, [7, 6], validation_rows=10)
    with (
        open_test_stream(folder) as stream,
        pytest.raises(ValueError, match=r"\(fingerprint: 'main' \w{16} there, \w{16} here\)"),
    ):
        stream.load_state_dict(state)


def test_large_worlds_share_the_check_of_every_shard(folder: Path, tmp_path: Path) -> None:
    write_packed_folder(tmp_path, [4] * 8)
    entries = load_manifest(tmp_path).splits["train"].files
    checked: Counter[str] = Counter()
    for rank in range(64):
        checked.update(ShardFiles(tmp_path, entries, None, rank, 64)._unverified)
    assert checked == {entry.file: 8 for entry in entries}


@pytest.mark.parametrize("prefetch", [True, False])
def test_error_comes_after_the_rows_before_it(tmp_path: Path, prefetch: bool) -> None:
    # One file a row group, so that the damage lies at a known row of the epoch.
    write_packed_folder(tmp_path, [3] * 6)
    with open_test_stream(tmp_path, rows_per_step=18) as stream:
        order = row_ids(stream, 18)
    bad = order[12] // 3
    shard = tmp_path / f"train/{bad:06d}.parquet"
    with open_test_stream(tmp_path, rows_per_step=18, prefetch=prefetch) as stream:
        shard.unlink()
        assert row_ids(stream, 12) == order[:12]
        with pytest.raises(FileNotFoundError, match=f"{shard.name} was deleted during the run"):
            next(stream)


def test_close_ends_the_thread_and_may_be_repeated(folder: Path) -> None:
    stream = open_test_stream(folder)
    next(stream)
    assert any(t.name == "mini_llm-stream" for t in threading.enumerate())
    stream.close()
    stream.close()
    assert not any(t.name == "mini_llm-stream" for t in threading.enumerate())
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_rows_of_another_tokenizer_are_refused_where_one_is_given(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="--tokenizer: the data 'main' was packed with another"):
        open_test_stream(folder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="--tokenizer: the data 'main' was packed with another"):
        open_validation({"main": {"path": folder}}, seq_len=SEQ_LEN, tokenizer=tokenizer)
    entry = TokenizerEntry(tokenizer_fingerprint(tokenizer), 360)
    write_manifest(folder, replace(load_manifest(folder), tokenizer=entry))
    with open_test_stream(folder, tokenizer=tokenizer) as stream:
        assert sorted(row_ids(stream, 12)) == list(range(12))


def test_dropped_stream_ends_its_thread(folder: Path) -> None:
    stream = open_test_stream(folder)
    next(stream)
    del stream
    assert not any(t.name == "mini_llm-stream" for t in threading.enumerate())


def test_validation_slices_of_all_ranks_are_the_split_in_order(folder: Path) -> None:
    for world_size in (1, 2, 3, 4, 16):
        slices = [
            [
                int(row["input_ids"][0])
                for row in validation_rows(folder, rank=r, world_size=world_size)
            ]
            for r in range(world_size)
        ]
        assert [row for part in slices for row in part] == list(range(10))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
    limited = [int(row["input_ids"][0]) for row in validation_rows(folder, max_rows=4)]
    assert limited == [0, 1, 2, 3]


def test_folder_without_held_out_rows_has_no_validation(tmp_path: Path) -> None:
    write_packed_folder(tmp_path, [4])
    assert list(validation_rows(tmp_path)) == []
    found = open_validation({"a": {"path": tmp_path}}, seq_len=SEQ_LEN, max_rows=8)
    assert found["a"].total == 0 and found["a"].rows == []


def test_validation_of_every_source_is_finite_and_apart(folder: Path, tmp_path: Path) -> None:
    write_packed_folder(tmp_path / "other", [4], validation_rows=3, first_row_id=500)
    data = {"a": {"path": folder}, "b": {"path": tmp_path / "other", "weight": 2}}
    slices = [
        open_validation(data, seq_len=SEQ_LEN, max_rows=8, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    for name, ids in (("a", list(range(8))), ("b", [500, 501, 502])):
        assert [part[name].total for part in slices] == [len(ids)] * 2
        rows = [row for part in slices for row in part[name].rows]
        assert [int(row["input_ids"][0]) for row in rows] == ids
        assert {row["source"] for row in rows} == {name}
