"""Preparation of pretraining data: exact, reproducible, restartable, bounded, and fully counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import prepare_pretrain
from mini_llm.data import progress
from mini_llm.data.manifest import load_manifest
from mini_llm.data.packing import PackingStats, pack_documents
from mini_llm.data.text_files import clean_text
from mini_llm.data.unit_files import row_arrays, write_shuffled, write_unit
from tests.unit.prepare_fixtures import (
    CHINESE,
    REPOSITORY,
    all_decoded,
    command,
    conversation,
    decoded,
    example_texts,
    files_of,
    make_tokenizer,
    prepare,
    run_tool,
    write_jsonl,
    write_shard,
    write_shards,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 100 documents, so that a small corpus has several."""
    monkeypatch.setattr(prepare_pretrain, "UNIT_DOCUMENTS", 100)
    monkeypatch.setattr(prepare_pretrain, "UNIT_BYTES", 10_000)


# A second process with small units; kills itself like `kill -9` after so many units.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, ".")
from data_tools import prepare_pretrain as tool
tool.UNIT_DOCUMENTS, tool.UNIT_BYTES = 100, 10_000
die_after, write = int(sys.argv[1]), tool.{where}
def counted(*arguments, **options):
    global die_after
    if die_after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    die_after -= 1
    return write(*arguments, **options)
