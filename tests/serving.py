"""Starting the server the way a user does, and models whose answers are worth comparing."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from tests.conftest import REPOSITORY, TINY_MODELS

KEY = "a-key-for-the-tests"
SECONDS_TO_START = 300
ARCHITECTURES = sorted(TINY_MODELS)
SUBJECTS = ["模型", "海洋", "the loss", "数据", "a tree", "机器学习", "music", "春天"]
PROMPTS = [f"{number} 你好，请说说{SUBJECTS[number % 8]}。" for number in range(16)]


@dataclass(frozen=True)
class Server:
    """A server that is listening."""

    process: subprocess.Popen[str]
    url: str
    model: str
    log: Path

    def client(self, **changes: Any) -> OpenAI:
        """The real client of OpenAI, without its retries."""
        options = {"api_key": KEY, "base_url": f"{self.url}/v1", "max_retries": 0, "timeout": 300}
        return OpenAI(**{**options, **changes})

    def http(self, key: str | None = KEY) -> httpx.Client:
        """A plain client for what OpenAI's would never send."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=300)

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        memory: int = psutil.Process(self.process.pid).memory_info().rss
        return memory


@contextmanager
def running_server(checkpoint: Path, *flags: str, key: str = KEY) -> Iterator[Server]:
    """A server of ``checkpoint`` on a free port; ended by SIGTERM, which it must survive with 0."""
    environment = {**os.environ, "MINI_LLM_API_KEY": key, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mini_llm.inference.serve", str(checkpoint), "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *flags],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        try:
            assert process.stdout is not None
            url = None
            for line in process.stdout:
                if found := re.search(r"listening on (http://\S+)/v1", line):
                    url = found[1]
                    break
            assert url is not None, log.read_text()
            yield Server(process, url, checkpoint.name, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()
        finally:
            process.kill()
            process.wait()


def make_checkpoint(name: str, folder: Path) -> Path:
    """A random tiny model of a preset with the project's tokenizer, as a run leaves it.

    Its embeddings are not tied and its weights are large, so that answers are not one token over
    and over.
    """
    import torch

    from mini_llm import build_model
    from mini_llm.data import load_tokenizer
    from mini_llm.data.tokenizer import DEFAULT_TOKENIZER
    from mini_llm.hub.export import chat_generation_config

    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    overrides = {**TINY_MODELS[name], "tie_word_embeddings": False, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = build_model(
        name, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0, **overrides
    )
    model.generation_config = chat_generation_config(tokenizer)
    checkpoint = folder / name
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return checkpoint


def reference_tokens(checkpoint: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """What stock transformers goes on with, greedily, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for scores in generated.scores:
            first, second = torch.topk(scores[0], 2).values.tolist()
            assert first - second > 1e-4, "in a batch the other token could win: change a prompt"
        answers.append(generated.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    return answers
