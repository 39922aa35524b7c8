"""The recipes as a user starts them: tokens a second of pretraining and of packed fine-tuning.

    python -m mini_llm.bench recipes --model mini_llama3 --precision bf16 --rows 32 --seq_len 2048

Each run is `accelerate launch` of a recipe on one process, with its model's own config, on rows
that data_tools/ packed from made-up text, documents of some 290 tokens; fine-tuning starts from
what pretraining left. The figures are what the recipe itself logged once the first steps are over;
that the engine asked for really ran is read from its run.json. The runs follow each other and are
timed by the clock: on a CPU other work disturbs them.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from ..device import choose_device
from ..training.arguments import REPOSITORY
from .measure import (
    device_name,
    machine,
    markdown_table,
    median_and_range,
    run_to_its_end,
    threads,
    without_mtp,
)
from .names import BenchmarkError

LOGGING_STEPS = 10  # as every full-size preset's config has it
WARMUP_STEPS = LOGGING_STEPS  # torch.compile, caches; an interval ends with them
ROWS = 512  # of the data, at least
SHORTEST_ROW = 64  # tokens: the made-up conversations, with their template, must fit
MEAN_DOCUMENT = 290  # tokens; in shorter rows a quarter of one
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Run:
    """One launch: which recipe, of what, under which engine, and for which time."""

    recipe: str  # "pretrain" or "sft"
    model: str  # a preset
    engine: str  # "none" or the name of a file in ds_configs/
    repeat: int = 0

    def name(self, recipe: str | None = None) -> str:
        """What a table calls it, whichever time it is; of another ``recipe`` beside it."""
        return f"{self.model} {recipe or self.recipe}, engine {self.engine}"

    def folder(self, recipe: str | None = None) -> Path:
        """Its output folder in the folder of all; of another ``recipe`` beside it."""
        return Path("runs", str(self.repeat), self.model, self.engine, recipe or self.recipe)


@dataclass(frozen=True)
class Size:
    """What all runs have in common."""

    precision: str
    rows: int  # of a micro-batch
    seq_len: int
    micro_batches: int
    steps: int  # counted ones
    device: str

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.rows * self.micro_batches


def run(
    models: list[str],
    engines: list[str],
    overrides: dict[str, Any],
    *,
    sft: bool,
    precision: str,
    rows: int,
    seq_len: int,
    micro_batches: int,
    steps: int,
    repeats: int,
    device: str,
) -> dict[str, Any]:
    """Launch every model's recipes under every engine; print the table and return the figures.

    A run that fails is named with its last words, and costs the others nothing. Raises ValueError
    for rows too short for a conversation, and RuntimeError where a run is not of the engine asked
    for, or all fail.
    """
    if seq_len < SHORTEST_ROW:
        raise ValueError(f"--seq_len is {seq_len}; it must be at least {SHORTEST_ROW}")
    device = choose_device(device).type
    size = Size(precision, rows, seq_len, micro_batches, steps, device)
    fields = {model: without_mtp(model, overrides) for model in models}
    recipes = ["pretrain", "sft"] if sft else ["pretrain"]
    runs = [
        Run(recipe, model, engine, repeat)
        for repeat in range(repeats)
        for model in models
        for engine in engines
        for recipe in recipes
    ]
    intervals: dict[str, list[dict[str, Any]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, seq_len, max(ROWS, 2 * size.rows_per_step), recipes)
        for number, one in enumerate(runs, 1):
            place = folder / one.folder()
            try:
                launch(one, folder, flags(one, folder, size, fields[one.model]), device)
            except RuntimeError as error:  # no reason to lose what others have shown
                failed[one.name()] = str(error)
                print(f"{number} of {len(runs)}: {error}", file=sys.stderr, flush=True)
                continue
            facts[one.name()] = checked_facts(one, place)
            now = counted(place)
            intervals.setdefault(one.name(), []).extend(now)
            rate = statistics.median(each["perf/tokens_per_second"] for each in now)
            print(f"{number} of {len(runs)}: {one.name()}: {rate:,.0f} tokens/s", flush=True)
    if not intervals:
        raise BenchmarkError(f"every run failed; the first: {next(iter(failed.values()))}")
    figures = {
        name: {**_figures(found, size), "kernels": facts[name]["kernels"]}
        for name, found in intervals.items()
    }
    for one in runs:
        for ratio, other in (
            ("over_first", runs[0].name()),
            ("over_pretraining", one.name("pretrain")),
        ):
            mine, theirs = figures.get(one.name()), figures.get(other)
            if mine is not None:
                mine[ratio] = theirs and mine["tokens_per_second"] / theirs["tokens_per_second"]
    found = {
        **machine(*PACKAGES, threads=threads(device)),
        "device": device_name(choose_device(device)),
        "overrides": overrides,
        "precision": precision,
        "rows": rows,
        "micro_batches": micro_batches,
        "seq_len": seq_len,
        "steps": steps,
        "repeats": repeats,
        "runs": figures,
        "failed": failed,
    }
    print(markdown(found))
    return found


def flags(one: Run, folder: Path, size: Size, overrides: dict[str, Any]) -> list[str]:
    """The recipe's command line: its model's own config, and what makes the runs comparable."""
    own = f"recipes/configs/{one.model.removesuffix('_tiny')}/{one.recipe}.yaml"
    steps = WARMUP_STEPS + size.steps
    values: dict[str, Any] = {
        "config": REPOSITORY / own,
        "output_dir": folder / one.folder(),
        "data": json.dumps({"made_up": {"path": str(folder / one.recipe), "weight": 1}}),
        "seq_len": size.seq_len,
        "max_steps": steps,
        "warmup_steps": 1,
        "global_batch_tokens": size.rows_per_step * size.seq_len,
        "per_device_train_batch_size": size.rows,
        "bf16": str(size.precision == "bf16").lower(),
        "deepspeed": "none" if one.engine == "none" else f"ds_configs/{one.engine}.json",
        "logging_steps": LOGGING_STEPS,
        "eval_steps": 0,
        "save_steps": 0,
        "sample_prompts": "[]",
        "report_to": "none",
    }
    if one.recipe == "pretrain":
        values["model"] = one.model
        values["model_overrides"] = json.dumps(overrides)
        values["tokenizer"] = DEFAULT_TOKENIZER
    else:
        values["model"] = folder / one.folder("pretrain") / "final"
        values["num_train_epochs"] = 0
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def launch(one: Run, folder: Path, words: list[str], device: str) -> None:
    """Start the recipe on one process, and wait; RuntimeError with its last words if it fails."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = threads("cpu")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = folder / f"{one.recipe}.log"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(REPOSITORY / "accelerate_configs/single.yaml")]
    command += [str(REPOSITORY / f"recipes/{one.recipe}.py"), *words]
    if run_to_its_end(command, log=log, environment=environment):
        raise BenchmarkError(f"{one} failed:\n{log.read_text()[-3000:]}")