tool.{where} = counted
tool.prepare(tool.parse_arguments(sys.argv[2:]))
"""


def run_killed(where: str, die_after: int, flags: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(where=where), str(die_after), *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


# Exact text


def test_decoded_packed_rows_give_back_chinese_texts_exactly(
    tmp_path: Path, tokenizer: Path
) -> None:
    texts = [f"{text}{i}" for i in range(30) for text in CHINESE]
    write_shard(tmp_path / "in/a.parquet", texts)
    prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--seq_len", 256, "--rows_per_file", 20)
    assert all_decoded(tmp_path / "out", tokenizer) == sorted(texts)


def test_clean_takes_out_what_no_reader_sees_and_nothing_else() -> None:
    text = "\ufeff\n第一行  \r\n  缩进\t保留\x00\x07\u3000\r第三行\n\n\u200d字\n \t\n"
    assert clean_text(text) == "第一行\n  缩进\t保留\n第三行\n\n\u200d字"
    assert clean_text(" \x00\r\n\t ") == ""
    for already_clean in ("中文。", "  def f():\n\n\n    return 1", "a\u3000b"):
        assert clean_text(already_clean) == already_clean


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="a字 \t\r\n\x00\u3000\ufeff", max_size=30))
def test_cleaning_twice_is_cleaning_once_and_keeps_visible_characters(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert [c for c in cleaned if c in "a字"] == [c for c in text if c in "a字"]


def test_cleaning_ends_for_a_text_of_a_million_spaces() -> None:
    text = "a" + " " * 1_000_000 + "b"  # a quadratic search would take hours
    assert clean_text(text) == text


def test_cleaning_is_asked_for_and_what_it_leaves_empty_is_counted(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_shard(tmp_path / "in/a.parquet", [*example_texts(40), "干净 \r\n", "\x00\x01"])
    exact = prepare(tmp_path / "in", tokenizer, tmp_path / "exact")
    clean = prepare(tmp_path / "in", tokenizer, tmp_path / "clean", "--clean")
    assert "干净 \r\n" in all_decoded(tmp_path / "exact", tokenizer)
    assert "干净" in all_decoded(tmp_path / "clean", tokenizer)
    assert exact.rejected == {} and clean.rejected == {"empty": 1}
    line = json.loads((tmp_path / "clean/quarantine.jsonl").read_text())
    assert line["place"] == "row 41"


# Reproducible


@pytest.mark.usefixtures("small_units")
def test_result_is_byte_identical_for_any_number_of_processes_and_any_memory(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_shards(tmp_path / "in", 5)
    write_jsonl(tmp_path / "in/x.jsonl", (conversation(t) for t in example_texts(300, seed=1)))
    flags = ("--deduplicate",)
    prepare(tmp_path / "in", tokenizer, tmp_path / "one", *flags)
    prepare(tmp_path / "in", tokenizer, tmp_path / "two", *flags, "--num_proc", 2)
    prepare(tmp_path / "in", tokenizer, tmp_path / "low", *flags, "--max_tokens_in_memory", 40 * 64)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "low")
    assert load_manifest(tmp_path / "one").rejected == {"duplicate": 60}


@pytest.mark.parametrize(("where", "die_after"), [("pack_documents", 3), ("write_manifest", 0)])
@pytest.mark.usefixtures("small_units")
def test_killed_preparation_goes_on_where_it_was_and_ends_byte_identical(
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
    die_after: int,
) -> None:
    write_shards(tmp_path / "in", 9)
    prepare(tmp_path / "in", tokenizer, tmp_path / "whole")
    killed = run_killed(where, die_after, command(tmp_path / "in", tokenizer, tmp_path / "out"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = sorted((tmp_path / "out/unfinished").glob("unit-*.json"))
    assert len(done) == (die_after or 5)
    assert not (tmp_path / "out/manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    capsys.readouterr()

    seen = {}
    remove = prepare_pretrain.shutil.rmtree

    def look_then_remove(folder: Path) -> None:
        seen.update({p: p.stat().st_mtime_ns for p in times if Path(folder).name == "unfinished"})
        remove(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_pretrain.shutil, "rmtree", look_then_remove)
        prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert f"{len(done)} of 5 units were done before" in capsys.readouterr().out
    assert seen == times
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_processes_end_when_the_preparation_is_killed_and_a_second_run_is_refused_meanwhile(
    tmp_path: Path, tokenizer: Path
) -> None:
    # Large enough to be still at it when it is looked at.
    for shard in range(4):
        write_shard(tmp_path / f"in/{shard}.parquet", example_texts(12_000, seed=shard))
    flags = command(tmp_path / "in", tokenizer, tmp_path / "out", "--num_proc", 2)
    tool = subprocess.Popen(
        [sys.executable, "data_tools/prepare_pretrain.py", *flags], cwd=REPOSITORY
    )
    workers: list[int] = []
    deadline = time.monotonic() + 240
    while len(workers) < 3:  # two that tokenise, and multiprocessing's resource tracker
        assert time.monotonic() < deadline and tool.poll() is None
        children = Path(f"/proc/{tool.pid}/task/{tool.pid}/children").read_text().split()
        workers = [int(child) for child in children]
        time.sleep(0.05)
    with pytest.raises(ValueError, match="--output_dir: another process is preparing"):
        prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--num_proc", 2)
    tool.kill()
    tool.wait()
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.usefixtures("small_units")
def test_changed_input_or_options_redo_only_the_units_they_touch(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 9)
    killed = run_killed("write_manifest", 0, command(tmp_path / "in", tokenizer, tmp_path / "out"))
    assert killed.returncode == -signal.SIGKILL
    write_shard(tmp_path / "in/000008.parquet", example_texts(60, seed=5))
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert "4 of 5 units were done before" in capsys.readouterr().out
    prepare(tmp_path / "in", tokenizer, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_work_folder_that_a_kill_left_beside_a_finished_result_is_removed(
    tmp_path: Path, tokenizer: Path
) -> None:
    write_shards(tmp_path / "in", 1)
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out/unfinished").mkdir()
    (tmp_path / "out/unfinished/unit-000000.bin").write_bytes(b"left over")
    assert prepare(tmp_path / "in", tokenizer, tmp_path / "out") == manifest
    assert files_of(tmp_path / "out") == before


# Bounded and well packed


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    rows_per_file=st.integers(1, 9),
    rows_in_memory=st.integers(1, 40),
)
def test_shuffle_over_the_disk_is_one_order_for_all_memories_and_loses_no_row(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    rows_per_file: int,
    rows_in_memory: int,
) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("shuffle")
    names, first = [], 1
    for index, size in enumerate(sizes):
        # Documents of 5..8 tokens, one a row of 8, so that a row is known by its first token.
        lengths = 5 + np.arange(size) % 4
        tokens = np.repeat(np.arange(first, first + size), lengths).astype(np.uint16)
        packed = pack_documents(tokens, lengths, 8)
        assert packed.stats.rows == size
        names.append(f"unit-{index}")
        write_unit(folder, names[-1], row_arrays(packed, str(index)), {})
        first += size
    orders = []
    for memory in (rows_in_memory, 10**6):
        output = folder / str(memory)
        entries = list(
            write_shuffled(
                output,
                "train",
                folder,
                names,
                rows_per_file=rows_per_file,
                row_group_rows=4,
                max_rows_in_memory=memory,
            )
        )
        tables = [pq.read_table(output / entry.file) for entry in entries]
        ids = [row for table in tables for row in table["input_ids"].to_pylist()]
        lens = [row for table in tables for row in table["doc_lens"].to_pylist()]
        for row, (length,) in zip(ids, lens, strict=True):
            assert row == [row[0]] * length + [0] * (8 - length)
        assert [entry.rows for entry in entries[:-1]] == [rows_per_file] * (len(entries) - 1)
        orders.append([row[0] for row in ids])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(1, first))


def test_shuffle_mixes_the_units() -> None:
    keys = [
        row_arrays(pack_documents(np.ones(8000, np.uint16), np.full(1000, 8), 8), str(unit))["keys"]
        for unit in range(4)
    ]
    units = np.repeat(np.arange(4), 1000)[np.argsort(np.concatenate(keys))]
    for start in range(0, 4000, 500):  # binomial: 125 ± 9.7
        counts = np.bincount(units[start : start + 500], minlength=4)
        assert counts.min() > 75 and counts.max() < 175


@pytest.mark.parametrize("documents_per_shard", [2000, 150])
def test_lognormal_lengths_fill_rows_of_2048_over_99_5_percent_with_under_1_percent_split(
    tmp_path: Path, tokenizer: Path, documents_per_shard: int
) -> None:
    # Only the planning and packing count here, so a document is described by its length: units are
    # planned from real shards, whose documents get lengths like those of web text.
    shards = 18_000 // documents_per_shard
    for shard in range(shards):
        write_shard(tmp_path / f"in/{shard:06d}.parquet", ["x"] * documents_per_shard)
    files = [prepare_pretrain.InputFile.of(p) for p in sorted((tmp_path / "in").iterdir())]
    units = prepare_pretrain.plan_units(
        files,
        prepare_pretrain.Settings(str(tokenizer), "", 500, 0, True, False, 0.0, 2048, 0),
    )
    draw = np.random.default_rng(0)
    stats = PackingStats()
    for unit in units:
        count = sum(piece.documents for piece in unit.pieces)
        lengths = draw.lognormal(6.0, 0.65, count).astype(np.int64) + 2
        stats += pack_documents(np.ones(int(lengths.sum()), np.uint16), lengths, 2048).stats
    assert stats.documents == shards * documents_per_shard
    assert stats.utilisation(2048) >= 0.995
    assert stats.split_fraction <= 0.01


def test_peak_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_pretrain, "UNIT_DOCUMENTS", 200)
    peaks = []
    for shards in (1, 4, 16):  # the first one for what is imported when it is first used
        source = tmp_path / str(shards)
        for shard in range(shards):
            texts = [f"{shard} {row} " + "数据 row " * 140 for row in range(200)]
            write_shard(source / f"{shard:06d}.parquet", texts)
        flags = ("--seq_len", 512, "--rows_per_file", 100, "--max_tokens_in_memory", 512 * 100)
        tracemalloc.start()  # counts numpy's memory too
        manifest = prepare(source, tokenizer, tmp_path / f"out{shards}", *flags)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(split.rows for split in manifest.splits.values()) == 200 * shards
    # The rows of the larger corpus are 2.4 MB more.
    assert peaks[2] - peaks[1] < 600_000, peaks


# Counted


@pytest.mark.usefixtures("small_units")
def test_first_of_equal_documents_in_file_order_is_the_one_that_stays(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = example_texts(250)
    write_shard(tmp_path / "in/a.parquet", texts[:150] + texts[:20])
    write_jsonl(
        tmp_path / "in/b.jsonl",
        (conversation(text, data_source="chat") for text in texts[100:] + texts[240:]),
    )
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--deduplicate")
    # texts[100:150] stand in both files: the parquet, which comes first, keeps them.
    sources: Counter[str] = Counter()
    for split in manifest.splits.values():
        sources.update(split.documents_per_source)
    assert sources == {"web": 150, "chat": 100}
    assert manifest.rejected == {"duplicate": 20 + 50 + 10}
    assert all_decoded(tmp_path / "out", tokenizer) == sorted(texts)
    assert not (tmp_path / "out/quarantine.jsonl").exists()
    assert "input: 330 rows = 250 documents + 80 rejected" in capsys.readouterr().out


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40), max_size=60))
def test_later_duplicates_are_those_of_a_plain_set(values: list[int]) -> None:
    seen: set[int] = set()
    expected = [value in seen or seen.add(value) is not None for value in values]
    found = prepare_pretrain.later_duplicates(np.array(values, np.uint64))
    assert found.tolist() == expected


@pytest.mark.parametrize("flags", [[], ["--deduplicate"]])
def test_input_without_a_row_is_said_to_leave_no_document(
    tmp_path: Path, tokenizer: Path, flags: list[str]
) -> None:
    shard = write_shard(tmp_path / "in/a.parquet", [])
    with pytest.raises(ValueError, match="--input: no training document is left"):
        prepare(shard, tokenizer, tmp_path / "out", *flags)


def test_equal_texts_never_stand_in_both_splits(tmp_path: Path, tokenizer: Path) -> None:
    write_shard(tmp_path / "in/a.parquet", example_texts(200) * 2)
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    train = decoded(tmp_path / "out", tokenizer, "train")
    held_out = decoded(tmp_path / "out", tokenizer, "validation")
    assert len(train) + len(held_out) == 400 and held_out
    assert not set(train) & set(held_out)


def test_output_folder_in_the_input_and_a_file_given_twice_are_refused(
    tmp_path: Path, tokenizer: Path
) -> None:
    shard = write_shard(tmp_path / "in/a.parquet", example_texts(40))
    with pytest.raises(ValueError, match="--output_dir: .* would become its own input"):
        prepare(tmp_path / "in", tokenizer, tmp_path / "in/packed")
    with pytest.raises(ValueError, match="--input: a file is given twice"):
        flags = command(shard, tokenizer, tmp_path / "out")
        flags.insert(flags.index(str(shard)), str(tmp_path / "in"))
        prepare_pretrain.prepare(prepare_pretrain.parse_arguments(flags))
    assert not (tmp_path / "in/packed").exists() and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_units")
def test_progress_names_stage_share_speed_and_time_left(
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(tmp_path / "in", 8)
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 8.0)
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    # Four equal units, one every 4 s; the second line comes 8 s after the first.
    found = [line for line in lines if line.startswith("tokenise:")]
    assert len(found) == 2
    tokens = int(found[0].split()[2].replace(",", ""))
    assert found[0].endswith(f"%, {tokens:,} tokens, {tokens / 8:,.0f} tokens/s, ETA 0:00:08")
    assert found[1].startswith("tokenise: 100.0%") and found[1].endswith("ETA 0:00:00")


def test_speed_is_not_that_of_units_which_an_earlier_run_did(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_shards(tmp_path / "in", 2)
    with monkeypatch.context() as stopped:
        stopped.setattr(prepare_pretrain, "write_shuffled", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "units were done before" in printed and "tokens/s" not in printed
    assert printed.endswith(" s, after what an earlier run had done\n")
    prepare(tmp_path / "in", tokenizer, tmp_path / "again")
    assert " tokens/s over " in capsys.readouterr().out.splitlines()[-1]


def test_duration_is_hours_minutes_seconds() -> None:
    assert progress.duration(3 * 3600 + 61.4) == "3:01:01"
    assert progress.duration(59.6) == "0:01:00"


def test_tool_prints_a_summary_that_adds_up(tmp_path: Path, tokenizer: Path) -> None:
    write_shard(tmp_path / "in/a.parquet", [*example_texts(50), "", None])
    done = run_tool(command(tmp_path / "in", tokenizer, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "input: 52 rows = 50 documents + 2 rejected\n" in done.stdout
    assert "rejected: 1 empty, 1 not_a_string\n" in done.stdout
    manifest = load_manifest(tmp_path / "out")
    assert manifest.input_rows == 52
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.json",
        "quarantine.jsonl",
        "train",
        "validation",
    ]
