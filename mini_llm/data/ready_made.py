"""Ready-made SFT parquet, tokenised elsewhere, as packed rows of the stream.

Columns token_ids, labels, position_ids, attention_mask, length[, type] and, where rows hold several
conversations, num_samples and sample_lengths. Each row becomes one row of the stream, padded to its
length, and is checked on the way. Every hundredth row is held out for validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .collate import IGNORE_INDEX
from .conversations import ChatEncoder
from .manifest import TRAIN, FileEntry
from .packed_stream import RowGroup, RowGroupReader, ShardFiles
from .tokenizer import text_encoder

READY_MADE_COLUMNS = ("token_ids", "labels", "position_ids", "attention_mask", "length")
PACKED_COLUMNS = ("num_samples", "sample_lengths")
HELD_OUT_EVERY = 100
# A row group may be the whole file: what is read of it before it is made compact stays small.
READ_BATCH_ROWS = 256
SAMPLED_CONVERSATIONS = 64
SMALLEST_SHARE_THAT_ROUND_TRIPS = 0.5


@dataclass(frozen=True)
class CheckedRow:
    """A row: `input_ids` [length], `loss_mask` bool [length], `doc_lens` int32."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    doc_lens: np.ndarray


class BadRowError(ValueError):
    """A row that does not hold together."""


def is_ready_made(file: Path) -> bool:
    """Whether a file is parquet of tokens; one that cannot be read is not."""
    try:
        return file.suffix == ".parquet" and "token_ids" in pq.read_schema(file).names
    except (pa.ArrowException, OSError):
        return False


class ReadyMadeFiles:
    """Files of ready-made rows, to be given as rows of `seq_len`.

    Raises ValueError, naming the file, for one without the columns.
    """

    def __init__(
        self, location: str, files: Sequence[Path], encoder: ChatEncoder, seq_len: int
    ) -> None:
        self.location = location
        self._encoder = encoder
        self._seq_len = seq_len
        self._entries = [_entry(file) for file in files]
        digest = hashlib.sha256()
        for entry in self._entries:
            # Not the folder: data may be moved between machines.
            name = entry.file.rsplit("/", 1)[-1]
            digest.update(f"{name} {entry.bytes_on_disk} {entry.row_groups}\n".encode())
        self.fingerprint = digest.hexdigest()

    def check_fit(self, name: str, *, seq_len: int, tokenizer: str | Path | None) -> None:
        """Raise ValueError, naming the flag, where the first rows are not of this tokenizer."""
        assert seq_len == self._seq_len and tokenizer is not None
        rows = chain.from_iterable(
            _read_rows(Path(entry.file), group, seq_len, self._encoder.vocab_size)
            for entry in self._entries
            for group in range(len(entry.row_groups))
        )
        _check_sample(rows, self._encoder, self.location, tokenizer)

    def reader(self, split: str, *, rank: int = 0, world_size: int = 1) -> ReadyMadeReader:
        """Return the rows of a split; without a manifest there is no sha256 to check."""
        files = ShardFiles(Path(), self._entries, None, rank, world_size)
        return ReadyMadeReader(files, self._seq_len, self._encoder, split)


class ReadyMadeReader(RowGroupReader):
    """Random access to the ready-made rows of a split by row group.

    A row that does not hold together raises ValueError, naming file and row, when it is asked for.
    """

    def __init__(self, files: ShardFiles, seq_len: int, encoder: ChatEncoder, split: str) -> None:
        super().__init__(files, seq_len, has_loss_mask=True)
        self._split = split
        self._vocab_size = encoder.vocab_size
        self._dtype = encoder.dtype
        self._starts = [0, *np.cumsum(self.unit_rows).tolist()]  # with the rows of both splits
        held_out = np.diff(np.array(self._starts) // HELD_OUT_EVERY).tolist()
        self.unit_rows = (
            [rows - out for rows, out in zip(self.unit_rows, held_out, strict=True)]
            if split == TRAIN
            else held_out
        )

    def decode(self, unit: int) -> RowGroup:
        """Read the rows of a unit that are the split's, batch by batch."""
        entry, row_group = self.units[unit]
        path = self.files.path(entry)
        rows = self.unit_rows[unit]
        input_ids = np.zeros((rows, self._seq_len), self._dtype)
        loss_mask = np.zeros((rows, self._seq_len), bool)
        doc_lens: list[np.ndarray] = []
        faults: dict[int, ValueError] = {}
        numbers = range(self._starts[unit], self._starts[unit + 1])
        found = _read_rows(path, row_group, self._seq_len, self._vocab_size)
        for number, row in zip(numbers, found, strict=True):
            is_held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if is_held_out == (self._split == TRAIN):
                continue
            index = len(doc_lens)
            if isinstance(row, BadRowError):
                faults[index] = row
                doc_lens.append(np.zeros(0, np.int32))
                continue
            input_ids[index, : len(row.input_ids)] = row.input_ids
            loss_mask[index, : len(row.input_ids)] = row.loss_mask
            doc_lens.append(row.doc_lens)
        offsets = np.cumsum([0, *map(len, doc_lens)]).tolist()
        return RowGroup(input_ids, np.concatenate(doc_lens), offsets, loss_mask, faults)


def _entry(file: Path) -> FileEntry:
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"--data: {file} is not a readable parquet file ({' '.join(str(error).split())}); get "
            "it again"
        ) from error
    names = metadata.schema.to_arrow_schema().names
    missing = [name for name in READY_MADE_COLUMNS if name not in names]
    if ("num_samples" in names) != ("sample_lengths" in names):
        missing.append("sample_lengths" if "num_samples" in names else "num_samples")
    if missing:
        raise ValueError(
            f"--data: {file} lacks the columns {', '.join(missing)}; it has {', '.join(names)}"
        )
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    size = file.stat().st_size
    return FileEntry(str(file), sum(groups), 0, groups, "", size)  # tokens are not known


