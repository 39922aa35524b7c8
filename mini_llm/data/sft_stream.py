"""The stream of conversations: that of `stream.py`, with rows that have a `loss_mask`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .conversation_files import check_conversation_file
from .conversations import ChatEncoder
from .hub_dataset import hub_dataset_files, is_hub_dataset
from .manifest import MANIFEST_NAME
from .packed_stream import PackedData, open_prepared
from .raw_conversations import ChatDocuments
from .raw_stream import Location, RawFile, find_raw_files, raw_files_below
from .ready_made import ReadyMadeFiles, is_ready_made
from .shard_cache import is_remote
from .stream import Entry, HeldOut, RawData, RowStream, parse_data, stream_of, validation_of

HUB_KEYS = ("config", "split")


def open_sft_stream(
    data: Mapping[str, Mapping[str, Any]],
    *,
    seq_len: int,
    seed: int,
    rows_per_step: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch: bool = True,
    tokenizer: str | Path,
) -> RowStream:
    """Open the endless stream of this rank's rows of conversations, each with its `loss_mask`.

    As `open_stream`, but a path of `data` holds conversations. It may be

    - a folder that data_tools/prepare_sft.py wrote, or its URL;
    - ready-made parquet of tokens (`ready_made.py`), local: a file, a folder or a list of files;
    - raw jsonl or parquet (`conversation_files.py`): a file, a folder or a list of files, local or
      `https://` or `hf://`. Lines and rows that are no conversation to train on, or longer than a
      row, are counted in `rejected_per_source`;
    - the name of a data set on the hub, `org/name`, which is read as raw files; its entry may have
      a `config` and a `split` (train).
    """
    encoder = ChatEncoder(tokenizer)
    return stream_of(
        parse_data(data, hub_keys=HUB_KEYS),
        lambda entry: _open_conversations(entry, seq_len, encoder),
        seq_len=seq_len,
        seed=seed,
        rows_per_step=rows_per_step,
        rank=rank,
        world_size=world_size,
        prefetch=prefetch,
        tokenizer=tokenizer,
    )


def open_sft_validation(
    data: Mapping[str, Mapping[str, Any]],
    *,
    seq_len: int,
    max_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: str | Path,
) -> dict[str, HeldOut]:
    """Return this rank's contiguous slice of the first `max_rows` held-out rows of every source."""
    encoder = ChatEncoder(tokenizer)
    return validation_of(
        parse_data(data, hub_keys=HUB_KEYS),
        lambda entry: _open_conversations(entry, seq_len, encoder),
        seq_len=seq_len,
        max_rows=max_rows,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
    )


def _open_conversations(entry: Entry, seq_len: int, encoder: ChatEncoder) -> PackedData | RawData:
    location = entry.location
    documents = ChatDocuments(encoder, seq_len)
    if is_hub_dataset(location):
        assert isinstance(location, str)
        urls = hub_dataset_files(location, entry.config, entry.split)
        files = [RawFile(url, size, check_conversation_file) for url, size in urls.items()]
        return RawData(files, documents)
    for key in ("config", "split"):
        if getattr(entry, key) is not None:
            raise ValueError(
                f"--data: {entry.name} has a {key}, which belongs to a data set on the hub, but "
                f"{location} is not the name of one"
            )
    if tokens := _ready_made_files(location):
        return ReadyMadeFiles(str(location), tokens, encoder, seq_len)
    found = find_raw_files(
        location, check=check_conversation_file, preparation=documents.preparation
    )
    if found is None:
        assert not isinstance(location, list)
        return open_prepared(location, of_conversations=True)
    for file in found:
        if not is_remote(file.name):
            file.path()  # which checks it, before the run begins
    return RawData(found, documents)


def _ready_made_files(location: Location) -> list[Path]:
    """Return the local files of a path of --data if they are ready-made rows, by the first one."""
    files = []
    if isinstance(location, list):
        files = [Path(name) for name in location if not is_remote(name)]
    elif not is_remote(location):
        path = Path(location)
        is_prepared = (path / MANIFEST_NAME).exists()
        files = [path] if path.is_file() else [] if is_prepared else raw_files_below(path)
    return files if files and is_ready_made(files[0]) else []
