"""A sample is a matter of the documents and the seed alone, exact in every source, unbiased."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import sample as tool
from data_tools.sample_charts import draw_source_shares
from mini_llm import durable
from mini_llm.data import sampling
from mini_llm.data.sampling import document_hash, sample_size
from mini_llm.data.text_files import Document, find_text_files, read_documents
from mini_llm.plots import style
from tests.unit.prepare_fixtures import REPOSITORY, conversation, files_of

Row = tuple[str, float | None, str]
SOURCES = {"Map-CC": 311, "中文 WuDao": 97, "rare": 3, "": 40}


def example_rows(seed: int = 0) -> list[Row]:
    """451 documents of four sources, some of the same text with another score or source."""
    draw = random.Random(seed)
    rows: list[Row] = [
        (f"{source} 第{i}篇 {draw.random()}", draw.random(), source)
        for source, count in SOURCES.items()
        for i in range(count)
    ]
    for i in range(0, 60, 3):
        rows[i + 1] = (rows[i][0], *rows[i + 1][1:])
        rows[i + 2] = rows[i]
        rows[i + 320] = (rows[i][0], *rows[i + 320][1:])
    draw.shuffle(rows)
    return rows


def write_parquet(path: Path, rows: Sequence[Row], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": pa.array([row[0] for row in rows], pa.string()),
        "score": pa.array([row[1] for row in rows], pa.float64()),
        "source": pa.array([row[2] for row in rows], pa.string()),
    }
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_lines(path: Path, lines: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
    return path


def line(text: str, source: str = "web") -> bytes:
    record = conversation(text, data_source=source)
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def command(source: Path | Sequence[Path], output: Path, *flags: object) -> list[str]:
    inputs = [source] if isinstance(source, Path) else source
    words = ("--input", *inputs, "--output_dir", output, "--num_proc", 1, "--rows_per_file", 30)
    return [str(word) for word in (*words, *flags)]


def take(source: Path | Sequence[Path], output: Path, *flags: object) -> dict[str, Any]:
    return tool.sample(tool.parse_arguments(command(source, output, *flags)))


def rows_of(output: Path) -> list[Row]:
    files = sorted(output.glob("sample-*.parquet"))
    tables = [pq.read_table(file).to_pydict() for file in files]
    return [
        row
        for table in tables
        for row in zip(table["text"], table["score"], table["source"], strict=True)
    ]


def expected_rows(rows: Sequence[Row], ratio: float, seed: int = 0) -> Counter[Row]:
    """What the definition says: of each source the documents of the smallest hashes."""
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row[2], []).append(row)
    taken: Counter[Row] = Counter()
    for source, members in by_source.items():
        members.sort(key=lambda row: document_hash(row[0], seed))
        taken.update(members[: sample_size(len(members), ratio, source, seed)])
    return taken


@pytest.fixture(autouse=True)
def no_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests are not about the chart, which takes longer than a small sample."""
    monkeypatch.setattr(tool, "draw_source_shares", lambda path, _: path.write_bytes(b"") == 0)


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several jobs to a file, and several merges to a sample."""
    monkeypatch.setattr(sampling, "JOB_DOCUMENTS", 50)
    monkeypatch.setattr(sampling, "JOB_BYTES", 4000)
    monkeypatch.setattr(sampling, "MERGED_BYTES", 2000)


# Independent of files, order and processes


@pytest.mark.usefixtures("small_jobs")
def test_sample_is_the_same_bytes_whatever_the_files_their_order_and_num_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = 0.37
    monkeypatch.setattr(tool, "draw_source_shares", draw_source_shares)
    rows = example_rows()
    write_parquet(tmp_path / "one/a.parquet", rows)
    shuffled = rows[::-1]
    for i in range(7):
        path = tmp_path / f"seven/{(i * 3) % 7}.parquet"
        write_parquet(path, shuffled[i::7], row_group_size=5 + i)
    summary = take(tmp_path / "one", tmp_path / "a", "--ratio", ratio)
    take(sorted((tmp_path / "seven").iterdir())[::-1], tmp_path / "b", "--ratio", ratio)
    # In one merge instead of several, too.
    monkeypatch.setattr(sampling, "MERGED_BYTES", 1 << 30)
    take(tmp_path / "seven", tmp_path / "c", "--ratio", ratio, "--num_proc", 2)
    assert len(summary["files"]) == -(-summary["sampled"] // 30) and summary["sampled"] > 20
    expected = files_of(tmp_path / "a")
    for folder in ("b", "c"):
        found = files_of(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == ["sample.json"]
    assert files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_equal_texts_at_the_end_of_a_source_are_chosen_whatever_the_file_order(
    tmp_path: Path,
) -> None:
    """Only equal texts, so that the last one taken is always among equals."""
    rows: list[Row] = [*(("same", i / 8, "web") for i in range(8)), *[("same", 0.0, "other")] * 4]
    outputs = []
    for turn in range(8):
        write_parquet(tmp_path / f"in{turn}/a.parquet", rows[turn:] + rows[:turn])
        take(tmp_path / f"in{turn}", tmp_path / f"out{turn}", "--ratio", 0.5)
        outputs.append(rows_of(tmp_path / f"out{turn}"))
    assert all(rows == outputs[0] for rows in outputs)
    assert Counter(row[2] for row in outputs[0]) == {"web": 4, "other": 2}


def test_other_seeds_and_other_choices_by_hash_give_other_samples(tmp_path: Path) -> None:
    rows = example_rows()
    write_parquet(tmp_path / "in/a.parquet", rows)
    samples = []
    for seed in (0, 1, 2**64 - 1):
        take(tmp_path / "in", tmp_path / f"{seed}", "--ratio", 0.3, "--seed", seed)
        samples.append(Counter(rows_of(tmp_path / f"{seed}")))
    shared = [(a & b).total() / a.total() for a, b in pairwise(samples)]
    assert all(0.15 < share < 0.45 for share in shared)


# Exact and unbiased


def test_each_source_gives_exactly_its_share_those_with_the_smallest_hashes(
    tmp_path: Path,
) -> None:
    rows: list[Row] = [row for row in example_rows() if row[2] != "Map-CC"]
    rows += [(f"text {i}", 0.5, "hundred") for i in range(100)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    for ratio in (0.05, 0.29, 0.999, 1):
        summary = take(tmp_path / "in", tmp_path / f"{ratio}", "--ratio", ratio)
        taken = Counter(row[2] for row in rows_of(tmp_path / f"{ratio}"))
        for source, counts in summary["sources"].items():
            assert counts["after"] == taken[source]
            assert abs(counts["after"] - ratio * counts["before"]) < 1
        assert Counter(rows_of(tmp_path / f"{ratio}")) == expected_rows(rows, ratio)
        assert taken["hundred"] == {0.05: 5, 0.29: 29, 1: 100}.get(ratio, taken["hundred"])


@pytest.mark.parametrize(
    "documents, ratio", [(3, 0.05), (1, 0.001), (7, 0.5), (19, 0.05), (20, 0.05), (1001, 0.2)]
)
def test_rounding_of_a_rare_source_is_unbiased_over_seeds(documents: int, ratio: float) -> None:
    seeds = 4000
    counts = Counter(sample_size(documents, ratio, "罕见", seed) for seed in range(seeds))
    below = int(documents * ratio + 1e-9)
    fraction = documents * ratio - below
    assert set(counts) <= {below, below + 1}
    # Within four standard deviations of the mean of so many draws.
    bound = 4 * (max(fraction * (1 - fraction), 0) / seeds) ** 0.5 + 1e-9
    assert abs(counts[below + 1] / seeds - fraction) <= bound


def test_every_document_of_a_rare_source_is_equally_likely_and_sources_round_independently() -> (
    None
):
    seeds = 6000
    texts = ["一", "two", "drei"]
    taken: Counter[str] = Counter()
    both = 0
    for seed in range(seeds):
        count = sample_size(3, 0.2, "a", seed)
        both += count == sample_size(3, 0.2, "b", seed) == 1
        taken.update(sorted(texts, key=lambda text: document_hash(text, seed))[:count])
    for text in texts:
        assert abs(taken[text] / seeds - 0.2) < 4 * (0.2 * 0.8 / seeds) ** 0.5
    assert abs(both / seeds - 0.36) < 4 * (0.36 * 0.64 / seeds) ** 0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(0, 2**64 - 1))
def test_a_larger_ratio_never_takes_fewer_and_1_takes_all(
    documents: int, a: float, b: float, seed: int
) -> None:
    sizes = [sample_size(documents, ratio, "web", seed) for ratio in (*sorted((a, b)), 1.0)]
    assert 0 <= sizes[0] <= sizes[1] <= sizes[2] == documents


def test_samples_of_larger_ratios_contain_those_of_smaller_ones(tmp_path: Path) -> None:
    rows = example_rows()
    write_parquet(tmp_path / "in/a.parquet", rows)
    samples = []
    for ratio in (0.01, 0.05, 0.051, 0.3, 0.9, 1):
        take(tmp_path / "in", tmp_path / f"{ratio}", "--ratio", ratio, "--seed", 3)
        samples.append(Counter(rows_of(tmp_path / f"{ratio}")))
    assert all(smaller <= larger for smaller, larger in pairwise(samples))
    assert samples[-1] == Counter(rows)


def test_a_source_may_have_its_own_ratio_and_the_others_keep_theirs(tmp_path: Path) -> None:
    rows: list[Row] = [*example_rows(), *((f"formula {i}", 0.1, "a=b") for i in range(10))]
    write_parquet(tmp_path / "in/a.parquet", rows)
    take(tmp_path / "in", tmp_path / "plain", "--ratio", 0.1)
    own = ("--source", "中文 WuDao=0", "a=b=1", "=0.5")
    take(tmp_path / "in", tmp_path / "own", "--ratio", 0.1, *own)
    plain, own_rows = rows_of(tmp_path / "plain"), rows_of(tmp_path / "own")
    assert Counter(row[2] for row in own_rows if row[2] not in ("Map-CC", "rare")) == {
        "a=b": 10,
        "": 20,
    }
    assert [r for r in plain if r[2] == "Map-CC"] == [r for r in own_rows if r[2] == "Map-CC"]


# What is read and written


def test_jsonl_lines_are_written_byte_for_byte_by_data_source(tmp_path: Path) -> None:
    lines = [
        b' {"output":"spaced" ,"history": [ ],"input":"","instruction":"","data_source":"odd"}\t\n',
        b'{"instruction": "\\u4e2d\\u6587", "input": "", "output": "1.0", "history": null, "x": 1e2'
        b', "data_source": "odd"}\r\n',
        line("中文 \u2028 文字", "odd"),
        *(line(f"text {i}", "web" if i % 3 else "知乎") for i in range(90)),
        line("the same"),
        line("the same"),
        line("not ended", "odd").removesuffix(b"\n"),
    ]
    write_lines(tmp_path / "in/a.jsonl", lines)
    summary = take(tmp_path / "in", tmp_path / "all", "--ratio", 1)
    found = [
        written
        for path in sorted((tmp_path / "all").glob("sample-*.jsonl"))
        for written in path.read_bytes().split(b"\n")[:-1]
    ]
    assert Counter(found) == Counter(content.removesuffix(b"\n") for content in lines)
    assert summary["sources"]["odd"] == {"before": 4, "after": 4}
    part = take(tmp_path / "in", tmp_path / "part", "--ratio", 0.1, "--source", "odd=1")
    assert part["sources"]["知乎"] == {"before": 30, "after": 3}
    kept = (tmp_path / "part/sample-000000.jsonl").read_bytes().split(b"\n")[:-1]
    assert Counter(kept) <= Counter(found) and len(kept) == part["sampled"]


@pytest.mark.usefixtures("small_jobs")
def test_jsonl_sample_is_the_same_bytes_whatever_the_files_and_num_proc(tmp_path: Path) -> None:
    lines = [line(f"text {i // 2}", f"source {i % 7}") for i in range(300)]
    # Equal conversations in unequal lines.
    lines += [b" " * (i % 5) + line(f"text {i // 20}", "spaced") for i in range(100)]
    write_lines(tmp_path / "one/a.jsonl", lines)
    for i in range(3):
        write_lines(tmp_path / f"three/{i}.jsonl", lines[::-1][i::3])
    take(tmp_path / "one", tmp_path / "a", "--ratio", 0.23)
    take(tmp_path / "three", tmp_path / "b", "--ratio", 0.23, "--num_proc", 2)
    found = [files_of(tmp_path / folder) for folder in ("a", "b")]
    for files in found:
        del files["sample.json"]
    assert found[0] == found[1] and len(found[0]) > 3


def test_other_tools_read_the_sample_as_they_read_its_input(tmp_path: Path) -> None:
    rows = example_rows()
    write_parquet(tmp_path / "in/a.parquet", rows)
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.2)
    documents = [d for f in find_text_files([tmp_path / "out"]) for d in read_documents(f)]
    assert all(isinstance(document, Document) for document in documents)
    assert [(d.text, d.source) for d in documents if isinstance(d, Document)] == [
        (text, source) for text, _, source in rows_of(tmp_path / "out")
    ]
    schema = pq.read_schema(tmp_path / "out/sample-000000.parquet")
    assert schema == pa.schema({"text": pa.string(), "score": pa.float64(), "source": pa.string()})


def test_scores_of_other_types_and_missing_ones_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table(
        {
            "id": [1, 2, 3],
            "source": pa.array(["web"] * 3, pa.large_string()),
            "text": pa.array(["a", "b", "c"], pa.large_string()),
            "score": pa.array([1, None, 3], pa.int8()),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=2)
    take(tmp_path / "in", tmp_path / "out", "--ratio", 1)
    assert sorted(rows_of(tmp_path / "out"), key=str) == [
        ("a", 1.0, "web"),
        ("b", None, "web"),
        ("c", 3.0, "web"),
    ]
    assert "the columns id are not kept" in capsys.readouterr().out


def test_rows_in_are_sampled_and_not_sampled_and_rejected_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [b"good %d" % i for i in range(50)] + [None, b"", b" \n", b"\xff\xfe"]
    binary = pa.array(texts, pa.binary())
    table = pa.table(
        {
            "text": pa.Array.from_buffers(pa.string(), len(texts), binary.buffers()),
            "score": [0.5] * len(texts),
            "source": pa.array(["web"] * 49 + [None] + ["web"] * 4, pa.string()),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/a.parquet")
    summary = take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert summary["rejected"] == {"empty": 2, "not_a_string": 2, "not_utf8": 1}
    assert (summary["input_rows"], summary["sampled"] + summary["not_sampled"]) == (54, 49)
    printed = capsys.readouterr().out
    sampled = summary["sampled"]
    assert f"54 rows = {sampled} sampled + {49 - sampled} not sampled + 5 rejected" in printed
    assert "rejected: 2 empty, 2 not_a_string, 1 not_utf8" in printed

    bad = [b"{broken}\n", b"\n", line("x").replace(b"x", b"\xff"), line("y")[:40]]
    surrogate = line("z", "SOURCE").replace(b"SOURCE", rb"\ud800")
    write_lines(tmp_path / "lines/a.jsonl", [line("good"), surrogate, *bad])
    summary = take(tmp_path / "lines", tmp_path / "out2", "--ratio", 1)
    assert summary["rejected"] == {
        "empty": 1,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "not_utf8": 1,
        "truncated": 1,
    }
    assert (summary["input_rows"], summary["sampled"]) == (6, 1)


def test_memory_grows_by_bytes_per_document_not_by_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "JOB_BYTES", 400_000)
    monkeypatch.setattr(sampling, "MERGED_BYTES", 200_000)
    peaks = []
    for scale in (1, 4):
        for shard in range(scale):
            rows: list[Row] = [(f"{shard} {i} " + "x" * 20_000, 0.5, "web") for i in range(200)]
            write_parquet(tmp_path / f"in{scale}/{shard}.parquet", rows)
        gc.collect()
        tracemalloc.start()
        take(tmp_path / f"in{scale}", tmp_path / f"out{scale}", "--ratio", 0.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 600 more documents with 12 MB of text, half of which is taken.
    assert peaks[1] - peaks[0] < 1_000_000


# Whole or absent, and restartable


KILLED = """
import os, signal, sys
sys.path.insert(0, ".")
from data_tools import sample as tool
from data_tools import sample_charts
from mini_llm.data import sampling
sampling.JOB_DOCUMENTS = 50
module, name, calls = {module}, {name!r}, {calls}
original = getattr(module, name)
def killed(*arguments, **options):
    global calls
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    calls -= 1
    return original(*arguments, **options)
