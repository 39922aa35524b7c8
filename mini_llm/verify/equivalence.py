"""Tiny runs of the recipe under every engine, on all ranks, each against one plain process.

The losses and gradient norms of a run belong to its config, seed and step, not to the engine. What
breaks that (gradients averaged over too few ranks, ranks that do not hear each other, a checkpoint
that does not bring all back) shows in the norms at once, by per cent; rounding does not.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_llm.launch.command import REPOSITORY

from .table import Row

STEPS = 6
STOP_AT = 3  # of the interrupted run
SEQ_LEN = 64
ROWS_PER_RANK = 4  # in two micro-batches, so that accumulation is part of it
DOCUMENTS = 2000
# Small: in fp32 on a CPU, torch's norm of the gradient of 32,000 embeddings is off by up to 7e-4
# (measured); DeepSpeed, which adds up in fp64, would seem to train otherwise.
VOCAB_SIZE = 320
TOKENIZER, ROWS = "tokenizer", "rows"  # folders of the data
STUCK_SECONDS = 100  # a rank that hangs then ends with its stacks in the log

DENSE, EXPERTS = "mini_llama3_tiny", "mini_deepseekv3_tiny"
OVERRIDES: dict[str, dict[str, Any]] = {
    DENSE: {
        **{"hidden_size": 64, "head_dim": 16, "intermediate_size": 96},
        "num_hidden_layers": 2,
    },
    EXPERTS: {"num_hidden_layers": 2},
}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference from the reference, of any step."""

    loss: float
    norm: float


# Sums in another order differ by 1e-6 or less; a GPU's atomic additions do not double that.
FP32 = Tolerance(loss=1e-4, norm=1e-4)
# Where two experts score alike to the last bits, one token may go to the other one: 1e-4 of a loss.
FP32_EXPERTS = Tolerance(loss=1e-3, norm=1e-2)
# DeepSpeed keeps weights in bf16; tests/distributed/test_engines.py measured 1.6e-3 and 4.6e-2
# over 20 steps, against fp32.
BF16 = Tolerance(loss=3e-3, norm=7e-2)


@dataclass(frozen=True)
class Run:
    """One engine: the Accelerate config that starts it, and what is switched on."""

    config: str
    model: str = DENSE
    expert_parallel_size: int = 1
    bf16: bool = False
    interrupted: bool = False
    is_reference: bool = False  # one process, without an engine

    @property
    def name(self) -> str:
        """Of its folder and logs."""
        if self.is_reference:
            return f"reference-{self.model}"
        switches = {
            f"experts{self.expert_parallel_size}": self.expert_parallel_size > 1,
            "bf16": self.bf16,
            "resumed": self.interrupted,
        }
        return "-".join([self.config, *(word for word, on in switches.items() if on)])

    @property
    def check(self) -> str:
        """Its row's title."""
        if self.is_reference:
            return f"reference, {'experts' if self.model == EXPERTS else 'dense'}"
        words = [self.config]
        if self.expert_parallel_size > 1:
            words.append(f"experts over {self.expert_parallel_size} ranks")
        if self.interrupted:
            words.append("interrupted and resumed")
        return ", ".join([*words, "bf16" if self.bf16 else "fp32"])

    @property
    def tolerance(self) -> Tolerance:
        """Against the reference in fp32."""
        if self.bf16:
            return BF16
        return FP32 if self.model == DENSE else FP32_EXPERTS

    @property
    def parts(self) -> int:
        """Launches, one after the other."""
        return 2 if self.interrupted else 1

    def reference(self) -> "Run":
        """The run that this one is compared with."""
        return reference(self.model)

    def ranks(self, world_size: int) -> int:
        """Processes."""
        return 1 if self.is_reference else world_size

    def flags(self, work: Path, world_size: int, part: int) -> list[str]:
        """The recipe's."""
        data = {"made-up": {"path": str(work / "data" / ROWS), "weight": 1}}
        rows = ROWS_PER_RANK * world_size
        # The reference takes the same rows in fewer, larger pieces.
        batch = ROWS_PER_RANK * math.gcd(world_size, 16) if self.is_reference else ROWS_PER_RANK / 2
        flags = {
            "model": self.model,
            "model_overrides": json.dumps(OVERRIDES[self.model]),
            "tokenizer": str(work / "data" / TOKENIZER),
            "quickstart_data": "false",
            "data": json.dumps(data),
            "output_dir": str(work / self.name),
            "seq_len": SEQ_LEN,
            "global_batch_tokens": rows * SEQ_LEN,
            "per_device_train_batch_size": int(batch),
            "max_steps": STEPS,
            "warmup_steps": 1,
            "learning_rate": 3e-3,
            # At 1e-8, AdamW would make whole steps out of gradients that are rounding.
            "adam_epsilon": 1e-4,
            "expert_bias_update_speed": 0.01,
            "balance_loss_weight": 0.01,
            "expert_parallel_size": self.expert_parallel_size,
            "bf16": str(self.bf16).lower(),
            "logging_steps": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "sample_prompts": "[]",
            "report_to": "none",
            "ddp_timeout": STUCK_SECONDS,
        }
        if self.interrupted and part == 0:
            flags["stop_at_step"] = STOP_AT
        if self.is_reference:
            flags["deepspeed"] = "none"
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def reference(model: str) -> Run:
    """One plain process."""
    return Run("single", model, is_reference=True)


