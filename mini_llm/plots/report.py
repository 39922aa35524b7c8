"""The report of a run, and the comparison of several: pages that stand by themselves."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mini_llm.evaluate.results import (
    FOLDER,
    PICTURE,
    bucket_table,
    held_out_table,
    read_results,
    results_folder,
    tasks_table,
)
from mini_llm.training.checkpoint_files import step_of

from . import page
from .curves import COMPARED_TOKENS, PICTURES
from .experts import BALANCE, HEAT_MAPS
from .runs import CONFIG, SAMPLES, Run, keys_like, read_mapping, read_run, values
from .style import PLOTS

REPORT, COMPARISON = "report.html", "comparison.html"
MADE = "Drawn by python -m mini_llm.plots from the run folder alone."

# (file, title, caption) in the order of the page.
PACKED_ROWS = (
    ("packing", "What the packed rows hold", "The first rows that the run trained on."),
    ("attention_mask", "Attention in a packed row", "Conversations do not see each other."),
)
SHOWN = (
    *((item.name, item.title, item.caption) for item in PICTURES),
    (COMPARED_TOKENS.name, COMPARED_TOKENS.title, COMPARED_TOKENS.caption),
    (BALANCE.name, BALANCE.title, BALANCE.caption),
    *((item.name, item.title, item.caption) for item in HEAT_MAPS),
    *PACKED_ROWS,
)

ARCHITECTURE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "intermediate_size": "feed-forward size",
    "n_routed_experts": "routed experts per layer",
    "num_experts": "routed experts per layer",
    "num_experts_per_tok": "experts per token",
    "num_nextn_predict_layers": "multi-token-prediction layers",
    "vocab_size": "vocabulary",
    "tie_word_embeddings": "tied embeddings",
}
HYPERPARAMETERS = (
    *("max_steps", "global_batch_tokens", "seq_len", "per_device_train_batch_size"),
    *("num_train_epochs", "packing", "learning_rate", "lr_scheduler_type", "min_lr_ratio"),
    *("warmup_steps", "decay_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "gradient_checkpointing", "torch_compile", "attn_implementation"),
    "seed",
)
OF_EXPERTS = ("expert_bias_update_speed", "balance_loss_weight")
OF_MTP = ("mtp_loss_weight", "mtp_loss_final_weight")

LOWER, HIGHER = min, max  # which value of a metric is the best
# Metric -> name, which is best (None: no value is better than another), format.
RESULTS: tuple[tuple[str, str, Any, str], ...] = (
    ("train/loss", "training loss (nats per token)", LOWER, ".4f"),
    ("eval/*/loss", "held-out loss, * (nats per token)", LOWER, ".4f"),
    ("eval/*/bits_per_byte", "held-out bits per byte, *", LOWER, ".4f"),
    ("train/mtp_loss", "multi-token-prediction loss (nats per token)", LOWER, ".4f"),
    ("train/balance_loss", "load-balance loss", LOWER, ".4f"),
    ("train/grad_norm", "gradient norm", None, ".3f"),
    ("samples/stopped", "share of answers that stopped by themselves", HIGHER, ".2f"),
    ("perf/tokens_per_second", "tokens per second", HIGHER, ",.0f"),
    ("perf/mfu", "model FLOP/s utilisation", HIGHER, ".1%"),
    ("moe/dead_experts", "dead experts", LOWER, ".0f"),
    ("train/bad_steps", "bad steps so far", None, ".0f"),
    ("train/epoch", "passes over the data", None, ".2f"),
)


def write_report(folder: Path) -> Path:
    """Write RUN/report.html of a run folder, with the plots that lie in RUN/plots; return it.

    Raises PlotError where ``folder`` is no run folder.
    """
    return report(read_run(folder))


def report(run: Run) -> Path:
    """Write the report of a run that was read: see :func:`write_report`."""
    config = run.folder / CONFIG
    sections: list[tuple[str, Sequence[str]]] = [
        ("Results", [results(run)]),
        ("Plots", [page.gallery(pictures(list((run.folder / PLOTS).glob("*.png"))))]),
        ("Evaluation", evaluation(run)),
        ("Samples", samples(run.folder / SAMPLES)),
        ("Model", [page.facts(model_facts(run))]),
        ("Data", [data_table(run)]),
        (
            "Hyperparameters",
            [
                page.facts(hyperparameters(run)),
                page.folded("All arguments (config.yaml)", page.block(config.read_text()))
                if run.config
                else "",
            ],
        ),
        ("Engine", [page.facts(engine_facts(run)), bytes_table(run)]),
        ("How to load it", how_to_load(run)),
    ]
    content = page.page(f"Run {run.name}", summary(run), sections, MADE)
    return page.write_page(run.folder / REPORT, content)


def last_value(run: Run, key: str) -> Any:
    """The value of ``key`` logged last that is not null, or None."""
    return next((m[key] for m in reversed(run.steps) if m.get(key) is not None), None)


def is_fine_tuned(run: Run) -> bool:
    """Whether recipes/sft.py trained it: an argument of that recipe alone says so."""
    return "packing" in run.config


def model_name(run: Run) -> str:
    """The preset or checkpoint that was trained, or an empty text."""
    return str(run.config.get("model") or run.facts.get("identity", {}).get("model") or "")


def parameters(run: Run) -> str:
    """Parameters in words, as far as run.json has them."""
    counts = run.facts.get("parameters")
    if not counts:
        return ""
    words = f"{counts['total']:,}"
    if counts["active"] != counts["total"]:
        words += f" ({counts['active']:,} active"
        words += f", {counts['mtp']:,} of multi-token prediction)" if counts["mtp"] else ")"
    return words


def progress(run: Run) -> str:
    """Steps done, of those that the run is to have."""
    done, most = run.steps[-1]["step"], run.config.get("max_steps")
    return f"{done:,} of {most:,}" if isinstance(most, int) else f"{done:,}"


def summary(run: Run) -> str:
    """What happened, in one paragraph."""
    count = parameters(run)
    what = f"{model_name(run) or 'A model'}{f', {count} parameters' if count else ''}"
    how = "fine-tuned" if is_fine_tuned(run) else "trained"
    tokens = last_value(run, "train/tokens")
    on = f" on {int(tokens):,} tokens" if tokens is not None else ""
    sentences = [f"{what}, {how} for {progress(run)} optimizer steps{on}."]
    for key, source in keys_like(run.steps, "eval/*/loss").items():
        loss, bits = last_value(run, key), last_value(run, f"eval/{source}/bits_per_byte")
        if loss is not None:
            per_byte = f", {bits:.3f} bits per byte" if bits is not None else ""
            sentences.append(f"Held-out {source}: {loss:.4f} nats per token{per_byte}.")
    return " ".join(sentences)


def results(run: Run) -> str:
    """Last and best value of each metric, with their steps."""
    rows: list[list[object]] = []
    for pattern, name, best_of, shown in RESULTS:
        for key, source in keys_like(run.steps, pattern).items():
            logged = [(m["step"], m[key]) for m in run.steps if m.get(key) is not None]
            if not logged:
                continue
            step, value = logged[-1]
            row: list[object] = [name.replace("*", source), format(value, shown), f"{step:,}"]
            if best_of is None:
                rows.append([*row, None, None, None])
                continue
            best = best_of(number for _, number in logged)
            at = next(step for step, number in logged if number == best)
            median = statistics.median(number for _, number in logged)
            middle = format(median, shown) if key.startswith("perf/") else None
            rows.append([*row, format(best, shown), f"{at:,}", middle])
    return page.table(["", "last", "at step", "best", "at step", "median"], rows) if rows else ""


def evaluation(run: Run) -> list[str]:
    """What `launch.sh evaluate` found: of ``final/``, else of the newest checkpoint it was run on.

    A results.json that cannot be read is said to be one.
    """
    steps = [number for p in (run.folder / FOLDER).glob("step-*") if (number := step_of(p)) >= 0]
    try:
        found = None
        for step in (None, *sorted(steps, reverse=True)):
            if found := read_results(run.folder, step):
                break
    except ValueError as error:
        return [page.paragraph(str(error))]
    if found is None:
        return []
    of_step = "" if found["step"] is None else f" at step {found['step']:,}"
    parts = [page.paragraph(f"{found['checkpoint']}{of_step}, {found['date']}.")]
    if found["held_out"]:
        parts.append(page.table(*held_out_table(found)))
        drawn = results_folder(run.folder, step) / PICTURE
        if drawn.is_file():
            caption = "Only documents as the model saw them: long ones are cut to rows."
            parts.append(page.picture(drawn, "Perplexity by document length", caption))
    for name, source in found["held_out"].items():
        table = page.table(*bucket_table(source["by_length"], "document length"))
        parts.append(page.folded(f"{name} by tokens of the document", table))
    if found["tasks"]:
        parts.append(page.table(*tasks_table(found)))
    return [*parts, *(page.paragraph(sentence) for sentence in found["left_out"])]


def model_facts(run: Run) -> list[tuple[str, object]]:
    """What was trained: name, origin, size, and the fields of its config that matter."""
    origin = None
    if is_fine_tuned(run):
        origin = "fine-tuned from it on conversations"
    overrides = run.config.get("model_overrides")
    config = model_config(run.folder)
    return [
        ("model", model_name(run)),
        ("training", origin),
        ("changed fields", json.dumps(overrides, ensure_ascii=False) if overrides else None),
        ("architecture", ", ".join(config.get("architectures") or [])),
        ("parameters", parameters(run)),
        *((name, in_words(config.get(key))) for key, name in ARCHITECTURE.items()),
        ("tokenizer", run.config.get("tokenizer")),
    ]


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of the final model, else of the newest checkpoint; {} where there is none."""
    saved = sorted(
        folder.glob("checkpoints/step-*/model/config.json"),
        key=lambda path: int(re.sub(r"\D", "", path.parent.parent.name) or 0),
    )
    candidates = [folder / "final" / "config.json", *reversed(saved)]
    found = next((path for path in candidates if path.is_file()), None)
    return read_mapping(found) if found else {}


