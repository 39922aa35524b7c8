"""The manifest: round trip, and one clear sentence for each way a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_llm.data.manifest import (
    MANIFEST_NAME,
    check_manifest,
    load_manifest,
    write_manifest,
)
from tests.unit.data_fixtures import SEQ_LEN, write_packed_folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_manifest_reads_back_as_written_and_describes_the_files(tmp_path: Path) -> None:
    written = write_packed_folder(tmp_path, [7, 4], row_group_rows=3, validation_rows=2)
    manifest = load_manifest(tmp_path)
    assert manifest == written
    assert manifest.fingerprint == manifest.computed_fingerprint() != ""
    train = manifest.splits["train"]
    assert [file.row_groups for file in train.files] == [[3, 3, 1], [3, 1]]
    assert sum(file.rows for file in train.files) == train.rows == 11
    for file in train.files:
        assert (tmp_path / file.file).stat().st_size == file.bytes_on_disk
        assert file.tokens == 5 * file.rows
    assert not list(tmp_path.glob("*.tmp"))


def test_fingerprint_changes_with_any_field(tmp_path: Path) -> None:
    manifest = write_packed_folder(tmp_path, [4])
    changed = [
        replace(manifest, seq_len=9),
        replace(manifest, rejected={"empty": 1}),
        replace(manifest, options={"seed": 1}),
        replace(manifest, tokenizer=replace(manifest.tokenizer, vocab_size=5)),
        replace(manifest, splits={"train": manifest.splits["train"]}),
    ]
    fingerprints = {m.computed_fingerprint() for m in [manifest, *changed]}
    assert len(fingerprints) == 6
    assert write_manifest(tmp_path, manifest).fingerprint == manifest.fingerprint


def test_missing_folder_and_missing_manifest_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"--data: .*gone does not exist; run `./launch.sh quickstart` or data_tools/prepare",
    ):
        load_manifest(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"--data: .*has no manifest\.json"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format_version 99, this code reads 1"),
        (lambda m: m.pop("format_version"), "format_version None"),
        (lambda m: m.pop("seq_len"), "lacks or mistypes"),
        (lambda m: m["splits"]["train"].update(extra=1), "lacks or mistypes"),
        (lambda m: m["splits"]["train"].update(rows=5), "changed after it was written"),
    ],
)
def test_wrong_manifests_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write_packed_folder(tmp_path, [4])
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_manifest(tmp_path)


def test_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"seq_len":')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_manifest(tmp_path)


def test_rows_of_another_tokenizer_or_length_name_the_flag(tmp_path: Path) -> None:
    manifest = write_packed_folder(tmp_path, [4])
    own = manifest.tokenizer.fingerprint
    check_manifest(manifest, name="web", tokenizer_fingerprint=own, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match=r"--tokenizer: the data 'web'"):
        check_manifest(manifest, name="web", tokenizer_fingerprint="b" * 64, seq_len=SEQ_LEN)
    with pytest.raises(ValueError, match=r"--seq_len 16: the rows of the data 'web' hold 8"):
        check_manifest(manifest, name="web", tokenizer_fingerprint=own, seq_len=16)