def plan_runs(world_size: int, *, gpu: bool) -> list[Run]:
    """What can run on so many ranks, the most used first; a reference stands before its runs."""
    runs = [reference(DENSE), Run("zero1"), Run("zero2"), Run("zero3")]
    runs += [Run("zero2", interrupted=True)]
    if world_size % 2 == 0:
        runs += [reference(EXPERTS)]
        runs += [Run(f"zero{stage}", EXPERTS, expert_parallel_size=2) for stage in (1, 2, 3)]
    if world_size > 1:
        runs += [Run("ddp")]
    runs += [Run("zero0")]
    if gpu:  # ZeRO-0 refuses bf16
        runs += [Run(f"zero{stage}", bf16=True) for stage in (1, 2, 3)]
        runs += [Run("ddp", bf16=True)] if world_size > 1 else []
    return runs


def absent_rows(world_size: int, *, gpu: bool) -> list[Row]:
    """What :func:`plan_runs` left out, and why."""
    rows = []
    if world_size == 1:
        rows.append(Row("ddp", "skipped", "", "needs at least 2 ranks"))
    if world_size % 2:
        rows.append(
            Row("experts over 2 ranks", "skipped", "", f"{world_size} rank(s) make no pairs")
        )
    if not gpu:
        rows.append(Row("bf16", "skipped", "", "is verified on GPUs only"))
    return rows


# ---------------------------------------------------------------- data


def build_data(folder: Path) -> None:
    """A tokenizer and packed rows of made-up text, byte for byte the same on every node.

    ``folder`` appears complete or not at all, so that nodes which share it may all build it. Raises
    RuntimeError with a tool's own words.
    """
    if folder.exists():
        return
    own = folder.with_name(f".{folder.name}-{os.uname().nodename}-{os.getpid()}")
    text, tokenizer = str(own / "text.jsonl"), str(own / TOKENIZER)
    write_text(own / "text.jsonl")
    tokenizer_flags = ["--output_dir", tokenizer, "--vocab_size", str(VOCAB_SIZE)]
    _run_tool("train_tokenizer.py", "--input", text, *tokenizer_flags)
    row_flags = ["--output_dir", str(own / ROWS), "--seq_len", str(SEQ_LEN)]
    row_flags += ["--tokenizer", tokenizer, "--validation_fraction", "0", "--num_proc", "1"]
    _run_tool("prepare_pretrain.py", "--input", text, *row_flags)
    try:
        own.rename(folder)
    except OSError:
        if not folder.exists():  # else another node was faster
            raise
        shutil.rmtree(own)


def _run_tool(name: str, *flags: str) -> None:
    command = [sys.executable, f"data_tools/{name}", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")


def write_text(path: Path) -> None:
    """Documents of made-up words, as lines of the instruction format that the tool reads."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeilnorst", k=draw.randint(2, 6))) for _ in range(60)]
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(DOCUMENTS):
            text = " ".join(draw.choices(words, k=draw.randint(1, 40))) + "."
            record = {"id": number, "instruction": "", "input": words[number % 60], "output": text}
            file.write(json.dumps({**record, "history": []}) + "\n")


# ---------------------------------------------------------------- comparison


def compare(run: Run, work: Path, world_size: int) -> Row:
    """The row of a run that ended well, against its reference in ``work``."""
    try:
        ran = json.loads((work / run.name / "run.json").read_text())
        ours, theirs = (read_metrics(work / name) for name in (run.name, run.reference().name))
    except OSError as error:
        return Row(run.check, "FAIL", "", f"left no result: {error}")
    expected = {
        "world_size": run.ranks(world_size),
        "zero_stage": int(run.config[4]) if run.config.startswith("zero") else None,
        "expert_parallel_size": run.expert_parallel_size,
    }
    wrong = [f"{name} {ran[name]}" for name, value in expected.items() if ran[name] != value]
    if wrong:
        return Row(run.check, "FAIL", "", f"another engine ran: {', '.join(wrong)}")
    if run.is_reference:
        text = f"one process without an engine, {STEPS} steps, loss {ours[-1]['train/loss']:.4f}"
        return Row(run.check, "ok", "", text)
    return compare_metrics(run, ours, theirs)


def compare_metrics(
    run: Run, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> Row:
    """By loss and gradient norm of every step."""
    steps = [step["step"] for step in ours]
    if steps != list(range(1, STEPS + 1)):
        return Row(run.check, "FAIL", "", f"logged steps {steps}, not 1 to {STEPS}")
    differences = {
        "loss": largest_difference(ours, theirs, "train/loss"),
        "norm": largest_difference(ours, theirs, "train/grad_norm"),
    }
    limits = {"loss": run.tolerance.loss, "norm": run.tolerance.norm}
    figure = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    beyond = [name for name, value in differences.items() if not value <= limits[name]]
    limit = f"loss {limits['loss']:.0e}, norm {limits['norm']:.0e}"
    if beyond:
        text = f"trains otherwise than one process: {' and '.join(beyond)} beyond the limit {limit}"
        return Row(run.check, "FAIL", figure, text)
    resumed = f", with a resume at step {STOP_AT}" if run.interrupted else ""
    return Row(run.check, "ok", figure, f"as one process{resumed} (limit {limit})")


def largest_difference(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], key: str
) -> float:
    """Relative, over all steps; nan if a value is none."""
    pairs = [(one[key], other[key]) for one, other in zip(ours, theirs, strict=True)]
    relative = [abs(one - other) / abs(other) for one, other in pairs]
    return math.nan if any(math.isnan(value) for value in relative) else max(relative)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
