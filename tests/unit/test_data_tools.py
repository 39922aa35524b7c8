"""The command-line tools: quickstart corpus, tokenizer training and preparation."""

from __future__ import annotations

import gzip
import inspect
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import make_quickstart_corpus, prepare_pretrain, train_tokenizer
from mini_llm.data import quickstart
from mini_llm.data.manifest import Manifest, load_manifest
from mini_llm.data.stream import validation_rows
from mini_llm.data.text_files import conversation_text
from mini_llm.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SEQ_LEN = 64


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"data_tools/{name}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def write_text_parquet(path: Path, texts: Iterable[str | None], source: str = "web") -> None:
    texts = list(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": pa.array(texts, pa.string()),
        "score": pa.array([0.8] * len(texts), pa.float64()),
        "source": pa.array([source] * len(texts), pa.string()),
    }
    pq.write_table(pa.table(columns), path)


def example_texts(count: int, seed: int = 0) -> list[str]:
    words = ["alpha", "beta", "手册", "gamma\n", "x = 1", "  spaces ", "<|endoftext|>", "é"]
    generator = random.Random(seed)
    texts = {" ".join(generator.choices(words, k=generator.randint(1, 25))) for _ in range(count)}
    return sorted(texts)


@pytest.fixture(scope="module")
def small_stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stdlib")
    for name in ("textwrap.py", "bisect.py", "heapq.py", "shlex.py", "argparse.py"):
        shutil.copy(STDLIB / name, folder / name)
    (folder / "test").mkdir()
    (folder / "test" / "test_nothing.py").write_text('def skipped():\n    """Not wanted."""\n')
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, small_stdlib: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_quickstart_corpus.build_corpus(folder, 10**9, small_stdlib, folder / "no-man-pages")
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    arguments = ["--input", corpus / "pretrain", "--output_dir", folder, "--vocab_size", 400]
    train_tokenizer.run(train_tokenizer.parse_arguments(list(map(str, arguments))))
    return folder


def prepare(inputs: list[Path], tokenizer: Path, output: Path, **options: object) -> Manifest:
    values: dict[str, object] = {
        "seq_len": SEQ_LEN,
        "validation_fraction": 0.2,
        "num_proc": 1,
        "rows_per_file": 20,
        "row_group_rows": 4,
        **options,
    }
    command = ["--input", *inputs, "--tokenizer", tokenizer, "--output_dir", output]
    for name, value in values.items():
        command += [f"--{name}", value]
    return prepare_pretrain.prepare(prepare_pretrain.parse_arguments(list(map(str, command))))


