"""`manifest.json`: what a folder of packed rows holds.

It is written last, so that a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..durable import complete_or_absent

if TYPE_CHECKING:
    from .sft_files import SftManifest

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
SFT_FORMAT = "mini-llm-sft-1"
TRAIN = "train"
VALIDATION = "validation"


@dataclass(frozen=True)
class FileEntry:
    """One parquet file; `file` is relative to the folder, `row_groups` the rows of each group."""

    file: str
    rows: int
    tokens: int
    row_groups: list[int]
    sha256: str
    bytes_on_disk: int


@dataclass(frozen=True)
class Split:
    """One split: counts of rows, real tokens, documents and UTF-8 bytes of text, and its files."""

    rows: int
    tokens: int
    documents: int
    bytes: int
    documents_per_source: dict[str, int]
    utilisation: float
    split_fraction: float
    files: list[FileEntry]


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer the rows were made with."""

    fingerprint: str
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """A prepared folder. `options` are those of the preparation; `fingerprint` covers it all.

    `input_rows` is the number of rows and lines read: documents of all splits plus `rejected`.
    `skipped_files` are input files left out as a whole, each with `name` and `reason`.
    """

    seq_len: int
    tokenizer: TokenizerEntry
    splits: dict[str, Split]
    rejected: dict[str, int]
    options: dict[str, Any]
    format_version: int = FORMAT_VERSION
    fingerprint: str = field(default="")
    input_rows: int = 0
    skipped_files: list[dict[str, str]] = field(default_factory=list)

    def computed_fingerprint(self) -> str:
        """Return the sha256 over every field but the fingerprint itself."""
        content = asdict(self)
        del content["fingerprint"]
        for name in ("input_rows", "skipped_files"):  # manifests from before they were counted
            if not content[name]:
                del content[name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `folder`/manifest.json so that it is complete or absent; return it as written."""
    content = asdict(manifest) | {"fingerprint": manifest.computed_fingerprint()}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with complete_or_absent(folder / MANIFEST_NAME) as file:
        file.write(text.encode())
    return _from_dict(content)


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises FileNotFoundError when the folder or its manifest is missing, ValueError when it is of
    another format version or was changed after it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data: {folder} does not exist; run `./launch.sh quickstart` or "
            "data_tools/prepare_pretrain.py"
        )
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: {folder} has no {MANIFEST_NAME}: its preparation did not finish or it holds "
            "something else; run data_tools/prepare_pretrain.py with this --output_dir"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--data: {path} is not valid JSON ({error}); prepare it again") from error
    if isinstance(content, dict) and content.get("format") == SFT_FORMAT:
        raise ValueError(
            f"--data: {folder} holds packed conversations, not text for pretraining; train on it "
            "with `./launch.sh sft`, or prepare text with data_tools/prepare_pretrain.py"
        )
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"--data: {path} has format_version {version}, this code reads {FORMAT_VERSION}; "
            "prepare the folder again with data_tools/prepare_pretrain.py"
        )
    try:
        manifest = _from_dict(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--data: {path} lacks or mistypes a field ({error}); prepare the folder again"
        ) from error
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise ValueError(
            f"--data: {path} was changed after it was written (its fingerprint does not fit); "
            "prepare the folder again with data_tools/prepare_pretrain.py"
        )
    return manifest


def check_manifest(
    manifest: Manifest | SftManifest, *, name: str, tokenizer_fingerprint: str, seq_len: int
) -> None:
    """Raise ValueError, naming the flag, when the rows of data source `name` do not fit the run."""
    check_seq_len(manifest, name=name, seq_len=seq_len)
    if manifest.tokenizer.fingerprint != tokenizer_fingerprint:
        raise ValueError(
            f"--tokenizer: the data '{name}' was packed with another tokenizer (fingerprint "
            f"{manifest.tokenizer.fingerprint[:12]}, this one is {tokenizer_fingerprint[:12]}); "
            "give that tokenizer or prepare the data again with this one"
        )


def check_seq_len(manifest: Manifest | SftManifest, *, name: str, seq_len: int) -> None:
    """Raise ValueError when the rows of data source `name` are not `seq_len` tokens long."""
    if manifest.seq_len != seq_len:
        raise ValueError(
            f"--seq_len {seq_len}: the rows of the data '{name}' hold {manifest.seq_len} tokens; "
            f"use --seq_len {manifest.seq_len} or prepare the data again"
        )


def _from_dict(content: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(**split | {"files": [FileEntry(**file) for file in split["files"]]})
        for name, split in content["splits"].items()
    }
    tokenizer = TokenizerEntry(**content["tokenizer"])
    return Manifest(**content | {"splits": splits, "tokenizer": tokenizer})
