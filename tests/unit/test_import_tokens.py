"""Ready-made .bin tokens: the same rows as from the text, and refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import prepare_pretrain
from mini_llm.data import token_files
from mini_llm.data.manifest import Manifest
from mini_llm.data.text_files import Document, Rejected
from mini_llm.data.tokenizer import text_encoder, train_tokenizer
from tests.unit.prepare_fixtures import (
    all_decoded,
    example_texts,
    files_of,
    make_tokenizer,
    prepare,
    write_shard,
)

END = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_tokens(path: Path, texts: list[str], tokenizer: Path) -> Path:
    """Write a file as other toolkits do: ids, end id, ids, end id, …"""
    encoder = text_encoder(tokenizer)
    ids = [np.array([*encoder.encode(text).ids, END], "<u2") for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(document.tobytes() for document in ids))
    return path


def bring(source: Path, tokenizer: Path, output: Path, *flags: object) -> Manifest:
    return prepare(source, tokenizer, output, "--input_format", "tokens", *flags)


def test_tokens_give_the_rows_and_the_held_out_split_of_their_text(
    tmp_path: Path, tokenizer: Path
) -> None:
    texts = example_texts(300)
    write_shard(tmp_path / "text/a.parquet", texts)
    write_tokens(tmp_path / "tokens/a.bin", texts[:100], tokenizer)
    write_tokens(tmp_path / "tokens/b.bin", texts[100:], tokenizer)
    from_text = prepare(tmp_path / "text", tokenizer, tmp_path / "from_text")
    imported = bring(tmp_path / "tokens", tokenizer, tmp_path / "imported")
    for name in ("train", "validation"):
        assert imported.splits[name].files == from_text.splits[name].files
        assert imported.splits[name].bytes == from_text.splits[name].bytes
    sources = [split.documents_per_source for split in imported.splits.values()]
    assert {source for counts in sources for source in counts} == {"a", "b"}
    table = pq.read_table(tmp_path / "imported/train")
    assert table.equals(pq.read_table(tmp_path / "from_text/train"))
    assert all_decoded(tmp_path / "imported", tokenizer) == sorted(texts)


def test_import_does_not_depend_on_processes_and_can_deduplicate(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_pretrain, "UNIT_BYTES", 4000)
    texts = example_texts(300)
    write_tokens(tmp_path / "in/a.bin", texts + texts[:40], tokenizer)
    one = bring(tmp_path / "in", tokenizer, tmp_path / "1", "--deduplicate")
    bring(tmp_path / "in", tokenizer, tmp_path / "2", "--deduplicate", "--num_proc", 2)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert one.rejected == {"duplicate": 40} and one.input_rows == 340
    assert all_decoded(tmp_path / "1", tokenizer) == sorted(texts)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    max_bytes=st.integers(2, 90),
    block=st.integers(1, 30),
    ended=st.booleans(),
)
def test_pieces_hold_every_document_once_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Path,
    lengths: list[int],
    max_bytes: int,
    block: int,
    ended: bool,
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.bin"
    documents = [np.arange(length) % 26 + 40 for length in lengths]
    flat = np.concatenate([[*document, END] for document in documents]).astype("<u2")
    path.write_bytes((flat if ended else flat[:-1]).tobytes())
    reader = token_files.TokenReader(tokenizer, 364, END)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "READ_TOKENS", block)
        pieces = token_files.token_pieces(path, max_documents=1, max_bytes=max_bytes)
        found = [document for piece in pieces for document in reader.read_piece(piece)]
    complete = documents if ended else documents[:-1]
    if not ended and lengths[-1]:
        last = found.pop()
        assert isinstance(last, Rejected) and last.reason == "unfinished"
    assert len(found) == len(complete)
    for document, ids in zip(found, complete, strict=True):
        if isinstance(document, Document):
            assert document.token_ids is not None and document.token_ids.tolist() == ids.tolist()
        else:
            assert document.reason == "empty" and not len(ids)


def test_unfinished_end_and_empty_documents_are_counted_and_quarantined(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = write_tokens(tmp_path / "in/a.bin", ["", *example_texts(30)], tokenizer)
    path.write_bytes(path.read_bytes() + np.array([70, 71], "<u2").tobytes())
    manifest = bring(tmp_path / "in", tokenizer, tmp_path / "out")
    assert manifest.rejected == {"empty": 1, "unfinished": 1}
    assert manifest.input_rows == 32
    assert (tmp_path / "out/quarantine.jsonl").read_text().count("\n") == 2


def test_odd_number_of_bytes_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = write_tokens(tmp_path / "in/a.bin", example_texts(30), tokenizer)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"--input: .*a\.bin has an odd number of bytes"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--input: .*a\.bin is empty \(0 bytes\)"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = write_tokens(tmp_path / "in/a.bin", example_texts(30), tokenizer)
    path.write_bytes(path.read_bytes() + np.array([364, END], "<u2").tobytes())
    with pytest.raises(ValueError, match=r"a\.bin holds the id 364, but .* has only 364 ids; it"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")


def test_no_or_too_few_ends_of_documents_are_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokens(tmp_path / "in/a.bin", ["数据 " * 300], tokenizer)
    monkeypatch.setattr(token_files, "MOST_TOKENS_PER_DOCUMENT", 100)
    with pytest.raises(ValueError, match=r"the end-of-document id 0 1 times in [\d,]+ tokens"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"the end-of-document id 0 0 times in .* too rarely"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")


def test_tokens_of_another_tokenizer_of_the_same_size_are_refused(
    tmp_path: Path, tokenizer: Path
) -> None:
    other = tmp_path / "other"
    texts = [f"{i} " + "语言 训练 loss stream 词表 " * 3 for i in range(100)]
    train_tokenizer([*texts, *example_texts(100, seed=3)], 300).save_pretrained(str(other))
    write_tokens(tmp_path / "in/a.bin", example_texts(60), other)
    with pytest.raises(ValueError, match=r"does not decode to text that gives its ids again: \d+"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out")
    bring(tmp_path / "in", other, tmp_path / "out")


def test_bad_token_file_is_left_out_on_request(tmp_path: Path, tokenizer: Path) -> None:
    write_tokens(tmp_path / "in/a.bin", example_texts(30), tokenizer)
    (tmp_path / "in/b.bin").write_bytes(b"\x01\x00\x02")
    manifest = bring(tmp_path / "in", tokenizer, tmp_path / "out", "--skip_bad_files")
    assert [file["name"] for file in manifest.skipped_files] == ["b.bin"]
    assert manifest.input_rows == 30


def test_cleaning_tokens_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    write_tokens(tmp_path / "in/a.bin", example_texts(30), tokenizer)
    with pytest.raises(ValueError, match="--clean works on text"):
        bring(tmp_path / "in", tokenizer, tmp_path / "out", "--clean")
