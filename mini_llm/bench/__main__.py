"""The project's own benchmark: one figure after the other, with what it was taken on.

    python -m mini_llm.bench data --input data/fineweb/4_5/000000.parquet --output bench_data.json
    python -m mini_llm.bench attention --documents 10
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 \\
        -m mini_llm.bench experts --experts 64
    python -m mini_llm.bench generation --batch 1 8
    python -m mini_llm.bench traffic --model mini_llama3 --bf16 true

Those of traffic are computed by a formula. The others are medians, with minimum and maximum, of CPU
time in one process; variants that are compared take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.tokenizer import DEFAULT_TOKENIZER
from . import data

PRESETS = ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"]


def main(command_line: Sequence[str] | None = None) -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(
        prog="python -m mini_llm.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", required=True)
    of_data = what.add_parser("data", help="text to packed rows, and packed rows read back")
    of_data.add_argument(
        "--input", type=Path, nargs="+", required=True, help="text: .parquet, .jsonl or folders"
    )
    of_data.add_argument(
        "--tokenizer", type=Path, default=DEFAULT_TOKENIZER, help="default: the project's"
    )
    of_data.add_argument("--seq_len", type=int, default=2048, help="tokens per row (default: 2048)")
    of_data.add_argument("--repeats", type=int, default=20, help="timed calls (default: 20)")
    of_attention = what.add_parser("attention", help="packed rows: per document, and with a mask")
    of_attention.add_argument("--seq_len", type=int, default=2048, help="default: 2048")
    of_attention.add_argument(
        "--documents", type=int, default=10, help="documents of a row (default: 10)"
    )
    of_attention.add_argument(
        "--seed", type=int, default=0, help="of where the documents end (default: 0)"
    )
    of_attention.add_argument(
        "--repeats", type=int, default=10, help="timed calls, each of another row (default: 10)"
    )
    of_experts = what.add_parser("experts", help="spread over ranks, and whole on each of them")
    of_experts.add_argument(
        "--model", default="mini_deepseekv3_tiny", help="preset (default: %(default)s)"
    )
    of_experts.add_argument(
        "--model_overrides", type=json.loads, default={}, help="fields of its config, JSON"
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
    of_generation.add_argument("--repeats", type=int, default=5, help="timed calls (default: 5)")
    for command in (of_data, of_attention, of_experts, of_traffic, of_generation):
        command.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args(command_line)
    try:
        if arguments.what == "data":
            figures = data.run(
                arguments.input, arguments.tokenizer, arguments.seq_len, arguments.repeats
            )
        elif arguments.what == "experts":
            from . import experts

            figures = experts.run(
                arguments.model,
                arguments.model_overrides,
                arguments.experts,
                arguments.rows,
                arguments.seq_len,
                arguments.repeats,
            )
        elif arguments.what == "generation":
            from . import generation

            figures = generation.run(
                arguments.model,
                arguments.batch,
                arguments.prompt_tokens,
                arguments.new_tokens,
                arguments.repeats,
            )
        elif arguments.what == "traffic":
            from . import traffic

            figures = traffic.run(
                arguments.model,
                arguments.gpus,
                arguments.global_batch_tokens,
                arguments.seq_len,
                arguments.per_device_train_batch_size,
                bf16=arguments.bf16 == "true",
                gradient_checkpointing=arguments.gradient_checkpointing == "true",
            )
        else:
            from . import attention  # not above: --help need not wait for torch

            figures = attention.run(
                arguments.seq_len, arguments.documents, arguments.seed, arguments.repeats
            )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if arguments.output and int(os.environ.get("RANK", "0")) == 0:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