setattr(module, name, killed)
tool.sample(tool.parse_arguments(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "module, name, calls, done",
    [
        ("sampling", "write_unit", 4, "hash: 4 of 10"),
        ("sampling", "write_unit", 14, "take: 4 of 10"),
        ("sampling", "_write_file", 1, "take: 10 of 10"),
        ("tool", "draw_source_shares", 0, "take: 10 of 10"),
        ("tool.shutil", "rmtree", 0, "nothing to do"),
    ],
)
def test_restart_after_a_kill_goes_on_and_gives_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    name: str,
    calls: int,
    done: str,
) -> None:
    monkeypatch.setattr(sampling, "JOB_DOCUMENTS", 50)
    monkeypatch.setattr(tool, "draw_source_shares", draw_source_shares)
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    take(tmp_path / "in", tmp_path / "whole", "--ratio", 0.4)
    script = KILLED.format(module=module, name=name, calls=calls)
    flags = command(tmp_path / "in", tmp_path / "out", "--ratio", 0.4)
    run = subprocess.run([sys.executable, "-c", script, *flags], cwd=REPOSITORY, check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "out/sample.json").exists() == (name == "rmtree")
    capsys.readouterr()
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.4)
    assert done in capsys.readouterr().out
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_options_after_a_kill_leave_no_trace_of_the_ones_before(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    script = KILLED.format(module="tool", name="draw_source_shares", calls=0)
    flags = command(tmp_path / "in", tmp_path / "out", "--ratio", 0.9)
    subprocess.run([sys.executable, "-c", script, *flags], cwd=REPOSITORY, check=False)
    assert len(list((tmp_path / "out").glob("sample-*.parquet"))) > 10
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.1)
    take(tmp_path / "in", tmp_path / "fresh", "--ratio", 0.1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("writes_before", [0, 3, 5, 8])
def test_full_disk_is_one_sentence_and_a_restart_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes_before: int
) -> None:
    monkeypatch.setattr(sampling, "JOB_DOCUMENTS", 250)
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    take(tmp_path / "in", tmp_path / "whole", "--ratio", 0.5)
    sync, left = os.fsync, [writes_before]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(OSError, match=r"--output_dir: no space is left.*run the same"):
            take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_finished_sample_is_not_taken_again_and_other_options_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = example_rows()
    for i in range(2):
        write_parquet(tmp_path / f"in/{i}.parquet", rows[i::2])
    summary = take(tmp_path / "in", tmp_path / "out", "--ratio", 0.2)
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    files = sorted((tmp_path / "in").iterdir())[::-1]
    assert take(files, tmp_path / "out", "--ratio", 0.2, "--num_proc", 2) == summary
    assert capsys.readouterr().out.endswith("already holds this sample: nothing to do\n")
    for flags in (
        ("--ratio", 0.3),
        ("--ratio", 0.2, "--seed", 1),
        ("--ratio", 0.2, "--source", "rare=1"),
        ("--ratio", 0.2, "--rows_per_file", 9),
        ("--ratio", 0.2, "--skip_bad_files"),
    ):
        with pytest.raises(
            ValueError, match=f"another {flags[-2 if len(flags) % 2 == 0 else -1]};"
        ):
            take(tmp_path / "in", tmp_path / "out", *flags)
    with pytest.raises(ValueError, match="another --input;"):
        take(files[0], tmp_path / "out", "--ratio", 0.2)
    assert files_of(tmp_path / "out") == before
    (tmp_path / "out/sample-000001.parquet").unlink()
    with pytest.raises(ValueError, match=r"sample-000001\.parquet is missing or was changed"):
        take(tmp_path / "in", tmp_path / "out", "--ratio", 0.2)


