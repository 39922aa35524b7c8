"""The project's own benchmark: one figure after the other, with what it was taken on.

    python -m mini_llm.bench step --model mini_llama3 --engine none zero1 --peers bare trainer
    python -m mini_llm.bench moe --model_overrides '{"n_routed_experts": 64}' --precision bf16
    python -m mini_llm.bench data --input data/fineweb/4_5/000000.parquet --json bench_data.json
    python -m mini_llm.bench attention --documents 10
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \\
        -m mini_llm.bench experts --experts 64
    python -m mini_llm.bench recipes --model mini_llama3 --precision bf16 --rows 32 --seq_len 2048
    python -m mini_llm.bench generation --batch 1 8
    python -m mini_llm.bench traffic --model mini_llama3 --bf16 true
    nice python -m mini_llm.bench learning --keep output/learning
    python -m mini_llm.bench all --json bench.json --markdown bench.md
    python -m mini_llm.bench all --only step recipes

Those of traffic are computed by a formula, those of learning are losses. The others are medians,
with minimum and maximum, of variants that take turns: on a CPU of CPU time, which other work on the
machine hardly touches, on a GPU by the clock, of step by the GPU's own; but those of recipes, which
follow each other, and of checkpoint are by the clock everywhere. Set OMP_NUM_THREADS=1 for figures
of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mini_llm.command_line import Parser
from mini_llm.parallel.environment import end_process, is_in_process_group

from .names import ENGINES, PARTS, PEERS, PRESETS, TINY_PRESETS, BenchmarkError

# Flags that count something, of whichever command has them.
COUNTS = (
    *("steps", "repeats", "rows", "micro_batches", "seq_len", "documents", "experts", "gpus"),
    *("batch", "prompt_tokens", "new_tokens", "global_batch_tokens", "per_device_train_batch_size"),
)
# What `all` runs besides, with --input, data: on a CPU in minutes, on a GPU at the presets' size.
SMALL = [*("--rows", "4", "--seq_len", "256"), "--device", "cpu"]
LARGE = [*("--rows", "16", "--seq_len", "2048"), "--device", "cuda"]


def all_commands(device: str, steps: int) -> list[list[str]]:
    """The command lines of `all`."""
    size, tiny = (LARGE, "") if device == "cuda" else (SMALL, "_tiny")
    count = ["--steps", str(steps)]
    peers, of_step = ["bare", "trainer", "accelerate"], size
    of_recipes = ["--model", "mini_llama3_tiny", *size]
    if device == "cuda":  # 64k tokens a step; all loops are there at once, and some keep all logits
        peers += ["trainer_compile", *(["trainer_fast"] if find_spec("liger_kernel") else [])]
        of_step = ["--rows", "8", "--micro_batches", "4", *size[2:]]
        of_recipes = ["--rows", "32", *size[2:], "--precision", "bf16"]
    commands = [
        [
            *("step", "--model", f"{model}{tiny}", *of_step, *count, "--precision", precision),
            *("--engine", "none", "zero1", "--peers", *peers),
        ]
        for model in PRESETS
        for precision in ("fp32", "bf16")
    ]
    commands.append(["recipes", *of_recipes, *count])
    for part in PARTS:
        models = PRESETS if part == "model" else [_DEFAULT_MODELS.get(part, "mini_deepseekv3")]
        for model in models:
            name = f"{model}{tiny}" if part == "model" else model
            for precision in ("fp32", "bf16"):
                flags = ["--model", name, *size, *count, "--precision", precision]
                commands.append([part, *flags])
    commands.append(["checkpoint", "--model", f"mini_llama3{tiny}", *size, *count])
    models = [f"{model}{tiny}" for model in PRESETS]
    repeats = ["--repeats", str(steps)]
    commands.append(["generation", "--model", *models, *repeats, "--device", device])
    rows = "16" if device == "cuda" else "1"
    commands.append(["attention", "--rows", rows, *repeats, "--device", device])
    return [*commands, ["traffic"]]


_DEFAULT_MODELS = {"step": "mini_llama3_tiny", "delta_net": "mini_qwen3_next"}


def json_object(text: str) -> dict[str, Any]:
    """A flag's JSON object; argparse says what is none."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