def read_rows(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = []
    for file in load_manifest(folder).splits[split].files:
        table = pq.read_table(folder / file.file)
        for row in table.to_pylist():
            rows.append((np.array(row["input_ids"]), np.array(row["doc_lens"])))
    return rows


def decoded_documents(folder: Path, split: str, tokenizer_dir: Path) -> list[str]:
    """Return the text of every segment, without its end token where it has one."""
    tokenizer: Any = load_tokenizer(tokenizer_dir)
    texts = []
    for input_ids, doc_lens in read_rows(folder, split):
        end = 0
        for length in doc_lens:
            segment = input_ids[end : end + length].tolist()
            end += length
            texts.append(tokenizer.decode(segment[:-1] if segment[-1] == 0 else segment))
    return texts


# Corpus


def test_corpus_is_byte_identical_when_built_again(
    tmp_path: Path, corpus: Path, small_stdlib: Path
) -> None:
    make_quickstart_corpus.build_corpus(tmp_path, 10**9, small_stdlib, tmp_path / "no-man-pages")
    names = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert len(names) >= 2
    for name in names:
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


def test_corpus_has_the_schema_of_fineweb_and_no_duplicates(corpus: Path) -> None:
    table = pq.read_table(corpus / "pretrain")
    assert table.column_names == ["text", "score", "source"]
    assert table.schema.types == [pa.string(), pa.float64(), pa.string()]
    texts = table["text"].to_pylist()
    assert len(set(texts)) == len(texts) > 100
    assert set(table["source"].to_pylist()) == {"python-source", "python-docstrings"}
    assert all(0.5 <= score <= 1 for score in table["score"].to_pylist())
    assert inspect.getsource(textwrap.dedent) in texts
    assert not any("Not wanted" in text for text in texts)


def test_corpus_keeps_to_its_byte_limit(tmp_path: Path, small_stdlib: Path) -> None:
    make_quickstart_corpus.build_corpus(tmp_path, 50_000, small_stdlib, tmp_path / "none")
    texts = pq.read_table(tmp_path / "pretrain")["text"].to_pylist()
    assert 40_000 < sum(len(text.encode()) for text in texts) <= 50_000


def test_conversations_have_the_fields_of_deepctrl_and_real_answers(corpus: Path) -> None:
    lines = (corpus / "sft/sft_data_en.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    fields = (
        "id instruction input output history language data_source input_len output_len num_utter "
        "type type_keyword"
    )
    assert all(list(record) == fields.split() for record in records)
    dedent = next(r for r in records if "textwrap.dedent" in str(r["input"]) + str(r["history"]))
    assert dedent["output"] == "Remove any common leading whitespace from every line in `text`."
    assert {len(record["history"]) for record in records} == {0, 1}
    assert {bool(record["instruction"]) for record in records} == {False, True}
    assert all(record["num_utter"] == len(record["history"]) + 1 for record in records)
    assert all(record["output_len"] == len(record["output"]) > 0 for record in records)
    assert all(isinstance(record["type"], int) for record in records)


def test_manual_page_is_rendered_as_plain_paragraphs() -> None:
    roff = textwrap.dedent(
        r"""
        .\" a comment
        .TH MAN 1
        .SH 名称
        man \- 参考手册的接口
        .PP
        \fBman\fR 是系统的
        手册分页程序。
        .IP "\-k" 4
        .BR apropos (1)
        """
    )
    assert make_quickstart_corpus.roff_to_text(roff) == (
        "名称\n\nman - 参考手册的接口\n\nman 是系统的手册分页程序。\n\n-k apropos(1)\n"
    )


def test_manual_page_that_cannot_be_read_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roff = ".SH 名称\n" + "列出目录的内容，" * 20
    good = gzip.compress(roff.encode())
    damaged = good[:12] + bytes(9) + good[21:]
    pages = {"1": good, "2": good[:40], "3": damaged, "4": gzip.compress(roff.encode("gb18030"))}
    for section, content in pages.items():
        (tmp_path / f"ls.{section}.gz").write_bytes(content)
    (tmp_path / "ls.5.gz").symlink_to("gone.gz")
    (text,) = make_quickstart_corpus.manual_pages(tmp_path)
    assert text.startswith("名称\n\n列出目录的内容")
    told = capsys.readouterr().out
    assert [told.count(f"ls.{n}.gz is left out: ") for n in range(1, 6)] == [0, 1, 1, 1, 1]


def test_corpus_without_sources_says_which_flag(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_tool(
        "make_quickstart_corpus", "--output_dir", tmp_path, "--stdlib_dir", tmp_path / "empty"
    )
    assert result.returncode == 2
    assert result.stderr.startswith("--stdlib_dir:") and result.stderr.count("\n") == 1


# Preparation


def test_packed_rows_decode_to_the_exact_texts(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = [text for text in example_texts(900) if len(text.encode()) < SEQ_LEN]
    write_text_parquet(tmp_path / "in/a.parquet", texts)
    manifest = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    decoded = {
        split: decoded_documents(tmp_path / "out", split, tokenizer_dir)
        for split in ("train", "validation")
    }
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    for split, counts in manifest.splits.items():
        assert counts.documents == len(decoded[split]) > 0
        assert counts.bytes == sum(len(text.encode()) for text in decoded[split])
        rows = read_rows(tmp_path / "out", split)
        assert counts.rows == len(rows)
        assert counts.tokens == sum(lengths.sum() for _, lengths in rows)
        assert all(len(ids) == SEQ_LEN for ids, _ in rows)
        assert counts.documents_per_source == {"web": counts.documents}
    held_out = {
        tuple(row["input_ids"].tolist()) for row in validation_rows(tmp_path / "out", max_rows=999)
    }
    assert held_out == {tuple(ids.tolist()) for ids, _ in read_rows(tmp_path / "out", "validation")}


def test_every_document_ends_with_the_end_token_that_is_some_tokens_target(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    texts = example_texts(100) + ["long " * length for length in range(60, 140)]
    write_text_parquet(tmp_path / "in/a.parquet", texts)
    manifest = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out", validation_fraction=0)
    ends = 0
    for input_ids, doc_lens in read_rows(tmp_path / "out", "train"):
        starts = np.cumsum(doc_lens) - doc_lens
        real = input_ids[: doc_lens.sum()]
        ends += int((real == 0).sum())
        assert not (real[starts] == 0).any()
    assert ends == manifest.splits["train"].documents == len(texts)
    assert manifest.splits["train"].split_fraction > 0
    assert manifest.splits["validation"].rows == 0


def test_held_out_documents_do_not_depend_on_the_order_or_number_of_files(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    texts = [text for text in example_texts(900) if len(text.encode()) < SEQ_LEN]
    write_text_parquet(tmp_path / "one/a.parquet", texts)
    write_text_parquet(tmp_path / "two/a.parquet", reversed(texts[40:]))
    write_text_parquet(tmp_path / "two/b.parquet", texts[:40])
    held_out: list[list[str]] = []
    for name in ("one", "two"):
        out = tmp_path / f"out-{name}"
        prepare([tmp_path / name], tokenizer_dir, out, seed=len(held_out))
        held_out.append(sorted(decoded_documents(out, "validation", tokenizer_dir)))
    assert held_out[0] == held_out[1]
    assert 0.1 < len(held_out[0]) / len(texts) < 0.3


def test_files_do_not_depend_on_the_number_of_processes_but_on_the_seed(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(700))
    one = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "1")
    two = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "2", num_proc=2)
    other = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "3", seed=1)
    assert one == two and len(one.splits["train"].files) > 1
    assert other.splits["train"].files != one.splits["train"].files
    assert other.splits["train"].tokens == one.splits["train"].tokens


def test_rows_in_are_documents_out_plus_rejected_by_reason(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", ["good text", "", " \n", None, "more text"])
    record = {"instruction": "", "input": "Q?", "output": "A", "history": [["h", ""]]}
    lines = [
        json.dumps(record).encode(),
        b"",
        b'{"instruction": "cut',
        b'{"output": "\xff\xfe"}',
        json.dumps({"output": "no other field"}).encode(),
        json.dumps(record | {"output": "\ud800"}).encode(),
        json.dumps(record | {"input": "", "output": "", "history": []}).encode(),
    ]
    (tmp_path / "in/b.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    manifest = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out", validation_fraction=0)
    assert manifest.rejected == {
        "empty": 4,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "not_a_string": 1,
        "not_utf8": 1,
        "wrong_fields": 1,
    }
    assert manifest.splits["train"].documents_per_source == {"b": 1, "web": 2}
    assert 5 + len(lines) == manifest.splits["train"].documents + sum(manifest.rejected.values())


def test_conversation_is_rendered_turn_by_turn_without_empty_turns() -> None:
    record = {
        "history": [["Hello", "Hi"], ["", "Again"]],
        "instruction": "Translate",
        "input": "cat",
        "output": "猫",
    }
    assert conversation_text(record) == "Hello\nHi\nAgain\nTranslate\ncat\n猫"


def test_finished_folder_is_reused_and_other_options_are_refused_by_name(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(100))
    first = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out", num_proc=2) == first
    assert "already prepared" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ValueError, match=r"--output_dir: .*another --seed, --seq_len;"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out", seed=1, seq_len=32)
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(101, seed=1))
    with pytest.raises(ValueError, match=r"--output_dir: .*another --input;"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")


def test_interrupted_preparation_is_redone_and_foreign_files_are_kept(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(100))
    complete = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/train/000099.parquet").write_bytes(b"half a file")
    assert prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out") == complete
    assert not (tmp_path / "out/train/000099.parquet").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not delete")
    with pytest.raises(ValueError, match=r"--output_dir: .*thesis\.txt"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


def test_other_columns_are_refused_with_the_file_and_the_missing_ones(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    bad = tmp_path / "in/bad.parquet"
    bad.parent.mkdir()
    pq.write_table(pa.table({"content": ["x"], "score": [1.0]}), bad)
    with pytest.raises(ValueError, match=r"--input: .*bad\.parquet lacks .*text, source"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    pq.write_table(pa.table({"text": [1], "score": [1.0], "source": ["a"]}), bad)
    with pytest.raises(ValueError, match=r"column text of .*bad\.parquet is int64"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    bad.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a readable parquet"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    bad.unlink()
    (tmp_path / "in/bad.jsonl").write_text('{"question": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl lacks the fields instruction, input, hist"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parquet_without_rows_adds_nothing_and_a_damaged_one_is_named(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(100))
    alone = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "alone")
    write_text_parquet(tmp_path / "in/empty.parquet", [])
    both = prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "both")
    assert both.splits == alone.splits

    damaged = bytearray((tmp_path / "in/a.parquet").read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "in/damaged.parquet").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"--input: .*damaged\.parquet is damaged"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("seq_len", 2), ("validation_fraction", 1.0), ("row_group_rows", 0), ("num_proc", 0)],
)
def test_options_out_of_range_name_their_flag(
    tmp_path: Path, tokenizer_dir: Path, option: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"--{option}"):
        prepare([tmp_path], tokenizer_dir, tmp_path / "out", **{option: value})


def test_more_tokens_than_fit_in_memory_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_text_parquet(tmp_path / "in/a.parquet", example_texts(100))
    with pytest.raises(ValueError, match="--max_tokens_in_memory"):
        prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out", max_tokens_in_memory=10)


def test_tools_print_one_sentence_and_exit_with_2_on_bad_input(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    missing = tmp_path / "gone"
    result = run_tool(
        "prepare_pretrain",
        "--input",
        missing,
        "--tokenizer",
        tokenizer_dir,
        "--output_dir",
        missing,
    )
    assert (result.returncode, result.stderr) == (2, f"--input: {missing} does not exist\n")
    result = run_tool("train_tokenizer", "--input", missing, "--output_dir", missing)
    assert (result.returncode, result.stderr) == (2, f"--input: {missing} does not exist\n")


CONCURRENT_BUILD = """
import sys
from pathlib import Path
from mini_llm.data import quickstart
quickstart.MAX_BYTES = 400_000
quickstart.BASE_VOCAB_SIZE = 500
quickstart.build_quickstart_data(Path(sys.argv[1]))
"""


def test_a_run_on_data_of_its_own_builds_no_quickstart_data() -> None:
    own = {"own": {"path": "data/packed"}, "list": {"path": ["a.jsonl"]}, "wrong": 1}
    assert not quickstart.is_quickstart_data(own)
    assert quickstart.is_quickstart_data({"q": {"path": "output/quickstart/data/packed_sft"}})


def test_quickstart_conversations_are_packed_also_where_the_corpus_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for done in ("packed/manifest.json", f"tokenizer/{quickstart.DONE_NAME}"):
        (tmp_path / done).parent.mkdir()
        (tmp_path / done).touch()
    tools: list[str] = []
    monkeypatch.setattr(quickstart, "_run_stage", lambda tool, *_, **__: tools.append(tool.stem))
    quickstart.build_quickstart_conversations(tmp_path)
    assert tools == ["make_quickstart_corpus", "prepare_sft"]


def test_a_tool_of_the_quickstart_that_fails_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "the disk is full\n")
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^make_quickstart_corpus\.py failed: the disk is full$"):
        quickstart.build_quickstart_data(tmp_path)


@pytest.mark.slow
def test_ranks_that_build_the_quickstart_data_at_once_build_it_once(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT_BUILD, str(tmp_path / "data")],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sum("is done already" in output for output in outputs) <= 1
    built = "".join(line for o in outputs for line in o.splitlines() if "is done" not in line)
    assert built.count("make_quickstart_corpus (") == built.count("prepare_pretrain (") == 1
    manifest = load_manifest(tmp_path / "data/packed")
    assert manifest.seq_len == 256 and manifest.splits["validation"].rows > 0
    assert manifest.tokenizer.vocab_size == 504
