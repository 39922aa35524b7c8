"""Packed rows of conversations: their parquet files and manifest.

A row of this project's files: `input_ids` [seq_len] uint16 or uint32, `loss_mask` [seq_len] bool
(whether the token is supervised) and `doc_lens` int32, the lengths of its conversations. What
follows the last conversation is padding. No conversation is ever split.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..durable import complete_or_absent
from .manifest import FORMAT_VERSION, MANIFEST_NAME, SFT_FORMAT, FileEntry, TokenizerEntry
from .packing import pack_documents


@dataclass(frozen=True)
class SftSplit:
    """One split: counts of rows, real and supervised tokens and conversations, and its files."""

    rows: int
    tokens: int
    supervised_tokens: int
    conversations: int
    conversations_per_kind: dict[str, int]
    utilisation: float
    files: list[FileEntry]


@dataclass(frozen=True)
class SftManifest:
    """A prepared folder. `options` are those of the preparation; `fingerprint` covers it all.

    `input_lines` = conversations of the input that were written + sum(rejected.values()) +
    `not_sampled`. `mended` counts what was put right in conversations that were read. `sampling`
    has for single-turn, multi-turn and self-awareness what was asked for, there and taken, with the
    same for each type.
    """

    seq_len: int
    tokenizer: TokenizerEntry
    splits: dict[str, SftSplit]
    input_lines: int
    rejected: dict[str, int]
    not_sampled: int
    mended: dict[str, int]
    sampling: dict[str, Any]
    options: dict[str, Any]
    format: str = SFT_FORMAT
    fingerprint: str = field(default="")

    def computed_fingerprint(self) -> str:
        """Return the sha256 over every field but the fingerprint itself."""
        content = asdict(self)
        del content["fingerprint"]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def write_sft_manifest(folder: Path, manifest: SftManifest) -> SftManifest:
    """Write `folder`/manifest.json so that it is complete or absent; return it as written."""
    content = asdict(manifest) | {"fingerprint": manifest.computed_fingerprint()}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with complete_or_absent(folder / MANIFEST_NAME) as file:
        file.write(text.encode())
    return _manifest(content)


def load_sft_manifest(folder: str | Path) -> SftManifest:
    """Read the manifest of a prepared folder.

    Raises FileNotFoundError when it is missing, ValueError when it is of something else or was
    changed after it was written.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.parent.exists():
        raise FileNotFoundError(f"--data: {folder} does not exist; run data_tools/prepare_sft.py")
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: {folder} has no {MANIFEST_NAME}: its preparation did not finish or it holds "
            "something else; run data_tools/prepare_sft.py with this --output_dir"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--data: {path} is not valid JSON ({error}); prepare it again") from error
    if isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION:
        raise ValueError(
            f"--data: {folder} holds packed text for pretraining, not conversations; train on it "
            "with `./launch.sh pretrain`, or prepare conversations with data_tools/prepare_sft.py"
        )
    if not isinstance(content, dict) or content.get("format") != SFT_FORMAT:
        raise ValueError(
            f"--data: {path} is no manifest of conversations ({SFT_FORMAT}); prepare the folder "
            "with data_tools/prepare_sft.py"
        )
    try:
        manifest = _manifest(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"--data: {path} lacks or mistypes a field ({error}); prepare the folder again"
        ) from error
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise ValueError(
            f"--data: {path} was changed after it was written (its fingerprint does not fit); "
            "prepare the folder again with data_tools/prepare_sft.py"
        )
    return manifest


def _manifest(content: dict[str, Any]) -> SftManifest:
    splits = {
        name: SftSplit(**split | {"files": [FileEntry(**file) for file in split["files"]]})
        for name, split in content["splits"].items()
    }
    tokenizer = TokenizerEntry(**content["tokenizer"])
    return SftManifest(**content | {"splits": splits, "tokenizer": tokenizer})


# Writing


@dataclass(frozen=True)
class PackedConversations:
    """`input_ids` [rows, seq_len] padded with 0, `loss_mask` bool of that shape, lengths a row."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    doc_lens: list[np.ndarray]


def pack_conversations(
    tokens: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, seq_len: int
) -> PackedConversations:
    """Pack conversations, given as one array of tokens, into rows without splitting any.

    `tokens` and `supervised` (bool) [sum(lengths)]. Raises ValueError for a conversation that is
    longer than a row or has no supervised token after its first.
    """
    if len(lengths) and int(lengths.max()) > seq_len:
        raise ValueError(f"a conversation has {lengths.max()} tokens and a row {seq_len}")
    starts = np.cumsum(lengths) - lengths
    targets = supervised.copy()
    targets[starts] = False  # the first token of a conversation is nobody's target
    if len(lengths) and not np.logical_or.reduceat(targets, starts).all():
        raise ValueError("a conversation has no supervised token")
    # Packing places instead of tokens tells where each token and its mark go; 0 is padding.
    packed = pack_documents(np.arange(1, len(tokens) + 1), lengths, seq_len)
    return PackedConversations(
        input_ids=np.concatenate([np.zeros(1, tokens.dtype), tokens])[packed.input_ids],
        loss_mask=np.concatenate([np.zeros(1, bool), targets])[packed.input_ids],
        doc_lens=packed.doc_lens,
    )


def write_sft_rows(
    folder: Path, file: str, packed: PackedConversations, *, row_group_rows: int
) -> FileEntry:
    """Write all rows as `folder`/`file`, whole or absent, and return its manifest entry."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, seq_len = packed.input_ids.shape
    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.from_numpy_dtype(packed.input_ids.dtype), seq_len),
            "loss_mask": pa.list_(pa.bool_(), seq_len),
            "doc_lens": pa.list_(pa.int32()),
        }
    )
    table = pa.Table.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(packed.input_ids.reshape(-1)), seq_len),
            pa.FixedSizeListArray.from_arrays(pa.array(packed.loss_mask.reshape(-1)), seq_len),
            pa.array([row.tolist() for row in packed.doc_lens], pa.list_(pa.int32())),
        ],
        schema=schema,
    )
    with (
        complete_or_absent(path) as written,
        pq.ParquetWriter(written, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        writer.write_table(table, row_group_size=row_group_rows)
    groups = [min(row_group_rows, rows - start) for start in range(0, rows, row_group_rows)]
    with path.open("rb") as finished:
        sha256 = hashlib.file_digest(finished, "sha256").hexdigest()
    tokens = sum(int(row.sum()) for row in packed.doc_lens)
    return FileEntry(file, rows, tokens, groups, sha256, path.stat().st_size)
