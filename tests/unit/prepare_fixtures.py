"""What the tests of the pretraining preparation share: a tokenizer, texts, and readers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools import prepare_pretrain
from mini_llm.data.manifest import Manifest, load_manifest
from mini_llm.data.tokenizer import load_tokenizer, train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SEQ_LEN = 64
CHINESE = [
    "今天我们把语料切成定长的行。\n每一行都装满，几乎不留空白。",
    "“猫”和“狗”都在睡觉；\u3000全角空格、标点（括号）也要原样保留……",
    "混排 mixed 文本: x = 3.14, 日期 2024年5月6日, 😀🈶 以及罕用字𠮷。",
    "行尾有空格  \n\n\n制表符\t也在，\r\n回车换行不改。 ",
    "文档里写着 <|endoftext|> 和 <|im_start|>，它们只是普通文字。",
]


def example_texts(count: int, seed: int = 0) -> list[str]:
    """Return `count` different texts, a fifth of them Chinese."""
    draw = random.Random(seed)
    words = ["row", "packing", "token", "训练", "模型", "数据\n", "  two", "é", "=", "7"]
    return [
        f"{CHINESE[i % 5]}第{i}篇" if i % 5 == 0 else f"{i} " + " ".join(draw.choices(words, k=12))
        for i in range(count)
    ]


def make_tokenizer(folder: Path) -> Path:
    """Train a small tokenizer on these texts."""
    train_tokenizer(example_texts(400), 360).save_pretrained(str(folder))
    return folder


def write_shard(path: Path, texts: Iterable[str | None], **options: Any) -> Path:
    """Write FineWeb-shaped parquet."""
    texts = list(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": pa.array(texts, pa.string()),
        "score": pa.array([0.8] * len(texts), pa.float64()),
        "source": pa.array(["web"] * len(texts), pa.string()),
    }
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_shards(folder: Path, shards: int, documents: int = 60) -> list[str]:
    """Write so many shards and return their texts."""
    texts = example_texts(shards * documents)
    for shard in range(shards):
        part = texts[shard * documents : (shard + 1) * documents]
        write_shard(folder / f"{shard:06d}.parquet", part)
    return texts


def conversation(output: str, **fields: Any) -> dict[str, Any]:
    """Return a DeepCtrl record."""
    return {"instruction": "", "input": "", "output": output, "history": [], **fields}


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write records one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(source: Path, tokenizer: Path, output: Path, *flags: object) -> list[str]:
    """Return the tool's flags for a small preparation."""
    small: tuple[object, ...] = ("--seq_len", SEQ_LEN, "--validation_fraction", 0.2)
    small += ("--num_proc", 1, "--rows_per_file", 40, "--row_group_rows", 8)
    paths = ("--input", source, "--tokenizer", tokenizer, "--output_dir", output)
    return [str(word) for word in (*paths, *small, *flags)]


def prepare(source: Path, tokenizer: Path, output: Path, *flags: object) -> Manifest:
    """Run the preparation in this process."""
    arguments = prepare_pretrain.parse_arguments(command(source, tokenizer, output, *flags))
    return prepare_pretrain.prepare(arguments)


def run_tool(flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the preparation as a user does."""
    return subprocess.run(
        [sys.executable, "data_tools/prepare_pretrain.py", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def decoded(output: Path, tokenizer: Path, split: str) -> list[str]:
    """Return the texts of whole documents, decoded from the packed rows."""
    decoder: Any = load_tokenizer(tokenizer)
    texts = []
    for entry in load_manifest(output).splits[split].files:
        table = pq.read_table(output / entry.file)
        for ids, lengths in zip(
            table["input_ids"].to_pylist(), table["doc_lens"].to_pylist(), strict=True
        ):
            for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
                document = ids[start : start + length]
                texts.append(decoder.decode(document[:-1] if document[-1] == 0 else document))
    return texts


def all_decoded(output: Path, tokenizer: Path) -> list[str]:
    """Return the texts of both splits, sorted."""
    return sorted(t for split in ("train", "validation") for t in decoded(output, tokenizer, split))
