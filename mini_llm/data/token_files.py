"""Ready-made tokens: headerless files of little-endian uint16 ids, documents end with an end id.

Nothing in such a file says which tokenizer made it, so it is checked against the one that is given:
its ids must exist, documents must end, and a sample must decode to text that gives the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .text_files import QUARANTINED_CHARACTERS, BadFileError, Document, Piece, Rejected
from .tokenizer import text_encoder

TOKEN_SUFFIXES = (".bin",)
TOKEN_DTYPE = np.dtype("<u2")
# About what a token of text weighs; only for sizes that should be comparable with those of text.
BYTES_PER_TOKEN = TOKEN_DTYPE.itemsize
SAMPLE_TOKENS = 1 << 20
SAMPLE_DOCUMENTS = 64
LONGEST_SAMPLED_DOCUMENT = 8192
# Books have 100,000 tokens; a file with fewer ends than this has another end id.
MOST_TOKENS_PER_DOCUMENT = 1_000_000
# The right tokenizer gives back all of them but those with control tokens spelt out in the text.
SMALLEST_SHARE_THAT_ROUND_TRIPS = 0.5
READ_TOKENS = 1 << 20


def check_token_file(file: Path, tokenizer: Path, vocab_size: int, end_of_document: int) -> None:
    """Raise BadFileError when `file` cannot be tokens of the tokenizer in the folder `tokenizer`.

    Counts the document ends in the whole file, and decodes documents from its beginning.
    """

    def refuse(why: str) -> BadFileError:
        return BadFileError(str(file), f"{file} {why}")

    num_bytes = file.stat().st_size
    if not num_bytes:
        raise refuse("is empty (0 bytes)")
    if num_bytes % TOKEN_DTYPE.itemsize:
        raise refuse(
            f"has an odd number of bytes ({num_bytes:,}): it is cut off or not uint16 tokens"
        )
    ends = 0
    for tokens in _blocks(file, 0, num_bytes // TOKEN_DTYPE.itemsize):
        if int(tokens.max()) >= vocab_size:
            raise refuse(
                f"holds the id {int(tokens.max())}, but the tokenizer {tokenizer} has only "
                f"{vocab_size} ids; it was made with another --tokenizer"
            )
        ends += int((tokens == end_of_document).sum())
    num_tokens = num_bytes // TOKEN_DTYPE.itemsize
    if not ends or num_tokens / ends > MOST_TOKENS_PER_DOCUMENT:
        raise refuse(
            f"holds the end-of-document id {end_of_document} {ends:,} times in {num_tokens:,} "
            "tokens, too rarely for documents; it was made with another --tokenizer"
        )
    documents = _sampled_documents(file, end_of_document)
    if not documents:
        return  # only documents that are too long to sample
    encoder = text_encoder(tokenizer)
    texts = _decoder(tokenizer).decode_batch(documents, skip_special_tokens=False)
    again = encoder.encode_batch_fast(texts, add_special_tokens=False)
    same = sum(ids == found.ids for ids, found in zip(documents, again, strict=True))
    if same < SMALLEST_SHARE_THAT_ROUND_TRIPS * len(documents):
        garbled = sum("\ufffd" in text for text in texts)
        raise refuse(
            f"does not decode to text that gives its ids again: {len(documents) - same} of "
            f"{len(documents)} sampled documents differ, {garbled} are not even valid UTF-8; it "
            "was made with another --tokenizer"
        )


def token_pieces(file: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
    """Cut a file into equal ranges of at most `max_bytes`; a document belongs where it starts."""
    del max_documents  # how many there are is only known after reading
    size = file.stat().st_size // TOKEN_DTYPE.itemsize
    max_tokens = max(max_bytes // BYTES_PER_TOKEN, 1)
    bounds = np.linspace(0, size, -(-size // max_tokens) + 1).astype(np.int64).tolist()
    return [
        Piece(file, start, stop, 0, (stop - start) * BYTES_PER_TOKEN)
        for start, stop in pairwise(bounds)
    ]


class TokenReader:
    """Reads the documents of pieces with one tokenizer, that of the folder `tokenizer`."""

    def __init__(self, tokenizer: Path, vocab_size: int, end_of_document: int) -> None:
        self._decoder = _decoder(tokenizer)
        self._vocab_size = vocab_size
        self._end_of_document = end_of_document

    def read_piece(self, piece: Piece) -> Iterator[Document | Rejected]:
        """Yield the documents that start in a piece, each with its text and ids without the end.

        The text is what decides over the held-out split, as it does for a text file. What follows
        the last end of a file is `Rejected` as unfinished.
        """
        for start, token_ids in self._documents(piece):
            place = f"token {start}"
            if token_ids is None:
                yield Rejected("unfinished", place)
                continue
            if not len(token_ids):
                yield Rejected("empty", place)
                continue
            if int(token_ids.max()) >= self._vocab_size:
                raise BadFileError(
                    str(piece.file),
                    f"{piece.file} holds the id {int(token_ids.max())}, but the tokenizer has only "
                    f"{self._vocab_size} ids; it was made with another --tokenizer",
                )
            text = self._decoder.decode(token_ids.tolist(), skip_special_tokens=False)
            if not text.strip():
                yield Rejected("empty", place, text[:QUARANTINED_CHARACTERS])
                continue
            yield Document(text, piece.file.stem, place, token_ids)

    def _documents(self, piece: Piece) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield (first token, ids) of each document that starts in the piece; None: it never ends.

        A document starts at 0 or after an end id, so reading begins one token before the piece.
        """
        size = piece.file.stat().st_size // TOKEN_DTYPE.itemsize
        document_start = 0 if piece.start == 0 else None
        collected: list[np.ndarray] = []
        block_start = max(piece.start - 1, 0)
        for block in _blocks(piece.file, block_start, size):
            place = 0
            for end in np.flatnonzero(block == self._end_of_document).tolist():
                if document_start is not None:
                    collected.append(block[place:end])
                    yield document_start, np.concatenate(collected)
                    collected = []
                place = end + 1
                document_start = block_start + place
                if document_start >= piece.stop:
                    return
            if document_start is not None:
                collected.append(block[place:])
            block_start += len(block)
            if document_start is None and block_start >= piece.stop:
                return  # a document that began before covers the whole piece
        if document_start is not None and document_start < size:
            yield document_start, None


def _blocks(file: Path, start: int, stop: int) -> Iterator[np.ndarray]:
    with file.open("rb") as tokens:
        tokens.seek(start * TOKEN_DTYPE.itemsize)
        while start < stop:
            count = min(READ_TOKENS, stop - start)
            block = np.frombuffer(tokens.read(count * TOKEN_DTYPE.itemsize), TOKEN_DTYPE)
            if len(block) < count:
                raise BadFileError(str(file), f"{file} became shorter while it was read")
            yield block
            start += count


def _sampled_documents(file: Path, end_of_document: int) -> list[list[int]]:
    """Return whole documents of moderate length from the beginning of a file."""
    size = file.stat().st_size // TOKEN_DTYPE.itemsize
    tokens = np.concatenate(list(_blocks(file, 0, min(size, SAMPLE_TOKENS))))
    ends = np.flatnonzero(tokens == end_of_document)
    documents = np.split(tokens, ends + 1)[: len(ends)]
    return [
        document[:-1].tolist()
        for document in documents
        if 1 < len(document) <= LONGEST_SAMPLED_DOCUMENT
    ][:SAMPLE_DOCUMENTS]


def _decoder(tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