json_object.__name__ = "JSON object"  # as argparse names it: invalid JSON object value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m mini_llm.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True)
    of_step = what.add_parser("step", help="a training step, and by what people use instead")
    of_step.add_argument(
        "--engine", nargs="+", choices=ENGINES, default=["none"], help="default: none"
    )
    of_step.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        default=["bare", "trainer"],
        help="what to measure beside it (default: bare trainer); accelerate takes the ZeRO stage "
        "of the last --engine, or 1",
    )
    of_step.add_argument(
        "--torch_compile",
        nargs="+",
        choices=("true", "false"),
        help="layers compiled or not, or each engine both ways (default: as the recipes, on a GPU)",
    )
    of_recipes = what.add_parser(
        "recipes",
        help="tokens a second of pretraining and packed fine-tuning, as launched",
    )
    of_recipes.add_argument(
        "--model", nargs="+", default=PRESETS, help=f"presets (default: {' '.join(PRESETS)})"
    )
    of_recipes.add_argument(
        "--engine",
        nargs="+",
        choices=ENGINES,
        default=["none", "zero1"],
        help="default: none zero1",
    )
    of_recipes.add_argument("--without_sft", action="store_true", help="pretraining alone")
    of_recipes.add_argument(
        "--repeats", type=int, default=1, help="launches of each, in turns (default: 1)"
    )
    for command in (of_step, of_recipes):
        command.add_argument("--micro_batches", type=int, default=1, help="of a step (default: 1)")
    of_checkpoint = what.add_parser("checkpoint", help="how long a save keeps training waiting")
    of_checkpoint.add_argument("--engine", choices=ENGINES, default="zero1", help="default: zero1")
    of_parts = [what.add_parser(name, help=help) for name, help in PARTS.items()]
    for command in (of_step, of_checkpoint, *of_parts):
        name = command.prog.split()[-1]
        model = _DEFAULT_MODELS.get(name, "mini_deepseekv3")
        command.add_argument("--model", default=model, help="preset (default: %(default)s)")
    for command in (of_step, of_recipes, of_checkpoint, *of_parts):
        command.add_argument(
            "--model_overrides", type=json_object, default={}, help="fields of its config, JSON"
        )
        command.add_argument(
            "--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32"
        )
        command.add_argument("--rows", type=int, default=4, help="of a micro-batch (default: 4)")
        command.add_argument("--seq_len", type=int, default=512, help="default: 512")
        command.add_argument("--steps", type=int, default=20, help="counted ones (default: 20)")
    of_attention = what.add_parser("attention", help="packed rows: per document, and with a mask")
    of_attention.add_argument("--seq_len", type=int, default=2048, help="default: 2048")
    of_attention.add_argument(
        "--documents", type=int, default=10, help="documents of a row (default: 10)"
    )
    of_attention.add_argument("--rows", type=int, default=1, help="of a batch (default: 1)")
    of_attention.add_argument(
        "--seed", type=int, default=0, help="of where the documents end (default: 0)"
    )
    of_attention.add_argument(
        "--repeats", type=int, default=20, help="timed calls, each of another batch (default: 20)"
    )
    of_data = what.add_parser("data", help="text to packed rows, and packed rows read back")
    of_data.add_argument(
        "--input", type=Path, nargs="+", required=True, help="text: .parquet, .jsonl or folders"
    )
    of_data.add_argument("--tokenizer", type=Path, help="default: the project's")
    of_data.add_argument("--seq_len", type=int, default=2048, help="tokens per row (default: 2048)")
    of_data.add_argument("--repeats", type=int, default=20, help="timed calls (default: 20)")
    of_experts = what.add_parser("experts", help="spread over ranks, and whole on each of them")
    of_experts.add_argument(
        "--model", default="mini_deepseekv3_tiny", help="preset (default: %(default)s)"
    )
    of_experts.add_argument(
        "--model_overrides", type=json_object, default={}, help="fields of its config, JSON"
    )
    of_experts.add_argument("--experts", type=int, default=64, help="of a layer (default: 64)")
    of_experts.add_argument("--rows", type=int, default=8, help="of a rank's batch (default: 8)")
    of_experts.add_argument("--seq_len", type=int, default=512, help="default: 512")
    of_experts.add_argument("--repeats", type=int, default=20, help="timed steps (default: 20)")
    of_traffic = what.add_parser(
        "traffic", help="bytes that a rank sends in a step, on many GPUs: by formula, not measured"
    )
    of_traffic.add_argument(
        "--model", nargs="+", default=PRESETS, help=f"presets (default: {' '.join(PRESETS)})"
    )
    of_traffic.add_argument(
        "--gpus", type=int, nargs="+", default=[8, 64, 512], help="default: 8 64 512"
    )
    of_traffic.add_argument(
        "--global_batch_tokens", type=int, default=1 << 20, help="of a step (default: 1048576)"
    )
    of_traffic.add_argument("--seq_len", type=int, default=2048, help="default: 2048")
    of_traffic.add_argument(
        "--per_device_train_batch_size",
        type=int,
        default=16,
        help="rows of a micro-batch at most; a rank whose share of the step is smaller takes that "
        "(default: 16)",
    )
    for switch, default in (("bf16", "true"), ("gradient_checkpointing", "false")):
        of_traffic.add_argument(
            f"--{switch}", choices=("true", "false"), default=default, help=f"default: {default}"
        )
    of_generation = what.add_parser("generation", help="the Generator, and transformers' generate")
    of_generation.add_argument(
        "--model", nargs="+", default=PRESETS, help=f"presets (default: {' '.join(PRESETS)})"
    )
    of_generation.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    of_generation.add_argument("--prompt_tokens", type=int, default=128, help="default: 128")
    of_generation.add_argument("--new_tokens", type=int, default=64, help="default: 64")
    of_generation.add_argument("--repeats", type=int, default=20, help="timed calls (default: 20)")
    of_learning = what.add_parser(
        "learning",
        help="held-out loss of the recipe and of HF Trainer with the stock class; no part of all",
        description="Trains each model by recipes/pretrain.py and its stock class by HF Trainer, "
        "on the same rows with the same hyperparameters, and compares their held-out losses; and "
        "mini_deepseekv3_tiny with a mini_llama3 of the same active size. On a CPU, one training "
        "after the other in one thread: as it stands 24 of about two minutes, three quarters of an "
        "hour in all. That is too long to be a part of all.",
    )
    of_learning.add_argument(
        "--model",
        nargs="+",
        choices=TINY_PRESETS,
        default=TINY_PRESETS,
        help="default: all three",
    )
    of_learning.add_argument(
        "--steps", type=int, default=300, help="of 2,048 tokens, of every training (default: 300)"
    )
    of_learning.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of initial weights and the order of the rows (default: 0 1 2)",
    )
    of_learning.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="folder that keeps data and runs; what is finished there is not repeated (default: a "
        "temporary one)",
    )
    of_all = what.add_parser(
        "all",
        help="everything that needs one process and not hours, in a default size: all but experts "
        "and learning",
    )
    of_all.add_argument("--steps", type=int, default=20, help="counted ones (default: 20)")
    of_all.add_argument("--input", type=Path, nargs="+", help="text, to measure data on too")
    of_all.add_argument(
        "--only",
        nargs="+",
        choices=[name for name in what.choices if name not in ("experts", "learning", "all")],
        help="of these commands (default: of all)",
    )
    on_either = (of_step, of_recipes, of_checkpoint, *of_parts, of_attention, of_generation, of_all)
    for command in on_either:
        command.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto"
        )
    for command in what.choices.values():
        command.add_argument("--json", type=Path, help="file for the figures")
        command.add_argument("--markdown", type=Path, help="file for the tables")
    return parser


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(figures, tables) of one command line, not of all; each is printed when it is there."""
    # Imported here: --help need not wait for torch.
    if args.what == "step":
        from . import step

        figures = step.run(
            args.model,
            args.model_overrides,
            args.engine,
            args.precision,
            args.peers,
            compiled=args.torch_compile and [choice == "true" for choice in args.torch_compile],
            rows=args.rows,
            seq_len=args.seq_len,
            micro_batches=args.micro_batches,
            steps=args.steps,
            device=args.device,
        )
        return figures, step.markdown(figures)
    if args.what == "checkpoint":
        from . import checkpoint

        figures = checkpoint.run(
            args.model,
            args.model_overrides,
            engine_name=args.engine,
            precision=args.precision,
            rows=args.rows,
            seq_len=args.seq_len,
            repeats=args.steps,
            device=args.device,
        )
        return figures, checkpoint.markdown(figures)
    if args.what in PARTS:
        from . import parts

        figures = parts.run(
            args.what,
            args.model,
            args.model_overrides,
            precision=args.precision,
            rows=args.rows,
            seq_len=args.seq_len,
            repeats=args.steps,
            device=args.device,
        )
        return figures, parts.markdown(figures)
    if args.what == "attention":
        from . import attention

        figures = attention.run(
            args.seq_len,
            args.documents,
            args.seed,
            args.repeats,
            rows=args.rows,
            device=args.device,
        )
        return figures, attention.markdown(figures)
    if args.what == "data":
        from ..data.tokenizer import DEFAULT_TOKENIZER
        from . import data

        tokenizer = args.tokenizer or DEFAULT_TOKENIZER
        figures = data.run(args.input, tokenizer, args.seq_len, args.repeats)
        return figures, data.markdown(figures)
    if args.what == "experts":
        from . import experts

        figures = experts.run(
            args.model, args.model_overrides, args.experts, args.rows, args.seq_len, args.repeats
        )
        return figures, experts.markdown(figures)
    if args.what == "generation":
        from . import generation

        figures = generation.run(
            args.model,
            args.batch,
            args.prompt_tokens,
            args.new_tokens,
            args.repeats,
            device=args.device,
        )
        return figures, generation.markdown(figures)
    if args.what == "recipes":
        from . import recipes

        figures = recipes.run(
            args.model,
            args.engine,
            args.model_overrides,
            sft=not args.without_sft,
            precision=args.precision,
            rows=args.rows,
            seq_len=args.seq_len,
            micro_batches=args.micro_batches,
            steps=args.steps,
            repeats=args.repeats,
            device=args.device,
        )
        return figures, recipes.markdown(figures)
    if args.what == "learning":
        from . import learning

        figures = learning.run(args.model, args.steps, args.seeds, args.keep)
        return figures, learning.markdown(figures)
    from . import traffic

    figures = traffic.run(
        args.model,
        args.gpus,
        args.global_batch_tokens,
        args.seq_len,
        args.per_device_train_batch_size,
        bf16=args.bf16 == "true",
        gradient_checkpointing=args.gradient_checkpointing == "true",
    )
    return figures, traffic.markdown(figures)


def measure_all(args: argparse.Namespace) -> list[str]:
    """Each of :func:`all_commands`; returns the command lines that failed.

    What is measured is written at once, so neither a failure nor an interruption loses it.
    """
    from ..device import choose_device

    commands = all_commands(choose_device(args.device).type, args.steps)
    if args.input:
        paths = [str(path) for path in args.input]
        commands.append(["data", "--input", *paths, "--repeats", str(args.steps)])
    if args.only:
        commands = [command for command in commands if command[0] in args.only]
        if "data" in args.only and not args.input:
            raise ValueError("--only data: give --input, the text to measure it on")
    figures: dict[str, Any] = {}
    tables: list[str] = []
    failed: list[str] = []
    for command in commands:
        line = " ".join(["python -m mini_llm.bench", *command])
        print(f"\n{line}", flush=True)
        try:
            figures[line], table = measure(build_parser().parse_args(command))
            launches = launches_that_failed(command[0], figures[line])
            failed += [f"{line}: {launch}" for launch in launches]
        except Exception as error:  # whatever ends one costs the others nothing
            if not isinstance(error, (OSError, RuntimeError, ValueError)):
                traceback.print_exc()  # a mistake of this program: where it is
            why = str(error) or type(error).__name__
            failed.append(line)
            figures[line], table = {"failed": why}, f"failed: {why}"
            print(table, file=sys.stderr, flush=True)
        tables.append(f"`{line}`\n\n{table}")
        write(args, figures, "\n\n".join(tables))
    return failed


def launches_that_failed(what: str, figures: dict[str, Any]) -> list[str]:
    """Of the recipes, by name; that others' loops cannot run here is a result."""
    return list(figures["failed"]) if what == "recipes" else []


