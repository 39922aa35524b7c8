"""What the examinations share: the opened tokenizer, the bounds, and how things are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mini_llm.data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer, tokenizer_fingerprint
from mini_llm.finding import Finding

# How much of a shard is read, whichever comes first.
MAX_DOCUMENTS = 2000
MAX_BYTES = 8 << 20
ROWS_PER_STEP = 4
NAMED = 12  # sources, reasons or kinds in one line
CLIPPED = 60  # characters of a text that is shown
CLIPPED_END = 24  # of them from its end: room for the header of an answer


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer's folder and what its tokens are."""

    folder: Path
    fingerprint: str
    vocab_size: int
    end_of_document: int
    control_tokens: dict[str, int]
    decoder: Tokenizer

    @property
    def dtype(self) -> np.dtype:
        """Of tokens on disk: uint16 where the vocabulary allows."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode(self, sequences: Sequence[np.ndarray]) -> list[str]:
        """Return the texts of sequences of ids, control tokens spelt out."""
        ids = [sequence.tolist() for sequence in sequences]
        return self.decoder.decode_batch(ids, skip_special_tokens=False)


def open_tokenizer(folder: str | Path) -> OpenTokenizer:
    """Open the tokenizer of a folder; FileNotFoundError or ValueError names --tokenizer."""
    tokenizer = load_tokenizer(folder)
    decoder = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer: {folder} has no end-of-document token (eos)")
    added = decoder.get_added_tokens_decoder()
    return OpenTokenizer(
        folder=Path(folder),
        fingerprint=tokenizer_fingerprint(folder),
        vocab_size=len(tokenizer),
        end_of_document=tokenizer.eos_token_id,
        control_tokens={token.content: token_id for token_id, token in added.items()},
        decoder=decoder,
    )


def default_tokenizer() -> str:
    """Return the project's tokenizer as seen from the repository, where launch.sh runs."""
    if DEFAULT_TOKENIZER.is_relative_to(Path.cwd()):
        return str(DEFAULT_TOKENIZER.relative_to(Path.cwd()))
    return str(DEFAULT_TOKENIZER)


class Rejections:
    """Counts what was rejected, by reason, with the place of the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, place: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        self._first.setdefault(reason, place)

    def finding(self, of: int) -> Finding:
        """Return the line about them, `of` so many rows or lines that were read."""
        total = self.counts.total()
        if not total:
            return Finding("ok", "rejected", f"none of {of:,}")
        reasons = ", ".join(
            f"{count:,} {reason} (first: {self._first[reason]})"
            for reason, count in self.counts.most_common()
        )
        return Finding("note", "rejected", f"{total:,} of {of:,}: {reasons}")


def shares(counts: Mapping[str, int]) -> str:
    """Return 'a 62.5%, b 37.5%', the largest first."""
    ordered = Counter(counts).most_common()
    total = sum(counts.values())
    named = [f"{name} {count / total:.1%}" for name, count in ordered[:NAMED]]
    if len(ordered) > NAMED:
        named.append(f"{len(ordered) - NAMED} more")
    return ", ".join(named)


def share_read(share: float, things: str) -> str:
    """Return how much of the file was read."""
    if share == 1:
        return f"all {things} of the file"
    return f"the first {share:.2%} of the file ({MAX_DOCUMENTS:,} {things} or 8 MB at most)"


def estimate(tokens: int, share: float, file_bytes: int, total_bytes: int, files: int) -> Finding:
    """Return what all files would give if they were like the part that was read."""
    if share == 1 and files == 1:
        return Finding("ok", "tokens in all", f"{tokens:,} (counted: the whole file was read)")
    guess = tokens / share * total_bytes / file_bytes
    where = f"{files:,} files" if files > 1 else "the file"
    return Finding(
        "ok",
        "tokens in all",
        f"ESTIMATE: about {number_in_words(guess)} in {where} ({bytes_in_words(total_bytes)}), "
        "if the rest is like what was read",
    )


def number_in_words(number: float) -> str:
    """Return '5.6 million'."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"


def bytes_in_words(number: int) -> str:
    """Return '7.6 MB'; a megabyte is a million bytes."""
    for size, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number} bytes"


def clipped(text: str) -> str:
    """Return a text short enough for a line."""
    if len(text) <= CLIPPED:
        return text
    return f"{text[: CLIPPED - CLIPPED_END]}…{text[-CLIPPED_END:]}"


def printable(text: str) -> str:
    """Return a text as one line that leaves the terminal alone, whatever the data put into it."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def parts_of_rows(
    input_ids: Iterable[np.ndarray], doc_lens: Iterable[np.ndarray]
) -> list[np.ndarray]:
    """Return the ids of every document in packed rows, without the padding."""
    return [
        part
        for ids, lengths in zip(input_ids, doc_lens, strict=True)
        for part in np.split(ids, np.cumsum(lengths))[: len(lengths)]
    ]
