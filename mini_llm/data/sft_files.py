"""Packed rows of conversations: their parquet files and manifest, and reading ready-made ones.

A row of this project's files: `input_ids` [seq_len] uint16 or uint32, `loss_mask` [seq_len] bool
(whether the token is supervised) and `doc_lens` int32, the lengths of its conversations. What
follows the last conversation is padding. No conversation is ever split.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .collate import IGNORE_INDEX
from .conversations import ChatEncoder
from .durable import complete_or_absent
from .manifest import MANIFEST_NAME, TRAIN, VALIDATION, FileEntry, TokenizerEntry
from .packing import pack_documents
from .tokenizer import text_encoder

SFT_FORMAT = "mini-llm-sft-1"
READY_MADE_COLUMNS = ("token_ids", "labels", "position_ids", "attention_mask", "length")
SAMPLED_CONVERSATIONS = 64
SMALLEST_SHARE_THAT_ROUND_TRIPS = 0.5


class SftRow(TypedDict):
    """A row: `input_ids` [seq_len], `labels` int32 [seq_len] with -100, `doc_lens` int32."""

    input_ids: np.ndarray
    labels: np.ndarray
    doc_lens: np.ndarray


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
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: {folder} has no {MANIFEST_NAME}: its preparation did not finish or it holds "
            "something else; run data_tools/prepare_sft.py with this --output_dir"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--data: {path} is not valid JSON ({error}); prepare it again") from error
    if not isinstance(content, dict) or content.get("format") != SFT_FORMAT:
        raise ValueError(
            f"--data: {path} is no manifest of conversations ({SFT_FORMAT}), perhaps one for "
            "pretraining; prepare the folder with data_tools/prepare_sft.py"
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


# Reading


class SftRows(Sequence[SftRow]):
    """The rows of a folder or file by their number; made by `open_sft_rows`.

    Holds one row group at a time. Raises ValueError, naming file and row, for a row that does not
    hold together.
    """

    def __init__(self, files: list[Path], seq_len: int, vocab_size: int, is_own: bool) -> None:
        self.seq_len = seq_len
        self._vocab_size = vocab_size
        self._is_own = is_own
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, row in the file
        self._starts = [0]
        for file in files:
            metadata = pq.read_metadata(file)
            row_in_file = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group, row_in_file))
                row_in_file += metadata.row_group(group).num_rows
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._loaded = -1
        self._table: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        unit = bisect_right(self._starts, index) - 1
        file, group, row_in_file = self._groups[unit]
        if unit != self._loaded:
            with pq.ParquetFile(file) as parquet:
                self._table = _arrays_of_rows(parquet.read_row_group(group))
            self._loaded = unit
        row = index - self._starts[unit]
        place = f"{file} row {row_in_file + row}"
        read = self._own_row if self._is_own else self._ready_made_row
        return read(self._table[row], place)

    def __iter__(self) -> Iterator[SftRow]:
        for index in range(len(self)):
            yield self[index]

    def _own_row(self, row: dict[str, Any], place: str) -> SftRow:
        input_ids, doc_lens = row["input_ids"], row["doc_lens"].astype(np.int32)
        labels = np.where(row["loss_mask"], input_ids.astype(np.int32), IGNORE_INDEX)
        self._check(input_ids, labels, doc_lens, place)
        return SftRow(input_ids=input_ids, labels=labels, doc_lens=doc_lens)

    def _ready_made_row(self, row: dict[str, Any], place: str) -> SftRow:
        length = int(row["length"])
        ids, labels, mask = row["token_ids"], row["labels"], row["attention_mask"]
        if not len(ids) == len(labels) == len(mask) == len(row["position_ids"]):
            raise _bad(place, "token_ids, labels, position_ids, attention_mask differ in size")
        if not 0 < length <= len(ids) or mask[:length].min() < 1 or mask[length:].any():
            raise _bad(place, f"length is {length}, attention_mask says {int((mask != 0).sum())}")
        if length > self.seq_len:
            raise _bad(
                place, f"it has {length} tokens; use --seq_len {length} or more, or leave it out"
            )
        doc_lens = np.array([length], np.int32)
        if "sample_lengths" in row:
            doc_lens = row["sample_lengths"].astype(np.int32)
            if int(row["num_samples"]) != len(doc_lens) or int(doc_lens.sum()) != length:
                raise _bad(
                    place,
                    f"sample_lengths has {len(doc_lens)} entries, {doc_lens.sum()} tokens, "
                    f"num_samples is {int(row['num_samples'])} and length {length}",
                )
        if (doc_lens < 1).any():
            raise _bad(place, "sample_lengths has an entry below 1")
        starts = np.repeat(np.cumsum(doc_lens) - doc_lens, doc_lens)
        if not np.array_equal(row["position_ids"][:length], np.arange(length) - starts):
            raise _bad(place, "position_ids do not count from 0 in each conversation")
        input_ids = np.zeros(self.seq_len, np.uint16 if self._vocab_size <= 2**16 else np.uint32)
        if ids[:length].min() < 0 or ids[:length].max() >= self._vocab_size:
            raise _bad(
                place,
                f"it holds an id outside 0..{self._vocab_size - 1}; give the --tokenizer that the "
                "data was made with",
            )
        input_ids[:length] = ids[:length]
        padded = np.full(self.seq_len, IGNORE_INDEX, np.int32)
        padded[:length] = labels[:length]
        padded[np.unique(starts)] = IGNORE_INDEX  # nobody's target
        self._check(input_ids, padded, doc_lens, place)
        return SftRow(input_ids=input_ids, labels=padded, doc_lens=doc_lens)

    def _check(
        self, input_ids: np.ndarray, labels: np.ndarray, doc_lens: np.ndarray, place: str
    ) -> None:
        if len(input_ids) != self.seq_len:
            raise _bad(place, f"it has {len(input_ids)} places and --seq_len is {self.seq_len}")
        tokens = int(doc_lens.sum())
        if (doc_lens < 1).any() or tokens > self.seq_len:
            raise _bad(place, f"doc_lens sums to {tokens} and the row has {self.seq_len} places")
        supervised = labels != IGNORE_INDEX
        if (supervised & (labels != input_ids)).any():
            raise _bad(place, "labels are not -100 or the token at their place; are they moved?")
        if supervised[tokens:].any():
            raise _bad(place, "padding is supervised")
        if not supervised.any():
            raise _bad(place, "no token is supervised")


def open_sft_rows(
    path: str | Path, seq_len: int, tokenizer_folder: str | Path, split: str = TRAIN
) -> SftRows:
    """Open the rows of a folder that data_tools/prepare_sft.py wrote, or ready-made SFT parquet.

    Ready-made: a file or a folder of files with the columns token_ids, labels, position_ids,
    attention_mask, length[, type] and, where rows hold several conversations, num_samples and
    sample_lengths. Each of its rows becomes one row of `seq_len`, padded; it has no held-out split.
    Raises FileNotFoundError or ValueError, naming the flag, for what does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"--data: {path} does not exist; run data_tools/prepare_sft.py")
    if path.is_dir() and (path / MANIFEST_NAME).exists():
        return _open_own(path, seq_len, tokenizer_folder, split)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"--data: {path} holds neither {MANIFEST_NAME} nor a .parquet file; run "
            "data_tools/prepare_sft.py"
        )
    encoder = ChatEncoder(tokenizer_folder)
    if split == VALIDATION:
        files = []
    for file in files:
        _check_columns(file)
    rows = SftRows(files, seq_len, encoder.vocab_size, is_own=False)
    if split == TRAIN:
        if not len(rows):
            raise ValueError(f"--data: {path} has no rows; give data with conversations")
        _check_sample(rows, encoder, path, tokenizer_folder)
    return rows


