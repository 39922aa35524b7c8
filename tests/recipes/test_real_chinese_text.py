"""Real Chinese text, Debian's manual pages, through every data tool and 50 steps of training."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.make_quickstart_corpus import MAN_DIRECTORY, MANPAGES_ZH, manual_pages
from mini_llm.data import load_manifest, load_tokenizer, open_stream, validation_rows
from tests.launching import REPOSITORY, TINY_RUN, launch, series
from tests.requirements import require_debian_package

SEQ_LEN = 2048  # most pages, and parts of the long ones, fit a row
RATIO = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/ → sampled/ → tokenizer/ → packed/, made by the tools as a user runs them."""
    require_debian_package(MANPAGES_ZH, MAN_DIRECTORY / "man1")
    folder = tmp_path_factory.mktemp("chinese")
    texts = list(manual_pages(MAN_DIRECTORY))
    # FineWeb's shape: several shards, several sources of unequal size.
    for shard in range(3):
        members = texts[shard::3]
        sources = ["common" if i % 10 else "rare" for i in range(len(members))]
        columns = {"text": members, "score": [0.8] * len(members), "source": sources}
        (folder / "text").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"text/{shard:06d}.parquet")

    def tool(name: str, source: str, output: str, *flags: str) -> None:
        command = [sys.executable, f"data_tools/{name}", "--input", str(folder / source)]
        command += ["--output_dir", str(folder / output), *flags]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)

    tool("sample.py", "text", "sampled", "--ratio", str(RATIO))
    tool("train_tokenizer.py", "sampled", "tokenizer", "--vocab_size", "4000")
    tokenizer = ["--tokenizer", str(folder / "tokenizer"), "--seq_len", str(SEQ_LEN)]
    tool("prepare_pretrain.py", "sampled", "packed", *tokenizer, "--validation_fraction", "0.05")
    return folder


def texts_of(folder: Path) -> list[str]:
    return [
        text
        for file in sorted(folder.glob("*.parquet"))
        for text in pq.read_table(file)["text"].to_pylist()
    ]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def test_sample_holds_half_of_the_documents_and_no_other_text(folder: Path) -> None:
    all_texts, sampled = texts_of(folder / "text"), texts_of(folder / "sampled")
    assert set(sampled) <= set(all_texts)
    assert abs(len(sampled) - RATIO * len(all_texts)) <= 2  # one for each source
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in text) for text in sampled) > 0.9 * len(
        sampled
    )


def test_decoded_rows_give_back_the_real_text_exactly(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    manifest = load_manifest(folder / "packed")
    data = {"pages": {"path": str(folder / "packed")}}
    with open_stream(data, seq_len=SEQ_LEN, seed=0, rows_per_step=1) as stream:
        rows = [next(stream) for _ in range(manifest.splits["train"].rows)]
    rows += [dict(row) for row in validation_rows(folder / "packed")]
    texts = set(texts_of(folder / "sampled"))
    end = tokenizer.eos_token
    whole = 0
    for row in rows:
        start = 0
        for length in row["doc_lens"].tolist():
            text = tokenizer.decode(row["input_ids"][start : start + length].tolist())
            start += length
            if text.endswith(end) and text.removesuffix(end) in texts:
                whole += 1
                texts.remove(text.removesuffix(end))
    # The others are longer than a row and stand in it in pieces.
    sizes = {text: len(tokenizer(text)["input_ids"]) + 1 for text in texts}
    assert whole > 9 * len(texts) and all(size > SEQ_LEN for size in sizes.values())


@pytest.mark.slow
def test_fifty_steps_on_real_chinese_text_lower_its_loss(folder: Path, tmp_path: Path) -> None:
    packed = {"pages": {"path": str(folder / "packed"), "weight": 1}}
    launch(
        *(*TINY_RUN, "--tokenizer", str(folder / "tokenizer"), "--data", json.dumps(packed)),
        *("--quickstart_data", "false", "--seq_len", str(SEQ_LEN), "--global_batch_tokens", "4096"),
        *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
        *("--output_dir", str(tmp_path / "run"), "--max_steps", "50", "--eval_steps", "50"),
        processes=1,
    )
    held_out = series(tmp_path / "run", "eval/pages/loss")
    assert len(series(tmp_path / "run", "train/loss")) == 50
    assert held_out[-1] < held_out[0] - 0.5