def in_words(value: Any) -> Any:
    """A value of a config as a reader writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else value


def as_flag(value: Any) -> Any:
    """A value as a recipe's flag takes it."""
    return str(value).lower() if isinstance(value, bool) else value


def data_table(run: Run) -> str:
    """By source: weight, trained tokens and their share, what its manifest says, rejects."""
    sources = run.config.get("data") or {}
    names = list(dict.fromkeys([*sources, *keys_like(run.steps, "data/*/tokens").values()]))
    trained = {name: last_value(run, f"data/{name}/tokens") for name in names}
    total = sum(count or 0 for count in trained.values())
    rows = []
    for name in names:
        path = (sources.get(name) or {}).get("path")
        splits = manifest_splits(path)
        train, held_out = splits.get("train", {}), splits.get("validation", {})
        prepared, tokens = train.get("tokens"), trained[name]
        origins = train.get("documents_per_source") or train.get("conversations_per_kind") or {}
        rejected = last_value(run, f"data/{name}/rejected")
        rows.append(
            [
                name,
                ", ".join(path) if isinstance(path, list) else path,
                (sources.get(name) or {}).get("weight"),
                None if tokens is None else f"{int(tokens):,}",
                None if tokens is None or not total else f"{100 * tokens / total:.1f}%",
                None if prepared is None else f"{prepared:,}",
                None if not prepared or tokens is None else f"{tokens / prepared:.2f}",
                None if not held_out else f"{held_out['tokens']:,}",
                ", ".join(f"{origin} {count:,}" for origin, count in origins.items()),
                None if rejected is None else f"{int(rejected):,}",
            ]
        )
    head = ["source", "path", "weight", "trained tokens", "share", "prepared tokens", "passes"]
    head += ["prepared held-out tokens", "documents or conversations", "rejected rows"]
    return page.table(head, rows) if rows else ""


