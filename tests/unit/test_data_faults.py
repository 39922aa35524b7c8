"""Each way the input or the disk can fail: one sentence that names the file, and nothing lost."""

from __future__ import annotations

import codecs
import errno
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import prepare_pretrain
from mini_llm import durable
from mini_llm.data import jobs, raw_stream, text_files
from mini_llm.data.manifest import load_manifest
from mini_llm.data.text_files import (
    Document,
    ParquetReader,
    Piece,
    Rejected,
    read_documents,
    read_piece,
    text_pieces,
)
from tests.unit.prepare_fixtures import (
    all_decoded,
    conversation,
    example_texts,
    files_of,
    make_tokenizer,
    prepare,
    write_jsonl,
    write_shard,
    write_shards,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_pretrain, "UNIT_DOCUMENTS", 100)


# Folders


def test_folder_that_is_a_link_is_read_and_one_that_leads_back_is_no_loop(
    tmp_path: Path, tokenizer: Path
) -> None:
    """As data that lies on several disks is put together."""
    texts = example_texts(60)
    write_shard(tmp_path / "disk/b.parquet", texts[30:])
    write_shard(tmp_path / "in/a.parquet", texts[:30])
    (tmp_path / "in/more").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "in")
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert all_decoded(tmp_path / "out", tokenizer) == sorted(texts)
    found = raw_stream.raw_files_below(tmp_path / "in")
    assert found == [tmp_path / "in/a.parquet", tmp_path / "in/more/b.parquet"]


def test_folder_that_cannot_be_read_is_named_instead_of_left_out(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "in/a.parquet", example_texts(60))
    locked = tmp_path / "in/locked"
    write_shard(locked / "b.parquet", example_texts(60))
    scandir = os.scandir

    def refusing(place: Any) -> Any:  # as it is for everyone but root
        if os.fspath(place) == str(locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(locked))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match="in/locked cannot be read: Permission denied; allow it"):
        prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Parquet files


def cut_in_half(path: Path) -> None:
    write_shard(path, example_texts(60, seed=9))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    write_shard(path, example_texts(60, seed=9), write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[content.index(b"token")] ^= 1
    path.write_bytes(content)


def flip_compressed_bits(path: Path) -> None:
    write_shard(path, example_texts(60, seed=9), compression="zstd")
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(byte ^ 255 for byte in content[40:60])
    path.write_bytes(content)


def without_a_column(path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "score": [0.5]}), path)


def with_another_type(path: Path) -> None:
    pq.write_table(pa.table({"text": [b"a"], "score": [0.5], "source": ["web"]}), path)


def with_scores_as_text(path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "score": ["high"], "source": ["web"]}), path)


