"""Fixtures that several test folders use."""

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mini_llm.parallel.environment import prepare_environment

prepare_environment()  # before any test imports transformers or deepspeed

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class TinyData:
    """A tokenizer and packed rows that the project's own tools made from generated text."""

    tokenizer: Path
    packed: Path
    seq_len: int

    @property
    def flags(self) -> list[str]:
        """Recipe flags that name this data."""
        return [
            *("--tokenizer", str(self.tokenizer), "--quickstart_data", "false"),
            *("--seq_len", str(self.seq_len)),
            *("--data", f'{{"tiny": {{"path": "{self.packed}", "weight": 1}}}}'),
        ]


def write_text_shard(path: Path, documents: int, seed: int) -> None:
    """FineWeb-shaped parquet of made-up sentences."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(seed)
    words = ["a", "loss", "model", "token", "训练", "模型", "数据"]
    words += ["".join(draw.choices("aeilnorst", k=draw.randint(2, 6))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 25))) + "." for _ in range(documents)]
    table = pa.table({"text": texts, "score": [0.8] * documents, "source": ["made-up"] * documents})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Built once a session by data_tools/, as a user would."""
    folder = tmp_path_factory.mktemp("tiny_data")
    write_text_shard(folder / "text" / "000000.parquet", documents=4000, seed=0)
    tiny = TinyData(folder / "tokenizer", folder / "packed", seq_len=64)

    def tool(name: str, *flags: str) -> None:
        command = [sys.executable, f"data_tools/{name}", "--input", str(folder / "text"), *flags]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)

    tool("train_tokenizer.py", "--output_dir", str(tiny.tokenizer), "--vocab_size", "320")
    tool(
        "prepare_pretrain.py",
        *("--tokenizer", str(tiny.tokenizer), "--output_dir", str(tiny.packed)),
        *("--seq_len", str(tiny.seq_len), "--validation_fraction", "0.1"),
    )
    return tiny