def _read_rows(
    file: Path, row_group: int, seq_len: int, vocab_size: int
) -> Iterator[CheckedRow | BadRowError]:
    """Yield the rows of a row group, those that do not hold together as their error."""
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(row_group))
        columns = [
            name
            for name in parquet.schema_arrow.names
            if name in (*READY_MADE_COLUMNS, *PACKED_COLUMNS)
        ]
        batches = parquet.iter_batches(
            READ_BATCH_ROWS, row_groups=[row_group], columns=columns, use_threads=False
        )
        try:
            for batch in batches:
                for values in _arrays_of_rows(batch, file):
                    try:
                        yield _checked(values, f"{file} row {row}", seq_len, vocab_size)
                    except BadRowError as error:
                        yield error
                    row += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"--data: {file} is damaged ({' '.join(str(error).split())}); get it again"
            ) from error


def _checked(row: dict[str, Any], place: str, seq_len: int, vocab_size: int) -> CheckedRow:
    length = int(row["length"])
    ids, labels, mask = row["token_ids"], row["labels"], row["attention_mask"]
    if not len(ids) == len(labels) == len(mask) == len(row["position_ids"]):
        raise _bad(place, "token_ids, labels, position_ids, attention_mask differ in size")
    if not 0 < length <= len(ids) or mask[:length].min() < 1 or mask[length:].any():
        raise _bad(place, f"length is {length}, attention_mask says {int((mask != 0).sum())}")
    if length > seq_len:
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
    starts = np.cumsum(doc_lens) - doc_lens
    positions = np.arange(length) - np.repeat(starts, doc_lens)
    if not np.array_equal(row["position_ids"][:length], positions):
        raise _bad(place, "position_ids do not count from 0 in each conversation")
    if ids[:length].min() < 0 or ids[:length].max() >= vocab_size:
        raise _bad(
            place,
            f"it holds an id outside 0..{vocab_size - 1}; give the --tokenizer that the data was "
            "made with",
        )
    supervised = labels[:length] != IGNORE_INDEX
    if (supervised & (labels[:length] != ids[:length])).any():
        raise _bad(place, "labels are not -100 or the token at their place; are they moved?")
    if (labels[length:] != IGNORE_INDEX).any():
        raise _bad(place, "padding is supervised")
    supervised[starts] = False  # nobody's target
    if not supervised.any():
        raise _bad(place, "no token is supervised")
    return CheckedRow(ids[:length], supervised, doc_lens)


def _check_sample(
    rows: Iterator[CheckedRow | BadRowError],
    encoder: ChatEncoder,
    location: str,
    tokenizer_folder: str | Path,
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
        if isinstance(row, BadRowError):
            raise row
        for ids in np.split(row.input_ids, np.cumsum(row.doc_lens)[:-1]):
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
            f"--tokenizer: {location} was not made with {tokenizer_folder}: {seen - good} of "
            f"{seen} sampled conversations do not begin with its <|im_start|> or are not its text; "
            "give the tokenizer that the data was made with"
        )


def _arrays_of_rows(batch: pa.RecordBatch, file: Path) -> list[dict[str, Any]]:
    columns: dict[str, Any] = {}
    for name in batch.schema.names:
        column = batch[name]
        if column.null_count:
            raise ValueError(f"--data: column {name} of {file} has empty (null) rows")
        if isinstance(column.type, pa.FixedSizeListType | pa.ListType | pa.LargeListType):
            columns[name] = [
                column[row].values.to_numpy(zero_copy_only=False) for row in range(len(column))
            ]
        else:
            columns[name] = column.to_pylist()
    return [{name: columns[name][row] for name in columns} for row in range(len(batch))]


def _bad(place: str, why: str) -> BadRowError:
    return BadRowError(f"--data: {place}: {why}")
