"""The flags of ``launch.sh evaluate``. Imports nothing slow."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_llm.command_line import RaisingParser, UsageError

PARTS = ("held_out", "tasks")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt")
MAX_EVAL_ROWS = 256  # where no run says how many: what the recipes take by default

DESCRIPTION = """\
Evaluate a checkpoint: held-out bits per byte of each source, perplexity by document length, and
multiple-choice questions through lm-eval.

    ./launch.sh evaluate output/quickstart/pretrain
    ./launch.sh evaluate output/my-run --eval_data data/eval
    ./launch.sh evaluate owner/model --text data/held_out.jsonl --tasks ceval-valid,cmmlu

Everything goes to results.json and perplexity_by_length.png in RUN/evaluation, where the run's
report.html and model card find it."""


@dataclass(frozen=True)
class Flags:
    """What evaluate was asked for; None where a flag was not given."""

    checkpoint: str
    data: dict[str, Any] | None
    text: list[Path]
    max_eval_rows: int | None
    seq_len: int | None
    tasks: list[str] | None
    eval_data: Path | None
    num_fewshot: int | None
    limit: int | None
    apply_chat_template: bool | None
    batch_size: int
    device: str
    dtype: str
    seed: int
    skip: str | None
    output_dir: Path | None


def _number(least: int, most: int | None = None) -> Any:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; give {least} or more")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{number} is too large; give {most} or less")
        return number

    return parse


def _mapping(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'not JSON ({error}); give \'{{"name": {{"path": "folder"}}}}\''
        ) from None
    if not isinstance(content, dict) or not content:
        raise argparse.ArgumentTypeError('give a mapping: \'{"name": {"path": "folder"}}\'')
    return content


def _truth(text: str) -> bool | None:
    if text not in ("auto", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto, true nor false")
    return None if text == "auto" else text == "true"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names no task; give names separated by commas")
    return list(dict.fromkeys(names))


def parser() -> argparse.ArgumentParser:
    """The flags, each with its help."""
    made = RaisingParser(
        prog="./launch.sh evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a run folder (its final/, else its newest checkpoint), a final/, a "
        "checkpoints/step-N, or any causal language model that transformers opens: a folder or a "
        "hub id",
    )
    held_out = made.add_argument_group("held-out text")
    held_out.add_argument(
        "--data",
        type=_mapping,
        metavar="JSON",
        help='whose held-out rows to take, as in a recipe: \'{"name": {"path": "folder"}}\' '
        "(default: the data of the run)",
    )
    held_out.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files, all of them, tokenised with the checkpoint's own tokenizer: .jsonl and "
        ".parquet with a text field or column, a .txt as one document; each file is a source",
    )
    held_out.add_argument(
        "--max_eval_rows",
        type=_number(0),
        metavar="N",
        help="most rows of seq_len tokens a source (0: all; default: the run's, else "
        f"{MAX_EVAL_ROWS})",
    )
    held_out.add_argument(
        "--seq_len",
        type=_number(2),
        metavar="N",
        help="tokens a row; longer documents are cut (default: the run's or the data's, else the "
        "model's longest input, at most 2048)",
    )
    tasks = made.add_argument_group("tasks of lm-eval (pip install -e '.[eval]')")
    tasks.add_argument(
        "--tasks",
        type=_names,
        metavar="A,B",
        help="names that lm-eval knows, or mini_choice, mini_choice_text, ceval-valid, "
        "ceval-valid_text, cmmlu, cmmlu_text (default: those of these six whose data are here). "
        "The _text ones compare whole answers, the others the letters A to D",
    )
    tasks.add_argument(
        "--eval_data",
        type=Path,
        metavar="DIR",
        help="a folder with C-Eval in ceval/ and CMMLU in cmmlu/, as their authors or the hub "
        "pack them (default: what is in the cache of datasets)",
    )
    tasks.add_argument(
        "--num_fewshot", type=_number(0), metavar="N", help="solved examples before each question"
    )
    tasks.add_argument(
        "--limit", type=_number(1), metavar="N", help="only the first N questions of each task"
    )
    tasks.add_argument(
        "--apply_chat_template",
        type=_truth,
        metavar="auto|true|false",
        help="ask through the chat template (auto: if the model stops where its template ends a "
        "turn, as chat models do)",
    )
    made.add_argument("--skip", choices=PARTS, help="leave out one of the two parts")
    made.add_argument(
        "--batch_size",
        type=_number(1),
        default=8,
        metavar="N",
        help="rows or answers a forward pass (default: 8)",
    )
    made.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1")
    made.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as they were saved)"
    )
    made.add_argument(
        "--seed",
        type=_number(0, 2**32 - 1),  # what numpy takes, whose generator lm-eval seeds too
        default=42,
        metavar="N",
        help="chooses solved examples (default: 42)",
    )
    made.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="default: RUN/evaluation, for a step-N a folder of that name in it, and "
        "output/evaluation/NAME for a model that belongs to no run",
    )
    return made


def parse_flags(command_line: Sequence[str] | None) -> Flags:
    """The flags of this command line; --help is shown and ends the process.

    Raises UsageError for a mistyped flag, and for flags that contradict each other or name what is
    not there.
    """
    flags = Flags(**vars(parser().parse_args(command_line)))
    if flags.data and flags.text:
        raise UsageError("--data and --text were given; evaluate on one of them at a time")
    if flags.skip == "held_out" and (flags.data or flags.text):
        given = "--data" if flags.data else "--text"
        raise UsageError(f"--skip held_out leaves out what {given} names; leave one of them out")
    of_tasks = {"--tasks": flags.tasks, "--eval_data": flags.eval_data}
    for name, value in of_tasks.items():
        if flags.skip == "tasks" and value is not None:
            raise UsageError(f"--skip tasks leaves out what {name} names; leave one of them out")
    for path in flags.text:
        if path.suffix not in TEXT_SUFFIXES:
            raise UsageError(f"--text {path} is none of {', '.join(TEXT_SUFFIXES)}")
        if not path.is_file():
            raise UsageError(f"--text {path} does not exist")
    names = [path.name for path in flags.text]
    if len(set(names)) < len(names):
        raise UsageError("--text names two files of the same name; sources need different names")
    if flags.eval_data is not None and not flags.eval_data.is_dir():
        raise UsageError(f"--eval_data {flags.eval_data} is no folder")
    if flags.output_dir is not None and flags.output_dir.is_file():
        raise UsageError(f"--output_dir {flags.output_dir} is a file; give a folder")
    return flags
