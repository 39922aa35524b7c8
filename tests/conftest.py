"""Fixtures that several test folders use."""

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mini_llm.parallel.environment import prepare_environment

prepare_environment()  # before any test imports transformers or deepspeed

REPOSITORY = Path(__file__).resolve().parents[1]

# One of each architecture, small enough that a launch is mostly imports.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "mini_llama3_tiny": {
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    },
    "mini_deepseekv3_tiny": {"num_hidden_layers": 2},
    "mini_qwen3_next_tiny": {},
}


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


@dataclass(frozen=True)
class TinyConversations:
    """Conversations in every shape, raw and packed, and a model of each architecture to start from.

    The models' weights are random but for what the tests of fine-tuning ask about: router biases
    that were moved, as training would.
    """

    raw: Path
    packed: Path
    tokenizer: Path
    models: dict[str, Path]
    seq_len: int

    def flags(self, model: str) -> list[str]:
        """Flags of recipes/sft.py that name this data and the model of a preset."""
        return [
            *("--model", str(self.models[model]), "--tokenizer", "", "--quickstart_data", "false"),
            *("--seq_len", str(self.seq_len)),
            *("--data", f'{{"tiny": {{"path": "{self.packed}", "weight": 1}}}}'),
        ]


def made_up_conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`messages` records: one or several turns, some with a system message, some with thoughts."""
    draw = random.Random(seed)
    words = ["a", "loss", "model", "token", "训练", "模型", "数据", "what", "is", "it"]

    def said(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    records = []
    for number in range(count):
        messages = [{"role": "system", "content": said(4)}] if number % 3 == 0 else []
        for _ in range(1 + (number % 4 == 1)):
            messages.append({"role": "user", "content": f"{number} {said(6)}"})
            answer = f"<think>\n{said(3)}\n</think>\n\n{said(8)}" if number % 5 == 0 else said(8)
            messages.append({"role": "assistant", "content": answer})
        records.append({"messages": messages})
    return records


@pytest.fixture(scope="session")
def tiny_conversations(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> TinyConversations:
    """Packed once a session by data_tools/prepare_sft.py, as a user would."""
    import torch

    from mini_llm import build_model
    from mini_llm.data import load_tokenizer

    folder = tmp_path_factory.mktemp("tiny_conversations")
    raw, packed, seq_len = folder / "raw.jsonl", folder / "packed", 160
    lines = [json.dumps(record, ensure_ascii=False) for record in made_up_conversations(600)]
    raw.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "data_tools/prepare_sft.py", "--input", str(raw)]
    command += ["--tokenizer", str(tiny_data.tokenizer), "--output_dir", str(packed)]
    command += ["--seq_len", str(seq_len), "--self_awareness", "0", "--validation_fraction", "0.1"]
    command += ["--row_group_rows", "16", "--num_proc", "1"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)

    tokenizer = load_tokenizer(tiny_data.tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    models = {}
    for name, overrides in TINY_MODELS.items():
        torch.manual_seed(1)
        model = build_model(name, vocab_size=len(tokenizer), **ids, **overrides)
        for buffer_name, bias in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                bias.uniform_(-0.2, 0.2)
        models[name] = folder / name
        model.save_pretrained(models[name])
        tokenizer.save_pretrained(models[name])
    return TinyConversations(raw, packed, tiny_data.tokenizer, models, seq_len)
