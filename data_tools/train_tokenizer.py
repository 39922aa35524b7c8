"""Train the byte-level BPE tokenizer and save it as a folder that stock AutoTokenizer opens.

    python data_tools/train_tokenizer.py --input data/fineweb/4_5 --output_dir data/tokenizer

Every document is read; a hash of its text decides whether it is held out and, where the input is
larger than --max_characters, whether it is kept. The same documents in any files, in any order,
give the same tokenizer. tokenizer_report.json, beside it, holds what was read and kept, and the
characters and bytes per token on the held-out text of each source.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.command_line import HelpFormatter, Parser
from mini_llm.data.text_files import Rejected, find_text_files, read_documents
from mini_llm.data.tokenizer import (
    CHAT_TOKENS,
    PRETOKENIZER_PATTERN,
    check_vocab_size,
    fast_encoder,
    tokenizer_fingerprint,
    train_tokenizer,
)
from mini_llm.durable import complete_or_absent

REPORT_NAME = "tokenizer_report.json"
ALL_SOURCES = "all"
PROGRESS_SECONDS = 10.0

# The number of tokens of a text.
CountTokens = Callable[[str], int]


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def parse_arguments(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, sys.argv when none is given."""
    parser = Parser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="text: parquet (text, score, source) or DeepCtrl jsonl, files or folders",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=32000,
        help=f"base vocabulary, without the {len(CHAT_TOKENS)} chat tokens that follow it",
    )
    parser.add_argument(
        "--model_max_length", type=int, default=2048, help="longest text without a warning, tokens"
    )
    parser.add_argument(
        "--max_characters",
        type=int,
        default=30_000_000,
        help="sampling limit: at most so many characters are kept, for training and held out "
        "together, whatever the size of the input; every source keeps its share of them and at "
        "least one document. Training takes about 250 bytes of memory for a character of Chinese, "
        "10 for one of English",
    )
    parser.add_argument(
        "--held_out_fraction",
        type=float,
        default=0.01,
        help="share of the documents, chosen by a hash, that are left for the report",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        help="other tokenizers for the report: a folder with tokenizer.json, a .json file, or a "
        ".tiktoken file, which holds no pattern and so is run with the one used here, Qwen's",
    )
    return parser.parse_args(command_line)