def _open_own(path: Path, seq_len: int, tokenizer_folder: str | Path, split: str) -> SftRows:
    manifest = load_sft_manifest(path)
    encoder = ChatEncoder(tokenizer_folder)
    if manifest.seq_len != seq_len:
        raise ValueError(
            f"--seq_len {seq_len}: the rows of {path} hold {manifest.seq_len} tokens; use "
            f"--seq_len {manifest.seq_len} or prepare the data again"
        )
    if manifest.tokenizer.fingerprint != encoder.fingerprint:
        raise ValueError(
            f"--tokenizer: {path} was packed with another tokenizer (fingerprint "
            f"{manifest.tokenizer.fingerprint[:12]}, this one is {encoder.fingerprint[:12]}); give "
            "that tokenizer or prepare the data again with this one"
        )
    if split not in manifest.splits:
        raise ValueError(f"{path} has no split {split}; it has {', '.join(manifest.splits)}")
    files = []
    for entry in manifest.splits[split].files:
        file = path / entry.file
        if not file.is_file() or file.stat().st_size != entry.bytes_on_disk:
            raise ValueError(
                f"--data: {file} is missing or was changed; prepare {path} again with "
                "data_tools/prepare_sft.py"
            )
        files.append(file)
    return SftRows(files, seq_len, manifest.tokenizer.vocab_size, is_own=True)


