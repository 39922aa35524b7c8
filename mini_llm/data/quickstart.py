"""The quickstart's data: corpus → tokenizer → packed rows and packed conversations.

Built once, by the tools that anyone runs.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_NAME

BASE_VOCAB_SIZE = 4092  # + 4 chat tokens = 4096
SEQ_LEN = 256
MAX_BYTES = 8_000_000
# About 80,000 of 2.1 million tokens.
VALIDATION_FRACTION = 0.03
DONE_NAME = ".done"
QUICKSTART_FOLDER = Path("output/quickstart/data")
# The ranks of a launcher carry the variables of their process group; a tool is no rank.
LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def is_quickstart_data(data: Mapping[str, Any]) -> bool:
    """Whether --data names a folder in `QUICKSTART_FOLDER`: a run of one's own builds nothing."""
    paths = [source.get("path") for source in data.values() if isinstance(source, Mapping)]
    return any(Path(path).parent == QUICKSTART_FOLDER for path in paths if isinstance(path, str))


def build_quickstart_data(folder: str | Path) -> None:
    """Build `folder`/corpus, `folder`/tokenizer and `folder`/packed, reusing what is finished.

    Any number of processes may call it at once: a lock file lets one build while the others wait
    for the lock and then find the work done. Raises FileNotFoundError when the tools are not beside
    the package, ValueError when a tool fails.
    """
    folder = Path(folder)
    corpus, tokenizer, packed = folder / "corpus", folder / "tokenizer", folder / "packed"
    if (packed / MANIFEST_NAME).exists() and (tokenizer / DONE_NAME).exists():
        return
    with _only_builder(folder) as tools:
        if (packed / MANIFEST_NAME).exists() and (tokenizer / DONE_NAME).exists():
            return  # another process built it while this one waited
        _make_corpus(tools, corpus)
        _run_stage(
            tools / "train_tokenizer.py",
            [
                f"--input={corpus / 'pretrain'}",
                f"--output_dir={tokenizer}",
                f"--vocab_size={BASE_VOCAB_SIZE}",
            ],
            done=tokenizer / DONE_NAME,
        )
        # A finished folder carries its own mark: the manifest, which is written last.
        _run_stage(
            tools / "prepare_pretrain.py",
            [
                f"--input={corpus / 'pretrain'}",
                f"--tokenizer={tokenizer}",
                f"--output_dir={packed}",
                f"--seq_len={SEQ_LEN}",
                f"--validation_fraction={VALIDATION_FRACTION}",
                "--row_group_rows=32",
            ],
            done=packed / MANIFEST_NAME,
        )


def build_quickstart_conversations(folder: str | Path) -> None:
    """Build `folder`/packed_sft from the corpus's conversations, as `build_quickstart_data` does.

    What that one builds is built first.
    """
    build_quickstart_data(folder)
    folder = Path(folder)
    packed = folder / "packed_sft"
    if (packed / MANIFEST_NAME).exists():
        return
    with _only_builder(folder) as tools:
        _make_corpus(tools, folder / "corpus")  # which may have been deleted once rows were packed
        _run_stage(
            tools / "prepare_sft.py",
            [
                f"--input={folder / 'corpus' / 'sft'}",
                f"--tokenizer={folder / 'tokenizer'}",
                f"--output_dir={packed}",
                f"--seq_len={SEQ_LEN}",
                "--self_awareness=0",  # they speak of a larger model
                "--row_group_rows=32",
            ],
            done=packed / MANIFEST_NAME,
        )


@contextmanager
def _only_builder(folder: Path) -> Iterator[Path]:
    """Hold the folder's lock, and give the folder of the tools; FileNotFoundError without them."""
    tools = Path(__file__).resolve().parents[2] / "data_tools"
    if not tools.is_dir():
        raise FileNotFoundError(
            f"the quickstart's data is built by the tools in {tools}, which is not there; run from "
            "a clone of the repository (pip install -e .) or give --data"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tools


def _make_corpus(tools: Path, corpus: Path) -> None:
    _run_stage(
        tools / "make_quickstart_corpus.py",
        [f"--output_dir={corpus}", f"--max_bytes={MAX_BYTES}"],
        done=corpus / DONE_NAME,
    )


def _run_stage(tool: Path, arguments: list[str], done: Path) -> None:
    """Run a tool unless `done` exists, create `done` after it, and print one line."""
    if done.exists():
        print(f"quickstart data: {tool.stem} is done already", flush=True)
        return
    started = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    finished = subprocess.run(
        [sys.executable, str(tool), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if finished.returncode:
        raise ValueError(f"{tool.name} failed: {finished.stderr.strip()}")
    if not done.exists():
        done.touch()
    last_line = finished.stdout.strip().splitlines()[-1]
    seconds = time.monotonic() - started
    print(f"quickstart data: {tool.stem} ({seconds:.0f} s) {last_line}", flush=True)


if __name__ == "__main__":
    try:
        build_quickstart_conversations(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
