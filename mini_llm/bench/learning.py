"""Learning, not only speed: held-out loss of the recipe, and of the stock class under HF Trainer.

    nice python -m mini_llm.bench learning --keep output/learning

Each pair of trainings has the same shape, rows in the same order, hyperparameters and seed: one is
`accelerate launch recipes/pretrain.py` as a user starts it, the other transformers' class under its
Trainer (``learning_peer.py``), both in fp32 on one CPU thread. Seeds change initial weights and the
order of the rows. One evaluator, the stock class with each held-out document alone in its row,
opens what both have saved.

Multi-token prediction, which the stock class does not have, is a second objective: a model that has
it is also trained by the recipe without, which compares the loops and not the objectives.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.utils.logging import (
    disable_progress_bar,
    get_verbosity,
    set_verbosity,
    set_verbosity_error,
)

from ..data import load_tokenizer, open_validation, token_byte_lengths
from ..data.quickstart import SEQ_LEN, build_quickstart_data
from ..evaluate.held_out import evaluate_held_out
from ..models import empty_model, preset_config
from ..training.arguments import REPOSITORY, PretrainArguments, parse_arguments
from ..training.run_folder import code_version, write_json
from ..training.sizes import count_parameters, training_flops
from .measure import machine, markdown_table, run_to_its_end
from .names import TINY_PRESETS, BenchmarkError

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
CONFIG = "recipes/configs/quickstart/pretrain.yaml"
STEP_TOKENS = 2048
WARMUP_SHARE = 0.1
EVALUATED_ROWS = 16  # at a time
# What a model's own config file sets beside the quickstart's.
OF_THE_MODEL = (
    "expert_bias_update_speed",
    "balance_loss_weight",
    "mtp_loss_weight",
    "mtp_loss_final_weight",
)
WITHOUT_MTP = {"mtp_loss_weight": 0.0, "mtp_loss_final_weight": 0.0}
MIXTURE, DENSE = "mini_deepseekv3_tiny", "mini_llama3_tiny"
MOST_SIZE_DIFFERENCE = 0.02
SHORTEST_STEP = 8  # in which the dense model's intermediate_size is chosen


@dataclass(frozen=True)
class Training:
    """One training: by which loop, of what, from which seed."""

    by: str  # "recipe", "recipe_without_mtp" (its weight is 0) or "trainer"
    model: str  # a preset
    overrides: str  # of its config, JSON
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies in the folder of all."""
        name = self.model if self.overrides == "{}" else f"{self.model}_same_active_size"
        return Path(name, f"seed_{self.seed}", self.by)


def run(models: list[str], steps: int, seeds: list[int], keep: Path | None) -> dict[str, Any]:
    """Train and evaluate all pairs; print the table and return the figures.

    With `keep` that folder holds data and runs, and finished ones are read from there. Raises
    ValueError for `seeds` that cannot be, and for a folder with runs of other settings;
    RuntimeError with its last words where a training fails.
    """
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: give each once, none below 0")
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            return _run(models, steps, seeds, Path(folder))
    return _run(models, steps, seeds, keep.resolve())


def _run(models: list[str], steps: int, seeds: list[int], folder: Path) -> dict[str, Any]:
    _claim(folder, steps)
    build_quickstart_data(folder / "data")
    dense_overrides, sizes = same_active_size(MIXTURE, DENSE)
    dense = json.dumps(dense_overrides)
    trainings = []
    for seed in seeds:
        trainings += [Training(by, model, "{}", seed) for model in models for by in loops(model)]
        if MIXTURE in models:
            trainings.append(Training("recipe", DENSE, dense, seed))
    results = {
        training: _train_and_evaluate(training, folder, steps, f"{i} of {len(trainings)}")
        for i, training in enumerate(trainings, 1)
    }

    def of(by: str, model: str, overrides: str = "{}") -> list[dict[str, Any]]:
        return [results[Training(by, model, overrides, seed)] for seed in seeds]

    def losses(found: list[dict[str, Any]]) -> list[float]:
        return [result["loss"] for result in found]

    figures: dict[str, Any] = {}
    for model in models:
        trained = {by: of(by, model) for by in loops(model)}
        differences = {
            by: paired_difference(losses(ours), losses(trained["trainer"]))
            for by, ours in trained.items()
            if by != "trainer"
        }
        figures[model] = {
            **trained,
            "differences": differences,
            "no_worse": {by: is_no_worse(found) for by, found in differences.items()},
        }
    same_size = None
    if MIXTURE in models:
        mixture, of_dense = of("recipe", MIXTURE), of("recipe", DENSE, dense)
        difference = paired_difference(losses(mixture), losses(of_dense))
        same_size = {
            "overrides": dense_overrides,
            "sizes": sizes,
            MIXTURE: mixture,
            DENSE: of_dense,
            "difference": difference,
            "better": is_better(difference),
        }
    args = _arguments(Training("recipe", models[0], "{}", seeds[0]), folder, steps)
    found = {
        **machine(*PACKAGES, threads="1"),
        "code": sorted({result["code"] for result in results.values()}),
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "seq_len": args.seq_len,
        "seeds": seeds,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup,
        "min_lr_ratio": args.min_lr_ratio,
        "weight_decay": args.weight_decay,
        "vocabulary": len(load_tokenizer(args.tokenizer)),
        "held_out_tokens": next(iter(results.values()))["tokens"],
        "models": figures,
        "same_active_size": same_size,
    }
    print(markdown(found))
    return found


