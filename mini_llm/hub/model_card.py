"""The model card: facts that a run left in its folder, nothing else."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mini_llm.durable import write_whole
from mini_llm.evaluate.results import (
    as_markdown,
    bucket_table,
    held_out_table,
    read_results,
    tasks_table,
)
from mini_llm.training.arguments import PretrainArguments, RunArguments, SftArguments

PICTURE = "loss.png"
SAMPLE_CHARACTERS = 4000
UNKNOWN_LICENSE = "unknown"  # the hub's own word for it

RECIPES: dict[str, type[RunArguments]] = {"pretrain": PretrainArguments, "sft": SftArguments}
# config.json's field -> how a reader calls it; a model has those that its config has.
CONFIG_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "n_routed_experts": "routed experts a layer",
    "num_experts": "routed experts a layer",
    "n_shared_experts": "shared experts a layer",
    "num_experts_per_tok": "routed experts a token",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest input (tokens)",
    "tie_word_embeddings": "tied embeddings",
}

CARD = """---
{metadata}---

# {name}

{origin}

## Use

The checkpoint is a stock transformers one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
{example}```

## Model

{model}

## Training data

{data}

## Training

{training}
{picture}{evaluation}{samples}
## Limits

It is a small model that saw {tokens:,} tokens: what it writes may be wrong, biased or without
sense. Nobody has tested it for safety, and nothing in its training aimed at it.

## Licence

{licence}
"""

PRETRAINED = "A `{model}` ({architecture}) of {size}, pretrained with mini-llm for {steps:,} steps."
FINE_TUNED = (
    "A chat model ({architecture}) of {size}, fine-tuned from `{model}` with mini-llm for "
    "{steps:,} steps."
)
COMPLETE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(inputs["input_ids"], max_new_tokens=256)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
CHAT = """\
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=256)
answer = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def write_card(
    folder: Path,
    run: Path,
    *,
    step: int | None = None,
    tokens: Mapping[str, int] | None = None,
    picture: Path | None = None,
    repo_id: str | None = None,
    without_mtp: bool = False,
    license: str = "",
    language: str = "",
) -> None:
    """Write README.md of the stock checkpoint in ``folder`` from the files of its run.

    ``step``: the weights are those of that optimizer step (None: of the run's last), trained on
    ``tokens`` by source (None: those last logged, for a step that is saved need not be logged).
    ``picture`` is copied beside it and shown. ``repo_id`` is where it will be loaded from.
    ``license`` and ``language`` replace those of the run. Raises ValueError, naming the file, where
    the run's folder does not say what a card needs.
    """
    facts = _read_run(run)
    args: RunArguments = facts["args"]
    config = json.loads((folder / "config.json").read_text())
    steps = [line for line in facts["metrics"] if step is None or line["step"] <= step]
    progress = {key: value for line in steps for key, value in line.items()}  # newest of each
    if step is not None:
        progress["step"] = step
    if tokens is not None:
        progress["train/tokens"] = sum(tokens.values())
        progress |= {f"data/{name}/tokens": count for name, count in tokens.items()}
    seen = int(progress.get("train/tokens") or 0)
    parameters = dict(facts["parameters"])
    if without_mtp:
        parameters["total"] -= parameters["mtp"]
        parameters["mtp"] = 0
    chat = facts["recipe"] == "sft"
    text = CARD.format(
        metadata=_metadata(
            facts, config, chat, license or args.hub_license, language or args.hub_language
        ),
        name=Path(repo_id or args.run_name or args.output_dir).name,
        origin=(FINE_TUNED if chat else PRETRAINED).format(
            model=_short_name(args.model),
            architecture=config["architectures"][0],
            size=_size(parameters),
            steps=progress.get("step", 0),
        ),
        where=repo_id or "path/to/this/folder",
        example=CHAT if chat else COMPLETE,
        model=_table(_model_rows(config, parameters)),
        data=_data_table(args, progress),
        training=_table(_training_rows(args, facts, progress)),
        picture=f"\n![loss over optimizer steps]({PICTURE})\n" if picture else "",
        evaluation=_evaluation(steps, progress) + _benchmarks(run, step, progress.get("step")),
        samples=_samples(run, step),
        tokens=seen,
        licence=_licence(license or args.hub_license, chat),
    )
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    write_whole(folder / "README.md", text)


def from_hub(args: RunArguments) -> dict[str, Any]:
    """The hub ids among a run's ``model`` and data sets, to be asked where the run runs.

    Elsewhere a relative path, such as data/packed, looks like an id.
    """
    found = []
    for source in args.data.values():
        paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
        for path in map(str, paths):
            in_hub = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", path)
            if in_hub:
                found.append(in_hub[1])
            elif _is_hub_id(path):
                found.append(path)
    model = args.model if _is_hub_id(args.model) else None
    return {"model": model, "datasets": sorted(set(found))}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _read_run(run: Path) -> dict[str, Any]:
    """The facts of run.json with ``args`` (config.yaml) and ``metrics`` (metrics.jsonl) added."""
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    missing = [key for key in ("recipe", "parameters", "from_hub") if key not in facts]
    if missing:
        raise ValueError(
            f"{run / 'run.json'} says nothing of {missing[0]}: an earlier version of mini-llm "
            "wrote it; copy final/ out of the run's folder and give the copy, whose README.md stays"
        )
    settings = yaml.safe_load((run / "config.yaml").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics = [json.loads(line) for line in lines if line.endswith("\n")]  # one is being written
    return facts | {"args": RECIPES[facts["recipe"]](**settings), "metrics": metrics}


def _metadata(
    facts: dict[str, Any], config: dict[str, Any], chat: bool, license: str, language: str
) -> str:
    """The front matter that the hub reads."""
    fields: dict[str, Any] = {"license": license}
    languages = [code.strip() for code in language.split(",") if code.strip()]
    if languages:
        fields["language"] = languages
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = ["mini-llm", config["model_type"], "conversational" if chat else "pretraining"]
    if facts["from_hub"]["datasets"]:
        fields["datasets"] = facts["from_hub"]["datasets"]
    if facts["from_hub"]["model"]:
        fields["base_model"] = facts["from_hub"]["model"]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _short_name(model: str) -> str:
    """A preset or hub id as it is; of a path the end, for the rest is its owner's business."""
    return "/".join(Path(model).parts[-2:])


def _size(parameters: dict[str, int]) -> str:
    if parameters["active"] == parameters["total"]:
        return f"{parameters['total']:,} parameters"
    return f"{parameters['total']:,} parameters ({parameters['active']:,} active)"


def _model_rows(config: dict[str, Any], parameters: dict[str, int]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("architecture", config["architectures"][0])]
    rows += [("parameters", parameters["total"])]
    if parameters["active"] != parameters["total"]:
        rows += [("active parameters a token", parameters["active"])]
    if parameters["mtp"]:
        rows += [("of them for multi-token prediction", parameters["mtp"])]
    fields = ((name, config.get(field)) for field, name in CONFIG_FIELDS.items())
    return rows + [(name, value) for name, value in fields if value is not None]


def _data_table(args: RunArguments, progress: dict[str, Any]) -> str:
    weights = {name: float(source.get("weight", 1)) for name, source in args.data.items()}
    rows = [
        (
            name,
            f"{weight / sum(weights.values()):.1%}",
            int(progress.get(f"data/{name}/tokens") or 0),
        )
        for name, weight in weights.items()
    ]
    return _table(rows, head=("source", "share of the rows", "tokens seen"))


def _training_rows(
    args: RunArguments, facts: dict[str, Any], progress: dict[str, Any]
) -> list[tuple[str, Any]]:
    zero = facts["zero_stage"]
    engine = facts["distributed_type"] if zero is None else f"DeepSpeed ZeRO-{zero}"
    rows: list[tuple[str, Any]] = [
        ("optimizer steps", progress.get("step", 0)),
        ("… of the schedule", args.max_steps),
        ("tokens seen", int(progress.get("train/tokens") or 0)),
        ("tokens a step", args.global_batch_tokens),
        ("sequence length", args.seq_len),
        ("optimizer", f"AdamW (β {args.adam_beta1}, {args.adam_beta2}; ε {args.adam_epsilon})"),
        ("peak learning rate", args.learning_rate),
        ("schedule", args.lr_scheduler_type),
        ("warmup steps", args.warmup),
        *([("decay steps", args.decay)] if args.lr_scheduler_type == "wsd" else []),
        ("learning rate at the end", f"{args.min_lr_ratio} of the peak"),
        ("weight decay", args.weight_decay),
        ("gradient clipping", args.max_grad_norm),
        ("precision", "bfloat16, fp32 master weights" if args.bf16 else "fp32"),
        ("seed", args.seed),
        ("engine", f"{engine} on {facts['world_size']} rank(s), {facts['device'].split(':')[0]}"),
    ]
    if facts["expert_parallel_size"] > 1:
        rows.append(("ranks that share a layer's experts", facts["expert_parallel_size"]))
    versions = facts["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return [*rows, ("versions", packages)]


def _evaluation(steps: list[dict[str, Any]], progress: dict[str, Any]) -> str:
    """The last evaluation up to the step of the weights, and its step if that is another."""
    keys = [key for key in progress if key.startswith("eval/") and key.endswith("/loss")]
    names = [key.removeprefix("eval/").removesuffix("/loss") for key in keys]
    if not names:
        return ""

    def shown(key: str) -> str:  # metrics.jsonl has null for what is not finite
        return "not finite" if progress[key] is None else f"{progress[key]:.4f}"

    rows = [
        (name, shown(f"eval/{name}/loss"), shown(f"eval/{name}/bits_per_byte")) for name in names
    ]
    table = _table(rows, head=("held-out part of", "loss (nats a token)", "bits per byte"))
    measured = max(line["step"] for line in steps if not line.keys().isdisjoint(keys))
    at_step = f"\nMeasured at step {measured:,}.\n" if measured != progress["step"] else ""
    return f"\n## Evaluation\n\n{table}\n{at_step}"


def _benchmarks(run: Path, step: int | None, last_step: int | None) -> str:
    """What `launch.sh evaluate` found for these very weights; "" where it was not run on them.

    A results.json that cannot be read is said to be one: a run must not fail to save for it.
    """
    try:
        found = read_results(run, step)
    except ValueError as error:
        print(f"the model card has no benchmarks: {error}", flush=True)
        return ""
    if found is None or found["step"] != last_step:
        return ""
    parts = []
    if found["held_out"]:
        parts.append(f"Measured with `launch.sh evaluate`:\n\n{as_markdown(held_out_table(found))}")
    for name, source in found["held_out"].items():
        table = as_markdown(bucket_table(source["by_length"], "document length (tokens)"))
        parts.append(f"By document length, {name}:\n\n{table}")
    if found["tasks"]:
        asked = ", asked through the chat template" if found["apply_chat_template"] else ""
        if found["limit"]:
            asked += f", the first {found['limit']:,} questions of each"
        table = as_markdown(tasks_table(found))
        version = found["versions"]["lm_eval"]
        parts.append(f"Tasks of lm-eval {version}{asked}:\n\n{table}")
    text = "\n\n".join(parts)
    return f"\n## Benchmarks\n\n{text}\n" if text else ""


def _samples(run: Path, step: int | None) -> str:
    """What the model wrote, in a fence that no text can close; "" where nothing is known."""
    path = run / "samples.txt"
    if not path.is_file():
        return ""
    text = path.read_bytes().decode(errors="replace")
    # Of every evaluation: those of the last one up to this step.
    blocks = re.split(r"^(?==== step \d)", text, flags=re.MULTILINE)
    numbered = [(int(found[1]), b) for b in blocks if (found := re.match(r"=== step (\d+)", b))]
    text = next((b for n, b in reversed(numbered) if step is None or n <= step), "")
    if not text:
        return ""
    text = re.sub(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f]", "�", text)
    if len(text) > SAMPLE_CHARACTERS:
        text = f"{text[:SAMPLE_CHARACTERS]} …"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"\n## Samples\n\n{fence}text\n{text.rstrip()}\n{fence}\n"


def _licence(license: str, chat: bool) -> str:
    if license == UNKNOWN_LICENSE:
        return "Whoever trained this model has named no licence for its weights."
    base = " The model that it was fine-tuned from may add conditions of its own." if chat else ""
    return f"The weights are under `{license}`.{base}"


def _table(rows: Iterable[tuple[Any, ...]], head: tuple[str, ...] = ("", "")) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        text = f"{value:,}" if isinstance(value, int) else str(value)
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
