"""What lies at a path of --data: which files, and of which kind by what is in them."""

from __future__ import annotations

import json
import urllib.error
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mini_llm.data.conversation_files import check_conversation_file, from_record
from mini_llm.data.manifest import MANIFEST_NAME, SFT_FORMAT
from mini_llm.data.ready_made import READY_MADE_COLUMNS
from mini_llm.data.shard_cache import (
    ShardCache,
    is_remote,
    list_hub_files,
    open_url,
    retry,
)
from mini_llm.data.text_files import (
    JSONL_FIELDS,
    MAX_LINE_BYTES,
    PARQUET_COLUMNS,
    TEXT_SUFFIXES,
    files_below,
)
from mini_llm.data.token_files import TOKEN_SUFFIXES

from .common import MAX_BYTES, bytes_in_words, one_line

SUFFIXES = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)
# A remote shard is fetched whole, as a run does; this is no size for a look at it.
MAX_REMOTE_BYTES = 1 << 30
# Where the preparations keep what they have done so far.
WORK_FOLDERS = ("unfinished", "stages")


class Kind(Enum):
    """What the pipeline can read, and how it is called."""

    PREPARED = "folder of data_tools/prepare_pretrain.py"
    PREPARED_SFT = "folder of data_tools/prepare_sft.py"
    FINEWEB = "FineWeb-shaped parquet (text, score, source)"
    DEEPCTRL = "DeepCtrl jsonl (instruction, input, output, history)"
    CONVERSATIONS = "conversations (jsonl or parquet)"
    TOKENS = "headerless uint16 tokens"
    READY_MADE_SFT = "ready-made SFT parquet (token_ids, labels, …)"


@dataclass(frozen=True)
class Shard:
    """The first file, on this machine; `files` and `total_bytes` of all files of its suffix.

    `name` is its path or URL, `others` says what files of other suffixes there are.
    """

    path: Path
    name: str
    files: int
    total_bytes: int
    others: str = ""


def prepared_kind(location: str) -> Kind | None:
    """Return which preparation made the folder or URL, None where it has no manifest.

    Raises FileNotFoundError for a path that does not exist.
    """
    if is_remote(location):
        if location.endswith(SUFFIXES):
            return None
        is_hub = location.startswith("hf://")
        if is_hub and f"{location.rstrip('/')}/{MANIFEST_NAME}" not in list_hub_files(location):
            return None
        try:
            manifest = ShardCache(location).fetch(MANIFEST_NAME, refresh=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{one_line(error)}; files cannot be listed over https, so a URL is that of a "
                f"prepared folder or of one {', '.join(SUFFIXES)} file"
            ) from error
    elif not Path(location).exists():
        raise FileNotFoundError(f"--data: {location} does not exist")
    else:
        manifest = Path(location) / MANIFEST_NAME
        if not manifest.is_file():
            return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return Kind.PREPARED  # whose reader says what is wrong with it
    is_sft = isinstance(content, dict) and content.get("format") == SFT_FORMAT
    return Kind.PREPARED_SFT if is_sft else Kind.PREPARED


def find_shard(location: str) -> Shard:
    """Return the first file at a path or URL, fetched if it is remote.

    Raises FileNotFoundError or ValueError, naming --data, where there is none to examine.
    """
    sizes: dict[str, int | None]
    if location.startswith("hf://"):
        sizes = {name: size for name, size in list_hub_files(location).items()}
    elif is_remote(location):
        sizes = {location: _announced_bytes(location)}
    else:
        path = Path(location)
        if any((path / name).is_dir() for name in WORK_FOLDERS):
            raise ValueError(
                f"--data: the preparation of {location} did not finish: it has no {MANIFEST_NAME}; "
                "run the same command again"
            )
        found = files_below(path) if path.is_dir() else [path]
        sizes = {str(file): file.stat().st_size for file in found}
    usable = [name for name in sizes if name.endswith(SUFFIXES)]
    if not usable:
        there = ", ".join(name.rsplit("/", 1)[-1] for name in list(sizes)[:5]) or "nothing"
        raise FileNotFoundError(
            f"--data: {location} has no {', '.join(SUFFIXES)} file and no {MANIFEST_NAME}; it has "
            f"{there}"
        )
    first = usable[0]
    suffix = next(suffix for suffix in SUFFIXES if first.endswith(suffix))
    alike = [name for name in usable if name.endswith(suffix)]
    path = _fetched(first, sizes[first]) if is_remote(first) else Path(first)
    if not path.stat().st_size:
        raise ValueError(f"--data: {first} is empty (0 bytes); get it again or leave it out")
    known = [size for name in alike if (size := sizes[name]) is not None]
    return Shard(
        path=path,
        name=first,
        files=len(alike),
        total_bytes=sum(known) or path.stat().st_size,
        others=", ".join(
            f"{count:,} {other}"
            for other in SUFFIXES
            if other != suffix and (count := sum(name.endswith(other) for name in usable))
        ),
    )