def write(args: argparse.Namespace, figures: dict[str, Any], tables: str) -> None:
    """The files that were asked for."""
    if int(os.environ.get("RANK", "0")) == 0:
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
        if args.markdown:
            args.markdown.write_text(tables + "\n")


def check(args: argparse.Namespace) -> None:
    """What can be wrong with any command; raises ValueError with the sentence."""
    for name in COUNTS:
        asked = getattr(args, name, 1)
        for count in asked if isinstance(asked, list) else [asked]:
            if count < 1:
                raise ValueError(f"--{name} is {count}; it must be at least 1")
    for path in getattr(args, "input", None) or []:
        if not path.exists():
            raise ValueError(f"--input: {path} does not exist")
    if args.what in ("step", "model", "attention", "checkpoint") and args.seq_len < 2:
        raise ValueError(f"--seq_len is {args.seq_len}; one token has no next one to predict")
    if args.json and args.markdown and args.json.resolve() == args.markdown.resolve():
        raise ValueError(f"--json and --markdown are both {args.json}; give two files")
    for name in ("json", "markdown"):
        file: Path | None = getattr(args, name)
        if file is None:
            continue
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ValueError(f"--{name} {file}: give a file in a folder that exists")
        was_there = file.exists()
        try:
            file.open("a").close()
        except OSError as error:
            raise ValueError(f"--{name} {file} cannot be written ({error.strerror})") from error
        if not was_there:
            file.unlink(missing_ok=True)  # another rank may have been faster
    if hasattr(args, "model"):
        check_models(args)


