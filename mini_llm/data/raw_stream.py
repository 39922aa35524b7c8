"""Raw data as a source of the stream: read, tokenised and packed while training.

Files (FineWeb parquet, DeepCtrl jsonl, conversations) → pieces → a window of about a thousand
documents → rows. What a document is, its `DocumentFormat` says: text here, conversations in
`raw_conversations.py`. Nothing passes from one window to the next, so a rank's place is where its
window begins and how many of the window's rows were taken: to resume, the window is read, tokenised
and packed again.

Every document of an epoch goes to exactly one rank. Where there are `FILES_PER_RANK` files for each
rank, a rank reads whole files; else every file is cut into pieces for all ranks, so that one file
is enough for any number of ranks. The order of the files is another in every epoch. The documents
that the preparation would hold out for validation, by the same hash, are left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from .manifest import MANIFEST_NAME
from .packed_stream import Row, file_identity
from .packing import pack_documents
from .shard_cache import ShardCache, is_remote, list_hub_files
from .text_files import (
    TEXT_SUFFIXES,
    BadFileError,
    Document,
    ParquetReader,
    Piece,
    Rejected,
    check_text_file,
    files_below,
    read_piece,
    text_pieces,
)
from .tokenizer import END_OF_TEXT, encode_function, tokenizer_fingerprint
from .unit_files import random_keys

Location = str | list[str]

# More documents pack tighter and need more memory: at 2,048 tokens a row 1,000 fill 99.6%.
WINDOW_DOCUMENTS = 1024
WINDOW_BYTES = 8 << 20
FILES_PER_RANK = 16
HELD_OUT_FRACTION = 0.005
PREPARE_TEXT = "data_tools/prepare_pretrain.py"


class DocumentFormat(Protocol):
    """What raw files hold, and how it becomes rows.

    `noun` and `preparation` are its name and its tool in messages, `fingerprint` is of all that
    decides over the tokens. A document and an encoded document are whatever the format makes them;
    the latter has a length in tokens.
    """

    noun: str
    preparation: str
    fingerprint: str
    held_out_fraction: float

    def pieces(self, path: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
        """Cut a file into pieces of about at most so many documents and bytes."""

    def read(self, piece: Piece) -> Iterator[Any | Rejected]:
        """Yield the documents of a piece; BadFileError for a file that cannot be read."""

    def num_bytes(self, document: Any) -> int:
        """Return the bytes of a document's text."""

    def is_held_out(self, document: Any) -> bool:
        """Whether a document is for validation, by a hash of its text."""

    def encode(self, document: Any) -> Any | Rejected:
        """Return a document's tokens."""

    def pack(self, encoded: Sequence[Any], source: str) -> list[Row]:
        """Return encoded documents, at least one, as rows in a fixed order."""


class RawFile:
    """A raw file, local or remote; `name` is its path or URL, `size` its bytes where known.

    `check` raises BadFileError for a file of another format.
    """

    def __init__(
        self, name: str, size: int | None = None, check: Callable[[Path], Any] = check_text_file
    ) -> None:
        if not name.endswith(TEXT_SUFFIXES):
            raise ValueError(f"--data: {name} is neither {' nor '.join(TEXT_SUFFIXES)}")
        self.name = name
        self.size = size
        self._check = check
        self._identity: tuple[int, int, int] | None = None
        self._checked = False
        self._cache: ShardCache | None = None
        if is_remote(name):
            base_url, self._file = name.rsplit("/", 1)
            self._cache = ShardCache(base_url)
            self._path = self._cache.folder / self._file
        else:
            self._path = Path(name)
            if not self._path.is_file():
                raise FileNotFoundError(f"--data: {name} does not exist")
            self._identity = file_identity(self._path)
            self.size = self._identity[0]

    def path(self) -> Path:
        """Return the local path, fetched if remote; it is the same file each time and checked."""
        if self._identity is None:
            assert self._cache is not None
            self._cache.fetch(self._file, size=self.size)
            self._identity = file_identity(self._path)
        try:
            identity = file_identity(self._path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--data: {self._path} was deleted during the run; put it back and resume"
            ) from None
        if identity != self._identity:
            raise ValueError(
                f"--data: {self._path} was replaced during the run; put back the file that was "
                "there, or start a new run with another --output_dir"
            )
        if not self._checked:
            try:
                self._check(self._path)
            except BadFileError as error:
                raise self.refused(error) from error
            self._checked = True
        return self._path

    def refused(self, error: BadFileError) -> ValueError:
        """Return the error of --data for a file that cannot be used."""
        origin = f" (from {self.name})" if self._cache is not None else ""
        return ValueError(f"--data: {error.fault}{origin}; get it again or leave it out")

    def fetch_in_background(self) -> None:
        """Start to fetch a remote file."""
        if self._cache is not None and self._identity is None:
            self._cache.fetch_in_background(self._file, size=self.size, sha256=None)


