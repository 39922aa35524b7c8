"""Data: tokenizer, packed rows on disk, and the stream that feeds training.

Names are imported when they are first used, so that `import mini_llm.data` loads neither torch nor
transformers nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not when first used: `collate` names a function and its module, and whichever is bound last wins.
from .collate import IGNORE_INDEX, Batch, collate, one_document_per_row

if TYPE_CHECKING:
    from .manifest import Manifest, check_manifest, load_manifest, write_manifest
    from .packing import best_fit_decreasing, pack_documents, split_long_documents
    from .quickstart import build_quickstart_conversations, build_quickstart_data
    from .sft_stream import open_sft_stream, open_sft_validation
    from .stream import HeldOut, Row, RowStream, open_stream, open_validation, validation_rows
    from .tokenizer import (
        CHAT_TEMPLATE,
        SPECIAL_TOKENS,
        load_tokenizer,
        text_encoder,
        token_byte_lengths,
        tokenizer_fingerprint,
        train_tokenizer,
    )

_MODULE_OF_NAME = {
    "Manifest": "manifest",
    "check_manifest": "manifest",
    "load_manifest": "manifest",
    "write_manifest": "manifest",
    "best_fit_decreasing": "packing",
    "pack_documents": "packing",
    "split_long_documents": "packing",
    "build_quickstart_conversations": "quickstart",
    "build_quickstart_data": "quickstart",
    "open_sft_stream": "sft_stream",
    "open_sft_validation": "sft_stream",
    "HeldOut": "stream",
    "Row": "stream",
    "RowStream": "stream",
    "open_stream": "stream",
    "open_validation": "stream",
    "validation_rows": "stream",
    "CHAT_TEMPLATE": "tokenizer",
    "SPECIAL_TOKENS": "tokenizer",
    "load_tokenizer": "tokenizer",
    "text_encoder": "tokenizer",
    "token_byte_lengths": "tokenizer",
    "tokenizer_fingerprint": "tokenizer",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "CHAT_TEMPLATE",
    "IGNORE_INDEX",
    "SPECIAL_TOKENS",
    "Batch",
    "HeldOut",
    "Manifest",
    "Row",
    "RowStream",
    "best_fit_decreasing",
    "build_quickstart_conversations",
    "build_quickstart_data",
    "check_manifest",
    "collate",
    "load_manifest",
    "load_tokenizer",
    "one_document_per_row",
    "open_sft_stream",
    "open_sft_validation",
    "open_stream",
    "open_validation",
    "pack_documents",
    "split_long_documents",
    "text_encoder",
    "token_byte_lengths",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "validation_rows",
    "write_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