def _check_columns(file: Path) -> None:
    try:
        names = pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"--data: {file} is not a readable parquet file ({' '.join(str(error).split())}); get "
            "it again"
        ) from error
    missing = [name for name in READY_MADE_COLUMNS if name not in names]
    if ("num_samples" in names) != ("sample_lengths" in names):
        missing.append("sample_lengths" if "num_samples" in names else "num_samples")
    if missing:
        raise ValueError(
            f"--data: {file} lacks the columns {', '.join(missing)}; it has {', '.join(names)}"
        )


def _check_sample(
    rows: SftRows, encoder: ChatEncoder, path: Path, tokenizer_folder: str | Path
) -> None:
    """Raise ValueError when conversations do not look as if this tokenizer had made them."""
    # Nothing in ready-made rows says which tokenizer made them. With the right one a conversation
    # begins with its control token, and the texts between control tokens give their ids again.
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
    text_ids = text_encoder(tokenizer_folder)
    control = list(decoder.get_added_tokens_decoder())
    good = seen = 0
    for row in rows:
        ends = np.cumsum(row["doc_lens"])
        for ids in np.split(row["input_ids"], ends)[: len(ends)]:
            seen += 1
            parts = np.split(ids, np.flatnonzero(np.isin(ids, control)))
            texts = [part[~np.isin(part, control)].tolist() for part in parts]
            texts = [text for text in texts if text]
            decoded = decoder.decode_batch(texts, skip_special_tokens=False)
            again = [found.ids for found in text_ids.encode_batch_fast(decoded)]
            # Most, not all: an answer's first white space may have been merged with the header.
            same = sum(ours == theirs for ours, theirs in zip(texts, again, strict=True))
            good += int(
                ids[0] == encoder.start_of_message
                and encoder.end_of_answer in ids
                and same > len(texts) / 2
            )
        if seen >= SAMPLED_CONVERSATIONS:
            break
    if good < SMALLEST_SHARE_THAT_ROUND_TRIPS * seen:
        raise ValueError(
            f"--tokenizer: {path} was not made with {tokenizer_folder}: {seen - good} of {seen} "
            "sampled conversations do not begin with its <|im_start|> or are not its text; give "
            "the tokenizer that the data was made with"
        )


def _arrays_of_rows(table: pa.Table) -> list[dict[str, Any]]:
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(column.type, pa.FixedSizeListType | pa.ListType | pa.LargeListType):
            if column.null_count:
                raise ValueError(f"--data: column {name} has empty (null) rows")
            columns[name] = [
                column[row].values.to_numpy(zero_copy_only=False) for row in range(len(column))
            ]
        else:
            columns[name] = column.to_pylist()
    return [{name: columns[name][row] for name in columns} for row in range(len(table))]


def _bad(place: str, why: str) -> ValueError:
    return ValueError(f"--data: {place}: {why}")