def manifest_splits(path: Any) -> dict[str, Any]:
    """The splits of a prepared folder's manifest; {} for raw text, and where it is out of reach."""
    if not isinstance(path, str) or not (Path(path) / "manifest.json").is_file():
        return {}
    splits: dict[str, Any] = read_mapping(Path(path) / "manifest.json").get("splits", {})
    return splits


def hyperparameters(run: Run) -> list[tuple[str, object]]:
    """The arguments that decide what was learnt, under their flags' names."""
    keys = list(HYPERPARAMETERS)
    keys += OF_EXPERTS if keys_like(run.steps, "moe/*") else ()
    keys += OF_MTP if keys_like(run.steps, "train/mtp_loss") else ()
    rows = [(key, as_flag(run.config.get(key))) for key in keys]
    accumulated = run.facts.get("gradient_accumulation_steps")
    return [*rows, ("micro-batches per step and rank", accumulated)] if run.config else []


def engine_facts(run: Run) -> list[tuple[str, object]]:
    """What really ran, from run.json."""
    if not run.facts:
        return []
    facts = run.facts
    hosts = facts.get("hosts")
    size, groups = facts.get("expert_parallel_size"), facts.get("expert_groups")
    spread = f"groups of {size} ranks" if size and size > 1 else "each rank has all"
    if size and size > 1 and groups:
        spread += ": " + ", ".join(str(group) for group in groups)
    offloaded = [f"{what} to {to}" for what, to in (facts.get("offload") or {}).items() if to]
    return [
        ("engine", facts.get("distributed_type")),
        ("ZeRO stage", facts.get("zero_stage")),
        ("offload", ", ".join(offloaded)),
        ("ranks", facts.get("world_size")),
        ("hosts", len(set(hosts)) if hosts else None),
        ("experts", spread if keys_like(run.steps, "moe/*") else None),
        ("device", facts.get("device")),
        ("collectives", facts.get("backend")),
        *((f"kernel: {what}", name) for what, name in (facts.get("kernels") or {}).items()),
        ("versions", ", ".join(f"{n} {v}" for n, v in (facts.get("versions") or {}).items())),
        ("data fingerprint", str(facts.get("data_fingerprint") or "")[:12]),
    ]