def run(arguments: argparse.Namespace) -> None:
    """Train, save and report; ValueError or OSError for bad input."""
    started = time.monotonic()
    check_arguments(arguments)
    others = {name: token_counter(path) for name, path in named(arguments.compare).items()}
    files = find_text_files(arguments.input)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    read = read_samples(files, arguments.max_characters, arguments.held_out_fraction)
    print_input(read, arguments.max_characters)
    tokenizer = train_tokenizer(
        read.training.texts(), arguments.vocab_size, arguments.model_max_length
    )
    tokenizer.save_pretrained(str(arguments.output_dir))
    fingerprint = tokenizer_fingerprint(arguments.output_dir)
    print(
        f"{len(tokenizer):,} entries, fingerprint {fingerprint[:12]}: {arguments.output_dir} "
        f"({time.monotonic() - started:.1f} s)"
    )

    encoder = fast_encoder(arguments.output_dir)
    counters: dict[str, CountTokens] = {"this": lambda text: len(encoder.encode(text)), **others}
    report = {
        "fingerprint": fingerprint,
        "entries": len(tokenizer),
        "max_characters": arguments.max_characters,
        "held_out_fraction": arguments.held_out_fraction,
        "read": sizes(read.documents, read.characters),
        "rejected": dict(sorted(read.rejected.items())),
        "training": read.training.sizes(),
        "held_out": held_out_report(read.held_out, counters),
    }
    with complete_or_absent(arguments.output_dir / REPORT_NAME) as file:
        file.write(json.dumps(report, ensure_ascii=False, indent=2).encode() + b"\n")
    print_held_out(report["held_out"], missing=read.documents.keys() - read.held_out.sources())
    print(f"report: {arguments.output_dir / REPORT_NAME}")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a value that cannot be, before anything is read."""
    check_vocab_size(arguments.vocab_size)
    if arguments.max_characters < 1:
        raise ValueError(f"--max_characters {arguments.max_characters}: give a positive number")
    if not 0 <= arguments.held_out_fraction < 1:
        raise ValueError(
            f"--held_out_fraction {arguments.held_out_fraction} is no share: give 0 or more and "
            "less than 1"
        )
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ValueError(f"--output_dir: {arguments.output_dir} is a file; give a folder")


# What is read, and what of it is kept


class Sample:
    """The texts of the lowest hashes, at most `max_characters` in all, and one of each source.

    A text is kept while the texts of lower hashes leave room for it, so that all sources keep the
    same share of their documents, wherever in the input they stand.
    """

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._threshold = 1 << 64
        # The text of the lowest hash of each source, and a heap of the others: highest hash first.
        self._lowest: dict[str, tuple[int, str]] = {}
        self._others: list[tuple[int, str, str]] = []
        self.characters = 0

    def add(self, text: str, source: str, text_hash: int) -> None:
        """Take one document; ValueError where one of each source is more than the limit."""
        lowest = self._lowest.get(source)
        if lowest is None or text_hash < lowest[0]:
            self._lowest[source] = (text_hash, text)
            self.characters += len(text)
            if lowest is not None:
                heapq.heappush(self._others, (-lowest[0], lowest[1], source))
        elif text_hash < self._threshold:
            heapq.heappush(self._others, (-text_hash, text, source))
            self.characters += len(text)
        while self.characters > self._max_characters and self._others:
            negative_hash, dropped, _ = heapq.heappop(self._others)
            self._threshold = min(self._threshold, -negative_hash)
            self.characters -= len(dropped)
        if self.characters > self._max_characters:
            raise ValueError(
                f"--max_characters is too small: one document of each of {len(self._lowest)} "
                f"sources has {self.characters:,} characters, more than the "
                f"{self._max_characters:,} of this part of it"
            )

    def _kept(self) -> list[tuple[int, str, str]]:
        """Return hash, source and text of what is kept, in the order of the hashes."""
        lowest = [(text_hash, source, text) for source, (text_hash, text) in self._lowest.items()]
        return sorted([*lowest, *((-negative, s, text) for negative, text, s in self._others)])

    def texts(self) -> Iterator[str]:
        """Yield what is kept, in the order of the hashes."""
        return (text for _, _, text in self._kept())

    def sources(self) -> dict[str, list[str]]:
        """Return the kept texts of each source, by name."""
        texts: dict[str, list[str]] = {}
        for _, source, text in self._kept():
            texts.setdefault(source, []).append(text)
        return dict(sorted(texts.items()))

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return the documents and characters kept of each source."""
        texts = self.sources()
        return sizes(
            Counter({source: len(kept) for source, kept in texts.items()}),
            Counter({source: sum(map(len, kept)) for source, kept in texts.items()}),
        )


@dataclass
class Read:
    """What the input held, by source, and the two samples of it."""

    training: Sample
    held_out: Sample
    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def read_samples(files: Sequence[Path], max_characters: int, held_out_fraction: float) -> Read:
    """Read all documents; keep some for training and some to report on, at most so many characters.

    The two share nothing, equal texts included.
    """
    held_out_characters = int(max_characters * held_out_fraction)
    read = Read(Sample(max_characters - held_out_characters), Sample(held_out_characters))
    last = time.monotonic()
    for number, file in enumerate(files, 1):
        for document in read_documents(file):
            if isinstance(document, Rejected):
                read.rejected[document.reason] += 1
                continue
            read.documents[document.source] += 1
            read.characters[document.source] += len(document.text)
            # One half of the hash says which sample, the other one whether it is kept there. It is
            # this tool's own hash: what another tool sampled by a hash is no sample of this one.
            digest = hashlib.blake2b(
                document.text.encode(), digest_size=16, person=b"train_tokenizer"
            ).digest()
            is_held_out = int.from_bytes(digest[:8]) < held_out_fraction * 2.0**64
            sample = read.held_out if is_held_out else read.training
            sample.add(document.text, document.source, int.from_bytes(digest[8:]))
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                print(
                    f"reading file {number:,} of {len(files):,}: "
                    f"{read.documents.total():,} documents",
                    flush=True,
                )
    return read


def sizes(documents: Counter[str], characters: Counter[str]) -> dict[str, dict[str, int]]:
    """Return documents and characters by source, and of all."""
    rows = {
        source: {"documents": documents[source], "characters": characters[source]}
        for source in sorted(documents)
    }
    return {
        **rows,
        ALL_SOURCES: {"documents": documents.total(), "characters": characters.total()},
    }