def find_raw_files(
    location: Location,
    *,
    check: Callable[[Path], Any] = check_text_file,
    preparation: str = PREPARE_TEXT,
) -> list[RawFile] | None:
    """Return the raw files at a path of --data, None where it is a prepared folder.

    A list names the files; a folder or `hf://` folder without a manifest is searched for them.
    `check` is theirs, `preparation` the tool that makes prepared folders of them.
    """
    if isinstance(location, list):
        return [RawFile(name, check=check) for name in location]
    if (location.endswith(TEXT_SUFFIXES) and not Path(location).is_dir()) or (
        Path(location).is_file()
    ):
        return [RawFile(location, check=check)]
    if location.startswith("hf://"):
        listed = list_hub_files(location)
        if f"{location.rstrip('/')}/{MANIFEST_NAME}" in listed:
            return None
        files = [
            RawFile(name, size, check)
            for name, size in listed.items()
            if name.endswith(TEXT_SUFFIXES)
        ]
        if not files:
            raise FileNotFoundError(
                f"--data: {location} has no {MANIFEST_NAME} and no {' or '.join(TEXT_SUFFIXES)} "
                "file; check the name, HF_ENDPOINT and, for a private data set, HF_TOKEN"
            )
        return files
    if is_remote(location) or (Path(location) / MANIFEST_NAME).exists():
        return None
    files = [RawFile(str(path), check=check) for path in raw_files_below(Path(location))]
    if files:
        try:
            files[0].path()
        except ValueError as error:
            raise ValueError(
                f"{error}; or, if {location} is a prepared folder, it has no {MANIFEST_NAME} "
                f"because its preparation did not finish: run {preparation} again"
            ) from error
    return files or None