def loops(model: str) -> tuple[str, ...]:
    """By which loops preset `model` is trained: :class:`Training`'s ``by``."""
    if getattr(preset_config(model), "num_nextn_predict_layers", 0):
        return "recipe", "recipe_without_mtp", "trainer"
    return "recipe", "trainer"


def _own_settings(model: str) -> dict[str, Any]:
    """What the config file of a model's preset says of experts and multi-token prediction."""
    config = REPOSITORY / f"recipes/configs/{model.removesuffix('_tiny')}/pretrain.yaml"
    own = yaml.safe_load(config.read_text())
    return {name: own[name] for name in OF_THE_MODEL if name in own}


def _claim(folder: Path, steps: int) -> None:
    """Note what decides the runs of this folder, or refuse one that has runs of other settings."""
    settings = {
        "steps": steps,
        "config": yaml.safe_load((REPOSITORY / CONFIG).read_text()),
        "of_the_models": {model: _own_settings(model) for model in TINY_PRESETS},
        **{package: version(package) for package in PACKAGES},
    }
    path = folder / "settings.json"
    if path.is_file():
        there = json.loads(path.read_text())
        differing = [name for name in settings if there.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"--keep {folder} holds runs of other settings (differing: {', '.join(differing)}, "
                f"see {path.name} there); give another folder, or those settings"
            )
    else:
        write_json(path, settings)


def same_active_size(model: str, like: str) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Overrides that give preset `like` as many active parameters as preset `model`, and sizes.

    Embeddings, which the head shares, count on neither side: its ``intermediate_size`` is chosen
    so that the rest of what takes part in one token's inference is nearest. Raises ValueError where
    the nearest is further off than 2%.
    """
    aim = active_size(model)["active_without_embedding"]
    one, two = (
        active_size(like, intermediate_size=size)["active_without_embedding"]
        for size in (SHORTEST_STEP, 2 * SHORTEST_STEP)
    )
    steps = max(round((aim - one) / (two - one)), 0) + 1
    overrides = {"intermediate_size": steps * SHORTEST_STEP}
    sizes = {model: active_size(model), like: active_size(like, **overrides)}
    found = sizes[like]["active_without_embedding"]
    if abs(found / aim - 1) > MOST_SIZE_DIFFERENCE:
        raise ValueError(
            f"{like} has no intermediate_size that makes its {found:,} active parameters beside "
            f"the embedding about as many as the {aim:,} of {model}"
        )
    return overrides, sizes


def active_size(model: str, **overrides: Any) -> dict[str, int]:
    """Parameters of a preset: in all, and active ones, without the embedding (and the tied head).

    Of the mixture's, multi-token prediction is a part of all and not of the active ones.
    """
    config: Any = preset_config(model, **overrides)
    counts = count_parameters(empty_model(config))
    embedding = config.vocab_size * config.hidden_size
    return {
        "total_without_embedding": counts.total - embedding,
        "active_without_embedding": counts.active - embedding,
        "flops_per_token_without_head": round(training_flops(config, counts, SEQ_LEN).layers),
    }


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The differences ours − theirs by seed, their mean, and the standard error of that mean.

    None stands for the standard error of a single pair, which has none.
    """
    differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    error = None
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "by_seed": differences,
        "mean": statistics.mean(differences),
        "standard_error": error,
    }