def check_models(args: argparse.Namespace) -> None:
    """The presets with their overrides; raises ValueError with the sentence."""
    from ..models import check_preset

    # Those of experts are of a model with as many as --experts says.
    overrides = {} if args.what == "experts" else getattr(args, "model_overrides", {})
    if args.what in ("recipes", "checkpoint") and "vocab_size" in overrides:
        raise ValueError("--model_overrides: vocab_size is that of the project's tokenizer here")
    for model in args.model if isinstance(args.model, list) else [args.model]:
        check_preset(model, overrides)
    engines = getattr(args, "engine", [])
    asked = [engines] if isinstance(engines, str) else engines
    if "zero0" in asked and getattr(args, "precision", "fp32") == "bf16":
        raise ValueError(
            "--engine zero0 with --precision bf16: DeepSpeed's stage 0 refuses bf16; give zero1"
        )


def main(command_line: Sequence[str] | None = None) -> None:
    """Command-line entry."""
    args = build_parser().parse_args(command_line)
    failed = []
    try:
        check(args)
        if args.what == "all":
            failed = measure_all(args)
        else:
            figures, tables = measure(args)
            write(args, figures, tables)
            failed = launches_that_failed(args.what, figures)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    if failed:
        print("\nfailed:", *failed, sep="\n", file=sys.stderr)
        raise SystemExit(1)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """On a signal: end what was launched and remove what it wrote, then this process."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, leave)
    if getattr(build_parser().parse_args(), "device", None) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
    try:
        main()
    except SystemExit as ended:
        if is_in_process_group():
            end_process(ended.code if isinstance(ended.code, int) else 1)
        raise
    end_process()