def raw_files_below(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold raw data, by their suffix, sorted."""
    return [file for file in files_below(folder) if file.suffix in TEXT_SUFFIXES]


class RawSource:
    """Raw files, as this rank's endless rows."""

    def __init__(
        self,
        name: str,
        files: Sequence[RawFile],
        documents: DocumentFormat,
        *,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.name = name
        self.documents = documents
        self.rows_decoded = 0
        self._files = files
        self._seq_len = seq_len
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.fingerprint = self._fingerprint()
        self._whole_files = len(files) >= FILES_PER_RANK * world_size
        self._window = _Window.empty(_Start(0, 0, 0))
        self._taken = 0
        self._rejected: Counter[str] = Counter()  # in all windows so far, this one included

    def row(self, ordinal: int) -> Row:
        """Return this rank's next row; `ordinal` counts those of all ranks and is not needed."""
        while self._taken == len(self._window.rows):
            self._window = self._next_window(self._window.end)
            self._taken = 0
        self._taken += 1
        self.rows_decoded += 1
        return self._window.rows[self._taken - 1]

    def read_ahead(self, ordinal: int, ordinals_per_step: int) -> None:
        """Nothing: reading a file starts to fetch the next one."""

    def position(self) -> dict[str, Any]:
        """Return where the rank is: where its window begins and how many rows it took from it.

        `rejected` counts what was no document, by reason, in all windows so far with this one.
        """
        if self._taken == len(self._window.rows):
            place = self._window.end.as_dict() | {"row": 0, "check": ""}
        else:
            place = self._window.start.as_dict() | {"row": self._taken, "check": self._window.check}
        return place | {"rejected": dict(self._rejected)}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a position; ValueError names the files if the window there has another content."""
        start = _Start(position["epoch"], position["file"], position["piece"])
        self._window = _Window.empty(start)
        self._taken = 0
        if position["row"]:
            self._window = self._next_window(start)
            self._taken = position["row"]
            if self._window.check != position["check"] or self._window.start != start:
                raise ValueError(
                    f"--data: the text of {', '.join(self._window.files[:3])} is not what it was "
                    "when the stream's state was saved; put back the files that were there, or "
                    "start a new run with another --output_dir"
                )
        self._rejected = Counter(position["rejected"])  # reading the window again adds nothing

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        documents = self.documents
        digest.update(f"{documents.fingerprint}/{self._seq_len}".encode())
        digest.update(f"/{WINDOW_DOCUMENTS}/{WINDOW_BYTES}/".encode())
        digest.update(f"{documents.held_out_fraction}\n".encode())
        for file in self._files:
            # Not the folder: data may be moved between machines.
            digest.update(f"{file.name.rsplit('/', 1)[-1]} {file.size}\n".encode())
        return digest.hexdigest()

    def _next_window(self, start: _Start) -> _Window:
        """Return the first window with a row that begins at `start` or later."""
        first_epoch = start.epoch
        reasons: Counter[str] = Counter()
        while start.epoch < first_epoch + 2:
            window = self._read_window(start)
            self._rejected += window.rejected
            if window.rows:
                return window
            if start.epoch == first_epoch:
                reasons += window.rejected
            start = window.end
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise ValueError(
            f"--data: the {len(self._files)} files of '{self.name}' hold no document for rank "
            f"{self._rank} of {self._world_size}; give more {self.documents.noun} or fewer ranks"
            + (f" (left out: {counts})" if counts else "")
        )

    def _read_window(self, start: _Start) -> _Window:
        encoded: list[Any] = []
        documents = num_bytes = 0
        rejected: Counter[str] = Counter()
        names: list[str] = []
        end = _Start(start.epoch + 1, 0, 0)  # unless the window is full before the epoch ends
        for file, piece, after in self._pieces_from(start):
            if file.name not in names:
                names.append(file.name)
            for document in _documents(self.documents, file, piece):
                if isinstance(document, Rejected):
                    rejected[document.reason] += 1
                elif not self.documents.is_held_out(document):
                    tokens = self.documents.encode(document)
                    if isinstance(tokens, Rejected):
                        rejected[tokens.reason] += 1
                    else:
                        encoded.append(tokens)
                    documents += 1
                    num_bytes += self.documents.num_bytes(document)
            if documents >= WINDOW_DOCUMENTS or num_bytes >= WINDOW_BYTES:
                end = after
                break
        key = f"{self._seed}/{self.name}/{self._rank}/{start}"
        rows = _shuffled_rows(self.documents, encoded, self.name, key)
        check = hashlib.sha256()
        for row in rows:
            check.update(row["input_ids"].tobytes())
        digest = check.hexdigest()[:16] if rows else ""
        return _Window(start, end, rows, digest, names, rejected)

    def _pieces_from(self, start: _Start) -> Iterator[tuple[RawFile, Piece, _Start]]:
        """Yield this rank's pieces in the rest of an epoch, each with the start after it."""
        keys = random_keys(len(self._files), f"{self._seed}/{self.name}/{start.epoch}")
        order = np.argsort(keys, kind="stable").tolist()
        mine = [
            place
            for place in range(start.file, len(order))
            if not self._whole_files
            # Counted through all epochs, so that no rank gets the odd files every time.
            or (start.epoch * len(order) + place) % self._world_size == self._rank
        ]
        for place, next_place in pairwise([*mine, None]):
            assert place is not None
            file = self._files[order[place]]
            path = file.path()
            if next_place is not None:
                self._files[order[next_place]].fetch_in_background()
            pieces = self._pieces_of(file, path, place)
            for index in range(start.piece if place == start.file else 0, len(pieces)):
                is_last = next_place is None and index == len(pieces) - 1
                after = _Start(start.epoch, place, index + 1)
                yield file, pieces[index], _Start(start.epoch + 1, 0, 0) if is_last else after

    def _pieces_of(self, file: RawFile, path: Path, place: int) -> list[Piece]:
        try:
            pieces = self.documents.pieces(
                path, max_documents=WINDOW_DOCUMENTS, max_bytes=WINDOW_BYTES
            )
        except BadFileError as error:
            raise file.refused(error) from error
        if self._whole_files or self._world_size == 1 or not pieces:
            return pieces
        # As many pieces for each rank; rows of parquet, bytes of jsonl.
        total = pieces[-1].stop
        count = min(-(-len(pieces) // self._world_size) * self._world_size, total)
        bounds = np.linspace(0, total, count + 1).astype(np.int64).tolist()
        pieces = [Piece(path, first, stop, 0, 0) for first, stop in pairwise(bounds)]
        # From another rank on for every file, for files with fewer documents than ranks.
        return pieces[(self._rank - place) % self._world_size :: self._world_size]


def held_out_rows(
    name: str,
    files: Sequence[RawFile],
    documents: DocumentFormat,
    *,
    seq_len: int,
    max_rows: int | None,
) -> list[Row]:
    """Return at most `max_rows` packed rows of the held-out documents, from the first files on.

    One document in 200 (text) or 100 (conversations) is held out, so this reads as many times the
    text it returns.
    """
    if not max_rows:
        raise ValueError(
            f"--max_eval_rows: the raw data '{name}' needs a limit, because its held-out documents "
            "are spread over all its files"
        )
    encoded = list(_held_out_documents(files, documents, tokens=max_rows * seq_len))
    return _shuffled_rows(documents, encoded, name, f"{name}/validation")[:max_rows]


def _held_out_documents(
    files: Sequence[RawFile], documents: DocumentFormat, *, tokens: int
) -> Iterator[Any]:
    found = 0
    for file in files:
        pieces = documents.pieces(
            file.path(), max_documents=WINDOW_DOCUMENTS, max_bytes=WINDOW_BYTES
        )
        for piece in pieces:
            for document in _documents(documents, file, piece):
                if isinstance(document, Rejected) or not documents.is_held_out(document):
                    continue
                encoded = documents.encode(document)
                if isinstance(encoded, Rejected):
                    continue
                yield encoded
                found += len(encoded)
                if found >= tokens:
                    return


def _documents(documents: DocumentFormat, file: RawFile, piece: Piece) -> Iterator[Any | Rejected]:
    try:
        yield from documents.read(piece)
    except BadFileError as error:
        file.path()  # a file that was replaced is called replaced, not damaged
        raise file.refused(error) from error
    file.path()


def _shuffled_rows(
    documents: DocumentFormat, encoded: Sequence[Any], source: str, key: str
) -> list[Row]:
    """Return encoded documents as rows in an order drawn from `key`."""
    if not encoded:
        return []
    rows = documents.pack(encoded, source)
    # Best fit puts long documents first.
    order = np.argsort(random_keys(len(rows), key), kind="stable").tolist()
    return [rows[row] for row in order]


def is_held_out(document: Document) -> bool:
    """Whether prepare_pretrain.py would hold a text out for validation."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8]) < int(HELD_OUT_FRACTION * 2**64)


class TextDocuments:
    """The texts of a source: a document ends with the end token, one longer than a row is cut."""

    noun = "text"
    preparation = PREPARE_TEXT

    def __init__(self, name: str, tokenizer: str | Path | None, seq_len: int) -> None:
        if tokenizer is None:
            raise ValueError(f"--tokenizer: the raw data '{name}' needs one to be tokenised with")
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self.held_out_fraction = HELD_OUT_FRACTION
        slow = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
        end = slow.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"--tokenizer: {tokenizer} has no {END_OF_TEXT} to end documents with")
        self._end = end
        self._dtype = np.dtype(np.uint16 if slow.get_vocab_size() <= 1 << 16 else np.uint32)
        self._encode_text = encode_function(tokenizer)
        self._seq_len = seq_len
        self._parquet = ParquetReader()

    def pieces(self, path: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
        """Cut a file into pieces of about at most so many documents and bytes."""
        return text_pieces(path, max_documents=max_documents, max_bytes=max_bytes)

    def read(self, piece: Piece) -> Iterator[Document | Rejected]:
        """Yield the documents of a piece."""
        return read_piece(piece, self._parquet)

    def num_bytes(self, document: Document) -> int:
        """Return the bytes of a document's text."""
        return len(document.text.encode())

    def is_held_out(self, document: Document) -> bool:
        """Whether a document is for validation."""
        return is_held_out(document)

    def encode(self, document: Document) -> np.ndarray:
        """Return a document's ids, with the end token."""
        return np.append(self._encode_text(document.text), self._end).astype(self._dtype)

    def pack(self, encoded: Sequence[np.ndarray], source: str) -> list[Row]:
        """Return encoded documents as rows."""
        lengths = np.array([len(ids) for ids in encoded])
        packed = pack_documents(np.concatenate(encoded), lengths, self._seq_len)
        return [
            Row(input_ids=ids, doc_lens=doc_lens, source=source)
            for ids, doc_lens in zip(packed.input_ids, packed.doc_lens, strict=True)
        ]


@dataclass(frozen=True)
class _Start:
    """Where a window begins: the place of a file in the epoch's order, this rank's piece of it."""

    epoch: int
    file: int
    piece: int

    def as_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "file": self.file, "piece": self.piece}

    def __str__(self) -> str:
        return f"{self.epoch}/{self.file}/{self.piece}"


@dataclass(frozen=True)
class _Window:
    """The rows between two starts, a digest of their tokens, their files, and what was no text."""

    start: _Start
    end: _Start
    rows: list[Row]
    check: str
    files: list[str]
    rejected: Counter[str]

    @classmethod
    def empty(cls, start: _Start) -> _Window:
        return cls(start, start, [], "", [], Counter())