BAD_FILES: list[tuple[Callable[[Path], None], str]] = [
    (cut_in_half, r"bad\.parquet is not a readable parquet file, cut off perhaps \(.+\)"),
    (no_bytes, r"bad\.parquet is empty \(0 bytes\)"),
    (flip_a_bit, r"bad\.parquet is damaged \(.*CRC.*\)"),
    (flip_compressed_bits, r"bad\.parquet is damaged \(.+\)"),
    (without_a_column, r"bad\.parquet lacks the columns source; it has text, score, and .*needed"),
    (with_another_type, r"column text of .*bad\.parquet is binary, not string"),
    (with_scores_as_text, r"column score of .*bad\.parquet is string, not a number"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.usefixtures("small_units")
def test_bad_parquet_is_named_and_left_out_only_on_request(
    tmp_path: Path, tokenizer: Path, spoil: Callable[[Path], None], message: str
) -> None:
    texts = write_shards(tmp_path / "in", 2)
    spoil(tmp_path / "in/bad.parquet")
    advice = r"; get it again or leave it out, or give --skip_bad_files$"
    with pytest.raises(ValueError, match=rf"^--input: .*{message}{advice}") as refused:
        prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out/manifest.json").exists()

    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--skip_bad_files")
    assert [file["name"] for file in manifest.skipped_files] == ["bad.parquet"]
    assert str(tmp_path) not in manifest.skipped_files[0]["reason"]
    assert all_decoded(tmp_path / "out", tokenizer) == sorted(texts)
    assert manifest.input_rows == len(texts) and manifest.rejected == {}


@pytest.mark.usefixtures("small_units")
def test_file_that_is_bad_in_one_piece_is_left_out_as_a_whole(
    tmp_path: Path, tokenizer: Path
) -> None:
    texts = write_shards(tmp_path / "in", 2)
    bad = tmp_path / "in/bad.parquet"
    write_shard(bad, example_texts(900, seed=9), row_group_size=100, compression="zstd")
    content = bytearray(bad.read_bytes())
    group = pq.read_metadata(bad).row_group(7).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = bytes(40)
    bad.write_bytes(content)
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--skip_bad_files")
    assert all_decoded(tmp_path / "out", tokenizer) == sorted(texts)
    assert manifest.input_rows == len(texts)


def test_bad_tail_of_a_parquet_file_shows_although_its_footer_is_whole(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", example_texts(50))
    (piece,) = text_pieces(tmp_path / "a.parquet", max_documents=100, max_bytes=10**9)
    longer = text_files.Piece(piece.file, 0, 60, 60, 0)
    with pytest.raises(ValueError, match="it ends at row 50, its footer says otherwise"):
        list(read_piece(longer))


def test_parquet_without_rows_is_said_and_adds_nothing(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 1)
    write_shard(tmp_path / "in/none.parquet", [])
    manifest = prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert "none.parquet: has no rows\n" in capsys.readouterr().out
    assert manifest.input_rows == 60


def test_more_columns_are_named_once_and_not_used(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    nested = [{"a": 1, "b": "x"}]
    columns = {"meta": nested, "text": ["字"], "score": [1], "source": ["web"], "url": ["u"]}
    pq.write_table(pa.table(columns), tmp_path / "in/a.parquet")
    prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--validation_fraction", 0)
    assert capsys.readouterr().out.count("a.parquet: the columns meta, url are not used\n") == 1
    assert all_decoded(tmp_path / "out", tokenizer) == ["字"]


def test_row_of_a_parquet_file_that_is_not_utf8_costs_that_row(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", "也好".encode()], pa.binary()).view(pa.string())
    columns = {"text": text, "score": [0.5] * 3, "source": ["web"] * 3}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == [
        Document("good", "web", "row 0"),
        Rejected("not_utf8", "row 1", "\\xff\\xfe"),
        Document("也好", "web", "row 2"),
    ]


def test_pieces_of_a_parquet_file_are_its_rows_once_each(tmp_path: Path) -> None:
    texts = example_texts(1000)
    file = write_shard(tmp_path / "a.parquet", texts, row_group_size=300)
    pieces = text_pieces(file, max_documents=130, max_bytes=10**9)
    assert len(pieces) == 8 and max(piece.documents for piece in pieces) <= 130
    found = [document for piece in pieces for document in read_piece(piece)]
    assert found == [Document(text, "web", f"row {row}") for row, text in enumerate(texts)]
    assert len(text_pieces(file, max_documents=10**9, max_bytes=5000)) > 3


def test_one_reader_gives_the_rows_of_pieces_in_any_order(tmp_path: Path) -> None:
    texts = example_texts(1000)
    files = [write_shard(tmp_path / f"{n}.parquet", texts, row_group_size=n) for n in (300, 1000)]
    draw = random.Random(0)
    parquet = ParquetReader()
    for _ in range(200):
        start = draw.randrange(1000)
        piece = Piece(draw.choice(files), start, draw.randint(start + 1, 1000), 0, 0)
        rows = read_piece(piece, parquet)
        if draw.random() < 0.2:  # left before its end
            next(rows)
            continue
        found = [document.text for document in rows if isinstance(document, Document)]
        assert found == texts[piece.start : piece.stop]


# Jsonl lines


def test_byte_order_mark_of_a_file_costs_no_line(tmp_path: Path, tokenizer: Path) -> None:
    """As editors on Windows write it."""
    line = json.dumps(conversation("好答案"), ensure_ascii=False).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(codecs.BOM_UTF8 + line + b"\n" + line + b"\n")
    out = tmp_path / "out"
    manifest = prepare(tmp_path / "in", tokenizer, out, "--validation_fraction", 0)
    assert (manifest.splits["train"].documents, manifest.rejected) == (2, {})


def test_bad_lines_are_quarantined_with_reason_place_and_content(
    tmp_path: Path, tokenizer: Path
) -> None:
    good = json.dumps(conversation("好答案"), ensure_ascii=False).encode()
    deep = b'{"instruction": ' + b"[" * 100_000
    lines = [
        (good, None),
        (b'{"instruction": "a", output', "invalid_json"),
        ('{"output": "编码"}'.encode("gbk"), "not_utf8"),
        (b'{"output": "only"}', "wrong_fields"),
        (b"[1, 2]", "wrong_fields"),
        (json.dumps(conversation("x", history=["not a list"])).encode(), "wrong_fields"),
        (json.dumps(conversation("x", instruction=5)).encode(), "wrong_fields"),
        (b'{"type": ' + b"9" * 5000 + b"}", "invalid_json"),
        (deep, "invalid_json"),
        (b"  ", "empty"),
        (json.dumps(conversation("x", data_source="\ud800")).encode(), "invalid_unicode"),
        (good, None),
        (good[:20], "truncated"),
    ]
    path = tmp_path / "in/a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join(line for line, _ in lines))
    manifest = prepare(path, tokenizer, tmp_path / "out", "--validation_fraction", 0)
    expected = [(line, reason) for line, reason in lines if reason]
    quarantine = (tmp_path / "out/quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    content = path.read_bytes()
    assert len(quarantine) == len(expected) == sum(manifest.rejected.values())
    for found, (line, reason) in zip(map(json.loads, quarantine), expected, strict=True):
        assert (found["file"], found["reason"]) == ("a.jsonl", reason)
        place = int(found["place"].removeprefix("byte "))
        assert content[place:].startswith(line)
        if reason == "invalid_unicode":  # its text is kept, not its line
            continue
        assert found["content"] == line[:1000].decode(errors="backslashreplace") + (
            "\n" if len(line) < 1000 and reason != "truncated" else ""
        )
    assert manifest.input_rows == len(lines)
    assert all_decoded(tmp_path / "out", tokenizer) == ["好答案"] * 2


def test_line_that_is_too_long_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 300)
    monkeypatch.setattr(text_files, "READ_BUFFER_BYTES", 64)
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(t) for t in ("a", "b" * 900, "c")])
    found = list(read_documents(path))
    assert [getattr(d, "text", None) or getattr(d, "reason", None) for d in found] == [
        "a",
        "too_long",
        "c",
    ]


@pytest.mark.parametrize("max_bytes", [1, 7, 100, 1000])
def test_pieces_of_a_jsonl_file_are_its_lines_once_each(tmp_path: Path, max_bytes: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [conversation(text) for text in example_texts(25)])
    pieces = text_pieces(path, max_documents=10**9, max_bytes=max_bytes)
    found = [document for piece in pieces for document in read_piece(piece)]
    assert found == list(read_documents(path))
    assert [document.text for document in found] == example_texts(25)  # type: ignore[union-attr]


def test_jsonl_of_other_fields_or_none_is_named(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl lacks the fields .*; it has question; get it"):
        prepare(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    (tmp_path / "a.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"a\.jsonl has no line that is a JSON object; get it"):
        prepare(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")


# While it runs


@pytest.mark.parametrize("how", ["replaced", "appended to", "removed"])
@pytest.mark.usefixtures("small_units")
def test_file_that_changes_during_the_run_is_named_and_a_restart_uses_the_new_one(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    texts = write_shards(tmp_path / "in", 4)
    target = tmp_path / "in/000003.parquet"
    new = write_shard(tmp_path / "new.parquet", example_texts(60, seed=7))
    status = target.stat()
    plan = prepare_pretrain.plan_units

    def plan_then_change(*arguments: Any) -> Any:
        units = plan(*arguments)
        if how == "replaced":  # by a file of the same age
            os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
            new.replace(target)
        elif how == "removed":
            target.unlink()
        else:
            with target.open("ab") as file:
                file.write(b"\0")
        return units

    with monkeypatch.context() as patch:
        patch.setattr(prepare_pretrain, "plan_units", plan_then_change)
        # Asking to skip bad files does not cover it: the file is not bad.
        with pytest.raises(ValueError, match=r"--input: .*000003\.parquet was changed or replaced"):
            prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--skip_bad_files")
    assert not (tmp_path / "out/manifest.json").exists()
    if how == "replaced":
        prepare(tmp_path / "in", tokenizer, tmp_path / "out")
        expected = texts[:180] + example_texts(60, seed=7)
        assert all_decoded(tmp_path / "out", tokenizer) == sorted(expected)


@pytest.mark.parametrize("writes_before", [0, 3, 8, 10, 14])
@pytest.mark.usefixtures("small_units")
def test_full_disk_is_one_sentence_leaves_no_half_file_and_a_restart_goes_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, writes_before: int
) -> None:
    write_shards(tmp_path / "in", 8)
    prepare(tmp_path / "in", tokenizer, tmp_path / "whole")
    sync, left = os.fsync, [writes_before]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(OSError, match=r"--output_dir: no space is left.*run the same") as error:
            prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    units = len(list((tmp_path / "out/unfinished").glob("unit-*.json")))
    assert units == min(writes_before // 2, 4)
    assert str(error.value).endswith(f": {units} finished units are kept")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    for file in (tmp_path / "out").rglob("*.parquet"):
        relative = file.relative_to(tmp_path / "out")
        assert file.read_bytes() == (tmp_path / "whole" / relative).read_bytes()
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), durable.complete_or_absent(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with durable.complete_or_absent(tmp_path / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert files_of(tmp_path) == {"a": b"whole"}


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    "raced", [None, OSError("handle is closed"), ValueError("bad value(s) in fds_to_keep")]
)
def test_process_that_is_killed_is_one_sentence(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, raced: Exception | None
) -> None:
    write_shards(tmp_path / "in", 4)

    calls = 0

    def start_and_kill(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if raced is not None and calls == 2:
            # What the start of a process raises when the pool's thread, which has seen the killed
            # one, closes the pipe to be handed on.
            while not self._broken:
                time.sleep(0.01)
            raise raced
        future = submit(self, *arguments, **options)
        for process in list(self._processes.values()):
            process.kill()
        return future

    pool = jobs.ProcessPoolExecutor
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", start_and_kill)
    with pytest.raises(OSError, match="--num_proc: a worker process was killed"):
        prepare(tmp_path / "in", tokenizer, tmp_path / "out", "--num_proc", 2)
    monkeypatch.undo()
    prepare(tmp_path / "in", tokenizer, tmp_path / "out")
    assert load_manifest(tmp_path / "out").input_rows == 240
