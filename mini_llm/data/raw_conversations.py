"""Raw conversations as documents of the stream: encoded with labels, packed whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .collate import IGNORE_INDEX
from .conversation_files import Found, conversation_pieces, digest, read_conversations
from .conversations import ChatEncoder, Conversation, Encoded
from .packed_stream import Row
from .sft_files import pack_conversations
from .text_files import ParquetReader, Piece, Rejected

PREPARE_CONVERSATIONS = "data_tools/prepare_sft.py"
# What prepare_sft.py holds out unless it is told otherwise.
HELD_OUT_FRACTION = 0.01


class ChatDocuments:
    """The conversations of a source: none is ever split, one longer than a row is left out."""

    noun = "conversations"
    preparation = PREPARE_CONVERSATIONS

    def __init__(self, encoder: ChatEncoder, seq_len: int) -> None:
        self.fingerprint = f"conversations/{encoder.fingerprint}"
        self.held_out_fraction = HELD_OUT_FRACTION
        self._encoder = encoder
        self._seq_len = seq_len
        self._parquet = ParquetReader()

    def pieces(self, path: Path, *, max_documents: int, max_bytes: int) -> list[Piece]:
        """Cut a file into pieces of about at most so many conversations and bytes."""
        return conversation_pieces(path, max_documents=max_documents, max_bytes=max_bytes)

    def read(self, piece: Piece) -> Iterator[Conversation | Rejected]:
        """Yield the conversations of a piece."""
        for line in read_conversations(piece, self._parquet):
            yield line.messages if isinstance(line, Found) else line

    def num_bytes(self, document: Conversation) -> int:
        """Return the bytes of what is said."""
        return sum(len(message["content"].encode()) for message in document)

    def is_held_out(self, document: Conversation) -> bool:
        """Whether prepare_sft.py would hold the conversation out for validation."""
        return int.from_bytes(digest(document)[:8]) < int(HELD_OUT_FRACTION * 2**64)

    def encode(self, document: Conversation) -> Encoded | Rejected:
        """Return a conversation's tokens and labels."""
        encoded = self._encoder.encode(document)
        return encoded if len(encoded) <= self._seq_len else Rejected("too_long")

    def pack(self, encoded: Sequence[Encoded], source: str) -> list[Row]:
        """Return encoded conversations as rows."""
        packed = pack_conversations(
            np.concatenate([one.input_ids for one in encoded]).astype(self._encoder.dtype),
            np.concatenate([one.labels != IGNORE_INDEX for one in encoded]),
            np.array([len(one) for one in encoded], np.int64),
            self._seq_len,
        )
        return [
            Row(input_ids=ids, doc_lens=doc_lens, source=source, loss_mask=loss_mask)
            for ids, doc_lens, loss_mask in zip(
                packed.input_ids, packed.doc_lens, packed.loss_mask, strict=True
            )
        ]
