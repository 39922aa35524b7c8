"""Train the byte-level BPE tokenizer and save it as a folder that stock AutoTokenizer opens.

    python data_tools/train_tokenizer.py --input output/quickstart/data/corpus/pretrain \\
        --output_dir output/quickstart/data/tokenizer --vocab_size 4092
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# The tools run as plain scripts from the repository, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_llm.data.text_files import Rejected, find_text_files, read_documents
from mini_llm.data.tokenizer import (
    CHAT_TOKENS,
    tokenizer_fingerprint,
    train_tokenizer,
)


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
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    return parser.parse_args(command_line)


def run(arguments: argparse.Namespace) -> None:
    """Train and save; ValueError or OSError for bad input."""
    started = time.monotonic()
    files = find_text_files(arguments.input)
    read = {"documents": 0, "characters": 0}

    def texts() -> Iterator[str]:
        for file in files:
            for document in read_documents(file):
                if not isinstance(document, Rejected):
                    read["documents"] += 1
                    read["characters"] += len(document.text)
                    yield document.text

    tokenizer = train_tokenizer(texts(), arguments.vocab_size, arguments.model_max_length)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(arguments.output_dir))
    print(
        f"trained on {read['documents']:,} documents, {read['characters']:,} characters, in "
        f"{time.monotonic() - started:.1f} s"
    )
    fingerprint = tokenizer_fingerprint(arguments.output_dir)[:12]
    print(f"{len(tokenizer):,} entries, fingerprint {fingerprint}: {arguments.output_dir}")


if __name__ == "__main__":
    main()