def _fetched(url: str, size: int | None) -> Path:
    if size is not None and size > MAX_REMOTE_BYTES:
        raise ValueError(
            f"--data: {url} has {bytes_in_words(size)}, which is much to fetch for a look; "
            "download it (data_tools/download.py) and give the file"
        )
    folder, file = url.rsplit("/", 1)
    return ShardCache(folder).fetch(file, size=size)


def _announced_bytes(url: str) -> int | None:
    """Return the size that a server announces before it sends, None where it does not."""

    def ask() -> int | None:
        with open_url(url) as response:
            length = response.headers.get("Content-Length")
            return None if length is None else int(length)

    try:
        return retry(ask, url)
    except urllib.error.HTTPError:
        return None  # fetching it says what is wrong


def kind_of(file: Path) -> Kind:
    """Return what a file holds, by its columns or its first record; ValueError where nothing fits.

    A file of tokens has nothing to go by but its name.
    """
    if file.suffix in TOKEN_SUFFIXES:
        return Kind.TOKENS
    return _kind_of_jsonl(file) if file.suffix == ".jsonl" else _kind_of_parquet(file)


def _kind_of_parquet(file: Path) -> Kind:
    try:
        names = pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"--data: {file} is not a readable parquet file, cut off perhaps ({one_line(error)}); "
            "get it again or leave it out"
        ) from error
    if {"text", "score", "source"} <= set(names):
        return Kind.FINEWEB
    if "token_ids" in names:
        return Kind.READY_MADE_SFT
    if not {"messages", "conversations", "output"}.isdisjoint(names):
        check_conversation_file(file)
        return Kind.CONVERSATIONS
    if {"input_ids", "doc_lens"} <= set(names):
        raise ValueError(
            f"--data: {file} holds packed rows without the {MANIFEST_NAME} that a finished "
            "preparation leaves; give the folder that has it, or run the preparation again"
        )
    raise ValueError(
        f"--data: {file} has the columns {', '.join(names)}; needed are "
        f"{', '.join(PARQUET_COLUMNS)} for pretraining, or messages, conversations or "
        f"{', '.join(READY_MADE_COLUMNS)} for SFT"
    )


def _kind_of_jsonl(file: Path) -> Kind:
    record = _first_record(file)
    if all(field in record for field in JSONL_FIELDS):
        return Kind.DEEPCTRL
    if "messages" in record or "conversations" in record or from_record(record) != "wrong_fields":
        return Kind.CONVERSATIONS
    raise ValueError(
        f"--data: {file} has the fields {', '.join(record)}; needed are "
        f"{', '.join(JSONL_FIELDS)} for pretraining, or those, messages, conversations or a "
        "question and an answer for SFT"
    )


def _first_record(file: Path) -> dict[str, Any]:
    """Return the first JSON object among the lines at the beginning of a file."""
    with file.open("rb") as lines:
        while lines.tell() < MAX_BYTES and (line := lines.readline(MAX_LINE_BYTES)):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # reading the shard counts it
            if isinstance(record, dict):
                return record
    raise ValueError(f"--data: {file} has no line that is a JSON object; is it jsonl?")