def checked_facts(one: Run, place: Path) -> dict[str, Any]:
    """run.json; RuntimeError where it tells of another engine than the one asked for."""
    facts: dict[str, Any] = json.loads((place / "run.json").read_text())
    stage = None if one.engine == "none" else int(one.engine.removeprefix("zero")[0])
    found = (facts["recipe"], facts["world_size"], facts["zero_stage"])
    if found != (one.recipe, 1, stage):
        raise BenchmarkError(f"{one} was asked for, and recipe, ranks and ZeRO stage were {found}")
    return facts


def counted(place: Path) -> list[dict[str, Any]]:
    """The logged intervals after the first steps; the last one ends with the run."""
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > WARMUP_STEPS]


def _figures(intervals: list[dict[str, Any]], size: Size) -> dict[str, Any]:
    """Medians over the intervals of all repeats."""

    def values(name: str) -> list[float]:
        return [each[f"perf/{name}"] for each in intervals]

    mfu = values("mfu")
    parts = ("step", "data", "forward", "backward", "optimizer")
    # Pretraining does not log how many: all but each document's first.
    name = "train/supervised_tokens"
    counts = [each[name] for each in intervals if name in each]
    tokens = size.rows_per_step * size.seq_len
    return {
        "intervals": len(intervals),
        "tokens_per_second": statistics.median(values("tokens_per_second")),
        "range": [min(values("tokens_per_second")), max(values("tokens_per_second"))],
        "mfu": None if None in mfu else statistics.median(mfu),
        "supervised": statistics.mean(counts) / tokens if counts else None,
        **{
            f"{part}_milliseconds": [1e3 * seconds for seconds in values(f"{part}_seconds")]
            for part in parts
        },
        "peak_memory_bytes": max(values("peak_memory_bytes")),
    }


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table, with the line that says on what."""
    parts = ("step", "data", "forward", "backward", "optimizer")
    header = ["run", "tokens/s", "÷ the first", "÷ its pretraining", "supervised", "MFU"]
    header += [*(f"{part} ms" for part in parts), "peak MiB"]
    table = []
    for name, of in found["runs"].items():
        low, high = of["range"]
        step, *others = (of[f"{part}_milliseconds"] for part in parts)
        table.append(
            [
                name,
                f"{of['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
                *(
                    "–" if of[ratio] is None else f"{of[ratio]:.3f}"
                    for ratio in ("over_first", "over_pretraining")
                ),
                "–" if of["supervised"] is None else f"{of['supervised']:.1%}",
                "–" if of["mfu"] is None else f"{of['mfu']:.1%}",
                median_and_range(step),
                *(f"{statistics.median(each):.3g}" for each in others),
                f"{of['peak_memory_bytes'] / 2**20:,.0f}",
            ]
        )
    kernels: dict[str, list[str]] = {}
    for name, of in found["runs"].items():
        parts_of_it = ", ".join(f"{part} {kernel}" for part, kernel in of["kernels"].items())
        kernels.setdefault(parts_of_it, []).append(name)
    memory = "of the process" if found["device"] == "cpu" else "of tensors on the GPU"
    return (
        f"The recipes on one process ({found['device']}) in {found['precision']}, "
        f"{found['overrides'] or 'their presets'}, without multi-token prediction: "
        f"{found['micro_batches']} × {found['rows']} packed rows of {found['seq_len']} tokens a "
        f"step; medians (minimum to maximum) of the logged intervals of {LOGGING_STEPS} of the "
        f"{found['steps']} steps after the first {WARMUP_STEPS}, {found['repeats']} run(s) of "
        f"each; by the clock; peak memory {memory}.\n\n"
        + markdown_table(header, table)
        + "".join(f"\n\n{'; '.join(names)}: {text}." for text, names in kernels.items())
        + "".join(f"\n\n{name} failed." for name in found["failed"])
    )


def write_data(folder: Path, seq_len: int, rows: int, recipes: list[str]) -> None:
    """Pack `rows` rows of made-up text to `folder`/pretrain, and of conversations to `folder`/sft.

    By the tools that a user runs, with the project's tokenizer.
    """
    text_of = Text(random.Random(0))
    mean = min(MEAN_DOCUMENT, seq_len // 4)
    documents = rows * seq_len // mean
    common = ["--tokenizer", DEFAULT_TOKENIZER, "--seq_len", seq_len, "--num_proc", 1]
    text = folder / "text.parquet"
    table = pa.table({"text": [text_of(1, 2 * mean) for _ in range(documents)]})
    table = table.append_column("score", pa.array([0.8] * documents))
    pq.write_table(table.append_column("source", pa.array(["made up"] * documents)), text)
    _tool("prepare_pretrain.py", "--input", text, "--output_dir", folder / "pretrain", *common)
    if "sft" not in recipes:
        return
    conversations = folder / "conversations.jsonl"
    with conversations.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            said = [("user", text_of(1, mean * 2 // 3)), ("assistant", text_of(1, mean))]
            messages = [{"role": role, "content": content} for role, content in said]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    everything = ["--single_turn", documents, "--self_awareness", 0]
    place = ["--input", conversations, "--output_dir", folder / "sft"]
    _tool("prepare_sft.py", *place, *everything, *common)


class Text:
    """Made-up text: words of the tokenizer's vocabulary, each with the space before it."""

    def __init__(self, draw: random.Random) -> None:
        tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
        decoded = (tokenizer.decode([token]) for token in range(len(tokenizer)))
        self._words = [word for word in decoded if word[:1] == " " and word[1:].isalpha()]
        self._draw = draw

    def __call__(self, fewest: int, most: int) -> str:
        """So many words, about as many tokens."""
        length = self._draw.randint(fewest, max(fewest, most))
        return "".join(self._draw.choices(self._words, k=length)).strip()


def _tool(name: str, *words: Any) -> None:
    """Run a tool of data_tools/; RuntimeError with its last words where it fails."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "data_tools" / name), *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