def bytes_table(run: Run) -> str:
    """Measured bytes that the ranks hold after the first step, in MiB."""

    def mebibytes(count: float) -> str:
        return f"{count / 2**20:,.1f}"

    held: dict[str, list[int]] = run.facts.get("bytes_per_rank") or {}
    rows = [
        [kind.replace("_", " "), *(mebibytes(n) for n in (min(ranks), max(ranks), sum(ranks)))]
        for kind, ranks in held.items()
        if ranks
    ]
    head = ["MiB held (measured)", "least of a rank", "most of a rank", "all ranks"]
    return page.table(head, rows) if rows else ""


def pictures(drawn: Sequence[Path]) -> list[str]:
    """Plots in the order of the page, each with its title and caption."""
    files = {path.stem: path for path in drawn}
    return [
        page.picture(files[name], title, caption) for name, title, caption in SHOWN if name in files
    ]


def samples(path: Path) -> list[str]:
    """What the model wrote, the last step first."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode(errors="replace")
    pieces = [piece for piece in re.split(r"(?m)^(?==== step \d+:)", text) if piece.strip()]
    if not pieces:
        return []
    before = [page.block(piece) for piece in reversed(pieces[:-1])]
    return [page.block(pieces[-1]), page.folded("Earlier steps", *before) if before else ""]


def how_to_load(run: Run) -> list[str]:
    """Code that loads the result with transformers alone; of an unfinished run, how it goes on."""
    if not (run.folder / "final").is_dir():
        return [page.paragraph("The run has not finished: the command that began it goes on.")]
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {str(run.folder / 'final')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )
    if is_fine_tuned(run):
        code += (
            'question = [{"role": "user", "content": "Hello!"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    question, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
        )
    else:
        code += 'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
    code += (
        "output = model.generate(**inputs, max_new_tokens=64)\n"
        'answer = output[0, inputs["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
    )
    return [
        page.paragraph("final/ is a stock transformers checkpoint: no code of mini-llm is needed."),
        page.block(code),
    ]


def write_comparison(runs: Sequence[Run], folder: Path, drawn: Sequence[Path]) -> Path:
    """Write comparison.html into ``folder``: the runs side by side, and the plots ``drawn``."""
    rows = []
    for run in runs:
        speeds = [v for v in values(run.steps, "perf/tokens_per_second")[1] if v == v]
        tokens = last_value(run, "train/tokens")
        loss = last_value(run, "train/loss")
        held_out = [
            f"{source} {last_value(run, key):.4f}"
            for key, source in keys_like(run.steps, "eval/*/loss").items()
            if last_value(run, key) is not None
        ]
        per_byte = [
            f"{source} {last_value(run, key):.4f}"
            for key, source in keys_like(run.steps, "eval/*/bits_per_byte").items()
            if last_value(run, key) is not None
        ]
        rows.append(
            [
                run.name,
                model_name(run),
                parameters(run),
                progress(run),
                None if tokens is None else f"{int(tokens):,}",
                None if loss is None else f"{loss:.4f}",
                ", ".join(held_out),
                ", ".join(per_byte),
                f"{statistics.median(speeds):,.0f}" if speeds else None,
            ]
        )
    head = ["run", "model", "parameters", "steps", "tokens", "training loss", "held-out loss"]
    head += ["held-out bits per byte", "tokens per second (median)"]
    differing = [
        [key, *("" if run.config.get(key) is None else str(run.config[key]) for run in runs)]
        for key in dict.fromkeys(key for run in runs for key in run.config)
        if any(run.config.get(key) != runs[0].config.get(key) for run in runs)
    ]
    sections: list[tuple[str, Sequence[str]]] = [
        ("Results", [page.table(head, rows)]),
        (
            "Arguments that differ",
            [page.table(["argument", *(run.name for run in runs)], differing) if differing else ""],
        ),
        ("Plots", [page.gallery(pictures(drawn))]),
    ]
    names = ", ".join(run.name for run in runs)
    title = f"{len(runs)} runs compared"
    content = page.page(title, f"Each at its last logged step: {names}.", sections, MADE)
    return page.write_page(folder / COMPARISON, content)