# Refusals


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ratio", 0], "--ratio must be above 0 and at most 1, got 0.0"),
        (["--ratio", 1.01], "--ratio must be above 0"),
        (["--ratio", "nan"], "--ratio must be above 0"),
        (["--ratio", 0.1, "--seed", -1], "--seed must lie"),
        (["--ratio", 0.1, "--num_proc", 0], "--num_proc must be at least 1"),
        (["--ratio", 0.1, "--rows_per_file", 0], "--rows_per_file must be at least 1"),
        (["--ratio", 0.1, "--source", "web"], "--source web is not NAME=RATIO"),
        (["--ratio", 0.1, "--source", "0.5"], "--source 0.5 is not NAME=RATIO"),
        (["--ratio", 0.1, "--source", "web=2"], "with a ratio from 0 to 1"),
        (["--ratio", 0.1, "--source", "web=nan"], "with a ratio from 0 to 1"),
        (["--ratio", 0.1, "--source", "a=1", "a=0"], "--source has a name twice"),
        (
            ["--ratio", 0.1, "--source", "webb=1"],
            "--source: the input has no source webb; its sources are a, web",
        ),
        (["--ratio", 1e-9], r"--ratio: none of 20 documents is taken \(20 rows, 0 rejected\)"),
        (["--ratio", 0.1, "--input", "nowhere"], "--input: nowhere does not exist"),
    ],
)
def test_flag_that_cannot_be_is_one_sentence_that_names_it(
    tmp_path: Path, flags: list[object], message: str
) -> None:
    rows: list[Row] = [(f"text {i}", 0.5, "a" if i % 2 else "web") for i in range(20)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    with pytest.raises((ValueError, OSError), match=message) as error:
        take(tmp_path / "in", tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/sample.json").exists()


def test_error_of_the_command_is_one_line_and_status_2(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    flags = command(tmp_path / "in", tmp_path / "in/out", "--ratio", 0.5)
    run = subprocess.run(
        [sys.executable, "data_tools/sample.py", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "so that what is written would become its own input" in run.stderr


def test_inputs_that_cannot_be_one_sample_are_refused(tmp_path: Path) -> None:
    shard = write_parquet(tmp_path / "in/a.parquet", example_rows())
    with pytest.raises(ValueError, match="--input: a file is given twice"):
        take([tmp_path / "in", shard], tmp_path / "out", "--ratio", 0.5)
    write_lines(tmp_path / "in/b.jsonl", [line("text")])
    with pytest.raises(ValueError, match="--input: parquet and jsonl cannot become one sample"):
        take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    with pytest.raises(ValueError, match=r"--output_dir: .*a\.parquet is a file"):
        take(shard, shard, "--ratio", 0.5)


def test_output_folder_of_something_else_or_in_use_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    # A file that only looks like one of a sample is not overwritten.
    foreign = write_parquet(tmp_path / "out/sample-000000.parquet", example_rows())
    content = foreign.read_bytes()
    with pytest.raises(ValueError, match=r"holds other files \(sample-000000\.parquet\)"):
        take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert files_of(tmp_path / "out") == {"sample-000000.parquet": content}
    (tmp_path / "json").mkdir()
    (tmp_path / "json/sample.json").write_text('{"x": 1}')
    with pytest.raises(ValueError, match=r"sample\.json was not written by this version"):
        take(tmp_path / "in", tmp_path / "json", "--ratio", 0.5)
    (tmp_path / "busy/unfinished").mkdir(parents=True)
    with (tmp_path / "busy/unfinished/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="--output_dir: another process"):
            take(tmp_path / "in", tmp_path / "busy", "--ratio", 0.5)


def flip_page(path: Path, column: str) -> None:
    """Change one bit of the first page of a column, which its checksum shows."""
    group = pq.read_metadata(path).row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(3)}
    content = bytearray(path.read_bytes())
    content[chunks[column].data_page_offset + chunks[column].total_compressed_size - 9] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("fault", ["empty file", "cut off", "text", "source", "score", "column"])
def test_bad_file_stops_the_sample_or_is_skipped_and_listed_on_request(
    tmp_path: Path, fault: str
) -> None:
    rows = example_rows()
    bad = write_parquet(
        tmp_path / "in/bad.parquet",
        rows[:100],
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    write_parquet(tmp_path / "in/good.parquet", rows[100:])
    write_parquet(tmp_path / "in/no_rows.parquet", [])
    if fault == "empty file":
        bad.write_bytes(b"")
    elif fault == "cut off":
        bad.write_bytes(bad.read_bytes()[:-20])
    elif fault == "column":
        pq.write_table(pq.read_table(bad).drop_columns("score"), bad)
    else:
        flip_page(bad, fault)
    with pytest.raises(ValueError, match=r"^--input: .*bad\.parquet .*or give --skip_bad_files$"):
        take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert not list((tmp_path / "out").glob("sample*"))
    summary = take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5, "--skip_bad_files")
    assert [skipped["name"] for skipped in summary["skipped_files"]] == ["bad.parquet"]
    assert summary["input_rows"] == len(rows) - 100
    assert Counter(rows_of(tmp_path / "out")).keys() <= set(rows[100:])


@pytest.mark.parametrize("change", ["replaced", "removed"])
@pytest.mark.parametrize("when", ["between the stages", "while it is read"])
def test_input_that_changes_during_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: str
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", example_rows())
    other = write_parquet(tmp_path / "other.parquet", example_rows(1))
    between = when.startswith("between")
    module, name = (tool, "plan_shares") if between else (sampling, "_scores")
    original = getattr(module, name)
    calls_before = [0 if between else 1]  # the first stage reads the scores too

    def changed_after(*arguments: Any) -> Any:
        result = original(*arguments)
        calls_before[0] -= 1
        if calls_before[0] < 0:
            if change == "replaced":
                other.replace(path)
            else:
                path.unlink()
        return result

    monkeypatch.setattr(module, name, changed_after)
    with pytest.raises(ValueError, match=r"--input: .*a\.parquet was changed or replaced"):
        take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5, "--skip_bad_files")
    assert not (tmp_path / "out/sample.json").exists()


def test_file_that_changed_in_its_middle_since_a_killed_run_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(f"{i:06d} " + "x" * 90) for i in range(2000)]
    path = write_lines(tmp_path / "in/a.jsonl", lines)
    with monkeypatch.context() as patch:
        patch.delattr(tool, "plan_shares")  # the run stops there
        with pytest.raises(NameError):
            take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    write_lines(
        path, [lines[i] if i != 1000 else lines[i].replace(b"x", b"y") for i in range(2000)]
    )
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    take(tmp_path / "in", tmp_path / "fresh", "--ratio", 0.5)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


# What the user sees


def test_table_shows_documents_and_shares_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Row] = [(f"text {i}", 0.5, "中文" if i < 300 else "web") for i in range(1000)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    take(tmp_path / "in", tmp_path / "out", "--ratio", 0.1, "--source", "中文=0.01")
    table = [words.split() for words in capsys.readouterr().out.splitlines()[:4]]
    assert table == [
        ["documents", "share", "sampled", "share", "source"],
        ["700", "70.00%", "70", "95.89%", "web"],
        ["300", "30.00%", "3", "4.11%", "中文"],
        ["1,000", "100.00%", "73", "100.00%", "all"],
    ]


def test_chart_takes_any_name_and_many_sources_and_is_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["中文维基", "$a^^b$", "_hidden", tool.shown_name(""), tool.shown_name("a\nb\x00" * 99)]
    sources = [(name, 10 * i, i) for i, name in enumerate(names)]
    monkeypatch.setattr(style, "CHINESE_FONTS", ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            assert not draw_source_shares(tmp_path / name, sources)  # and says so
        assert draw_source_shares(tmp_path / "c.png", sources[1:])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    shares = [sampling.Share(f"source {i}", 1000 - i, 10, 0, 0) for i in range(100)]
    listed = tool.listed_sources(shares)
    assert len(listed) == tool.LISTED_SOURCES + 1 and listed[0] == ("source 0", 1000, 10)
    assert listed[-1] == ("70 others", sum(1000 - i for i in range(30, 100)), 700)


def test_chart_of_a_sample_shows_all_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, int]] = []

    def draw(path: Path, sources: Sequence[tuple[str, int, int]]) -> bool:
        drawn.extend(sources)
        return draw_source_shares(path, sources)

    monkeypatch.setattr(tool, "draw_source_shares", draw)
    write_parquet(tmp_path / "in/a.parquet", example_rows())
    summary = take(tmp_path / "in", tmp_path / "out", "--ratio", 0.5)
    assert (tmp_path / "out/source_shares.png").read_bytes().startswith(b"\x89PNG")
    assert [name for name, _, _ in drawn] == ["Map-CC", "中文 WuDao", "(no name)", "rare"]
    assert sum(after for _, _, after in drawn) == summary["sampled"]