def is_no_worse(difference: dict[str, Any]) -> bool | None:
    """Whether ours is at most one standard error above theirs; None without a standard error."""
    error = difference["standard_error"]
    return None if error is None else difference["mean"] <= error


def is_better(difference: dict[str, Any]) -> bool | None:
    """Whether ours is below theirs by more than one standard error; None without one."""
    error = difference["standard_error"]
    return None if error is None else difference["mean"] < -error


def recipe_flags(training: Training, folder: Path, steps: int) -> list[str]:
    """The recipe's command line, which the peer takes too.

    The quickstart's config, and what the model's own sets of experts and multi-token prediction.
    """
    data = folder / "data"
    flags = {
        "config": CONFIG,
        "output_dir": str(folder / training.folder),
        "model": training.model,
        "model_overrides": training.overrides,
        "seed": training.seed,
        "tokenizer": str(data / "tokenizer"),
        "quickstart_data": "false",
        "data": json.dumps({"quickstart": {"path": str(data / "packed"), "weight": 1}}),
        "seq_len": SEQ_LEN,
        "max_steps": steps,
        "warmup_steps": round(WARMUP_SHARE * steps),
        "global_batch_tokens": STEP_TOKENS,
        "per_device_train_batch_size": STEP_TOKENS // SEQ_LEN,
        **_own_settings(training.model),
        **(WITHOUT_MTP if training.by == "recipe_without_mtp" else {}),
        "eval_steps": 0,
        "save_steps": 0,
        "sample_prompts": "[]",
        "report_to": "none",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def _arguments(training: Training, folder: Path, steps: int) -> PretrainArguments:
    return parse_arguments(PretrainArguments, CONFIG, recipe_flags(training, folder, steps))


def _command(training: Training, folder: Path, steps: int) -> list[str]:
    flags = recipe_flags(training, folder, steps)
    if training.by == "trainer":
        return [sys.executable, "-m", "mini_llm.bench.learning_peer", *flags]
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    config = str(REPOSITORY / "accelerate_configs/single.yaml")
    recipe = str(REPOSITORY / "recipes/pretrain.py")
    return [accelerate, "launch", "--config_file", config, recipe, *flags]


def _train_and_evaluate(
    training: Training, folder: Path, steps: int, number: str
) -> dict[str, Any]:
    """The held-out loss and what else is told of one training; from its folder if it is there."""
    place = folder / training.folder
    result_file = place / "held_out.json"
    if result_file.is_file():
        found: dict[str, Any] = json.loads(result_file.read_text())
        return found
    begin = time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(
        os.environ,
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(path),
    )
    command, log = _command(training, folder, steps), place / "log.txt"
    if run_to_its_end(command, log=log, environment=environment):
        raise BenchmarkError(f"{place} failed:\n{log.read_text()[-3000:]}")
    found = {"seed": training.seed, "first_training_loss": _first_training_loss(place)}
    found |= held_out_loss(place / "final", _arguments(training, folder, steps))
    found["code"] = code_version()
    write_json(result_file, found)
    print(
        f"{number}: {training.folder}: held-out loss {found['loss']:.4f} "
        f"({time.monotonic() - begin:.0f} s)",
        flush=True,
    )
    return found


def _first_training_loss(place: Path) -> float:
    """The loss of the first step; Trainer's with its balance loss, where the class has one."""
    of_trainer = place / "trainer_state.json"
    if of_trainer.is_file():
        return float(json.loads(of_trainer.read_text())["log_history"][0]["loss"])
    with (place / "metrics.jsonl").open() as lines:
        return float(json.loads(next(lines))["train/loss"])


def held_out_loss(checkpoint: Path, args: PretrainArguments) -> dict[str, Any]:
    """Mean loss of all held-out tokens (nats), bits per byte, and the number of tokens.

    Through transformers' class, whoever trained: each document alone in its row, so that it is the
    same function of the weights whatever a class does with packed rows. Raises RuntimeError for a
    checkpoint that lacks weights.
    """
    disable_progress_bar()
    told = get_verbosity()
    set_verbosity_error()  # else a table of the recipe's weights of multi-token prediction
    model, loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    set_verbosity(told)
    if loaded["missing_keys"]:
        raise BenchmarkError(f"{checkpoint} lacks {sorted(loaded['missing_keys'])}")
    model.eval()
    held_out = open_validation(args.data, seq_len=args.seq_len, tokenizer=args.tokenizer)
    evaluated = evaluate_held_out(
        model,
        held_out,
        batch_size=EVALUATED_ROWS,
        device=torch.device("cpu"),
        token_bytes=token_byte_lengths(load_tokenizer(args.tokenizer)),
    )
    (found,) = evaluated.values()
    return {name: found[name] for name in ("loss", "bits_per_byte", "tokens")}


# What a pair does not have in common.
DIFFERENT = {
    "mini_llama3_tiny": "the two have the same objective.",
    "mini_deepseekv3_tiny": "the recipe adds multi-token prediction (weight 0.3, in the last third "
    "0.1; 0 in the row without) and a sequence-level balance loss (1e-4), and moves the router's "
    "biases by 1e-3 a step; the stock class has none of these, so that its step is cheaper and its "
    "biases stay 0.",
    "mini_qwen3_next_tiny": "both add a balance loss of weight 0.01, the recipe's a mean over rows "
    "and summed over layers, the stock class's over the batch and all layers together. The stock "
    "class keeps the documents of a packed row apart in attention only; on a CPU its delta nets "
    "and convolutions go on across them.",
}


def markdown(found: dict[str, Any]) -> str:
    """The figures as tables, with what they were taken on and what the two sides differ in."""
    seeds = found["seeds"]
    first_losses = [
        result["first_training_loss"]
        for of in found["models"].values()
        for result in (*of["recipe"], *of["trainer"])
    ]
    rows = [
        [
            model if by == "recipe" else f"{model}, multi-token prediction at weight 0",
            _losses(of[by]),
            _losses(of["trainer"]),
            _told(difference),
            _verdict(of["no_worse"][by], "no worse", "worse"),
        ]
        for model, of in found["models"].items()
        for by, difference in of["differences"].items()
    ]
    header = ["model", "recipe", "HF Trainer, stock class", "difference", "recipe is"]
    text = (
        f"Held-out loss (nats a token, {found['held_out_tokens']:,} tokens, each document alone in "
        f"its row) after {found['steps']:,} steps of {STEP_TOKENS:,} tokens of the quickstart's "
        f"text, packed to {found['seq_len']}, vocabulary {found['vocabulary']:,}, seeds "
        f"{', '.join(map(str, seeds))}; peak learning rate {found['learning_rate']:g}, "
        f"{found['warmup_steps']} steps of warm-up, cosine to {found['min_lr_ratio']:.0%}, weight "
        f"decay {found['weight_decay']:g} on matrices, gradients clipped to 1; fp32. Losses of the "
        f"first step: {min(first_losses):.2f} to {max(first_losses):.2f}. Differences are means of "
        "pairs of a seed ± the standard error; worse: by more than one of it.\n\n"
        + markdown_table(header, rows)
    )
    for model in found["models"]:
        text += f"\n\n{model}: {DIFFERENT[model]}"
    same_size = found["same_active_size"]
    if same_size is not None:
        text += "\n\n" + _same_size_markdown(same_size)
    return text


def _same_size_markdown(found: dict[str, Any]) -> str:
    sizes = found["sizes"]
    rows = [
        [
            model if model == MIXTURE else f"{model} {json.dumps(found['overrides'])}",
            f"{sizes[model]['active_without_embedding']:,}",
            f"{sizes[model]['total_without_embedding']:,}",
            f"{sizes[model]['flops_per_token_without_head'] / 1e6:.2f}",
            _losses(found[model]),
        ]
        for model in (MIXTURE, DENSE)
    ]
    header = ["by the recipe", "active parameters", "all parameters", "MFLOPs a token", "loss"]
    difference = found["difference"]
    verdict = _verdict(found["better"], "better", "not better")
    return (
        markdown_table(header, rows)
        + f"\n\n{MIXTURE} − {DENSE}: {_told(difference)}: {verdict} (better: by more than one "
        "standard error). Parameters without the embedding, which is the head too; active ones "
        "without multi-token prediction, all and the FLOPs of training with it; FLOPs without the "
        "head's, through which multi-token prediction goes a second time."
    )


def _losses(results: list[dict[str, Any]]) -> str:
    return ", ".join(f"{result['loss']:.4f}" for result in results)


def _told(difference: dict[str, Any]) -> str:
    error = difference["standard_error"]
    return f"{difference['mean']:+.4f} ± {'–' if error is None else f'{error:.4f}'}"


def _verdict(holds: bool | None, good: str, bad: str) -> str:
    if holds is None:
        return "not judged: one seed has no standard error"
    return good if holds else f"**{bad}**"