# Tokenizers


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the paths by what the report calls them: the file or folder's own name."""
    names = {
        path: path.parent.name if path.name == "tokenizer.json" else path.name for path in paths
    }
    if len(set(names.values()) | {"this"}) <= len(names):
        names = {path: str(path) for path in paths}
    return {name: path for path, name in names.items()}


def token_counter(path: Path) -> CountTokens:
    """Open another tokenizer; FileNotFoundError or ValueError where there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"--compare: {path} is no tokenizer; give a folder with tokenizer.json, a .json or a "
            ".tiktoken file"
        )
    try:
        return _tiktoken_counter(file) if file.suffix == ".tiktoken" else _json_counter(file)
    except Exception as error:  # tokenizers and tiktoken raise a plain Exception for a broken file
        raise ValueError(
            f"--compare: {file} is no tokenizer that tokenizers or tiktoken can open "
            f"({' '.join(str(error).split())}); get it again or leave it out"
        ) from error


def _json_counter(file: Path) -> CountTokens:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _tiktoken_counter(file: Path) -> CountTokens:
    import tiktoken

    ranks: dict[bytes, int] = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise ValueError(f"{line[:40]!r} is no base64 and rank") from error
    encoding = tiktoken.Encoding(
        name=file.name, pat_str=PRETOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return lambda text: len(encoding.encode_ordinary(text))


# The report


def held_out_report(
    sample: Sample, counters: dict[str, CountTokens]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return for each source, and all, its size and what each tokenizer makes of it."""
    report: dict[str, dict[str, dict[str, Any]]] = {}
    total: Counter[str] = Counter()
    for source, texts in sample.sources().items():
        counts: Counter[str] = Counter(
            documents=len(texts),
            characters=sum(map(len, texts)),
            bytes=sum(len(text.encode()) for text in texts),
        )
        for name, count_tokens in counters.items():
            counts[f"tokens/{name}"] = sum(map(count_tokens, texts))
        total += counts
        report[source] = _report_row(counts, list(counters))
    if total:
        report[ALL_SOURCES] = _report_row(total, list(counters))
    return report


def _report_row(counts: Counter[str], names: list[str]) -> dict[str, dict[str, Any]]:
    def made(tokens: int) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "characters_per_token": round(counts["characters"] / tokens, 4),
            "bytes_per_token": round(counts["bytes"] / tokens, 4),
        }

    return {
        "text": {key: counts[key] for key in ("documents", "characters", "bytes")},
        "tokenizers": {name: made(counts[f"tokens/{name}"]) for name in names},
    }


def print_input(read: Read, max_characters: int) -> None:
    """Print what was read and kept."""
    training, held_out = (part.sizes()[ALL_SOURCES] for part in (read.training, read.held_out))
    print(
        f"read {read.documents.total():,} documents, {read.characters.total():,} characters; "
        f"kept at most {max_characters:,} characters (--max_characters): "
        f"{training['documents']:,} documents, {training['characters']:,} characters to train on, "
        f"{held_out['documents']:,} documents, {held_out['characters']:,} characters held out",
        flush=True,
    )
    if read.rejected:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(read.rejected.items())
        )
        print(f"rejected: {reasons}")


def print_held_out(report: dict[str, dict[str, dict[str, Any]]], missing: set[str]) -> None:
    """Print characters (and bytes) per token of each source, a column for each tokenizer."""
    if report:
        names = list(report[ALL_SOURCES]["tokenizers"])
        width = max(map(len, [*report, "held-out text"]))
        print("characters per token (bytes per token) on held-out text:")
        print(f"  {'':{width}}  {'characters':>11}  " + "  ".join(f"{n[:24]:>24}" for n in names))
        for source, row in report.items():
            text = row["text"]
            cells = [
                f"{text['characters'] / made['tokens']:.3f} ({text['bytes'] / made['tokens']:.3f})"
                for made in row["tokenizers"].values()
            ]
            print(
                f"  {source:{width}}  {text['characters']:>11,}  "
                + "  ".join(f"{cell:>24}" for cell in cells)
            )
    if missing:
        print(
            f"no held-out text of {', '.join(sorted(missing))}: raise --held_out_fraction for more"
        )


if __name__ == "__main__":
    main()
