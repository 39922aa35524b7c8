"""The flags that ``launch.sh generate`` and ``launch.sh chat`` share; imports no torch."""

import argparse
import io
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generator import Generator
    from .sampling import Sampling

CHECKPOINT_HELP = (
    "a run's folder, its final/ or one of its checkpoints/step-N, any folder with a stock "
    "transformers checkpoint, or a hub id (owner/name)"
)
# Fields of Sampling, each a flag of the same name. Not given, the generation config decides.
_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (float, "divides the logits; 0 takes the likeliest token"),
    "top_k": (int, "choose among the K likeliest tokens; 0: all"),
    "top_p": (float, "choose among the fewest tokens that together have this probability"),
    "min_p": (float, "leave out tokens below this share of the likeliest one's probability"),
    "repetition_penalty": (float, "above 1 disfavours tokens of prompt and answer (CTRL)"),
    "frequency_penalty": (float, "taken off a token's logit for each time the answer has it"),
    "presence_penalty": (float, "taken off a token's logit if the answer has it"),
    "seed": (int, "of the random numbers; the same seed gives the same text"),
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """CKPT and where it computes."""
    parser.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1"
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, the checkpoint's own on a GPU",
    )


def add_sampling_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How tokens are chosen and when to stop."""
    group = parser.add_argument_group(
        "sampling", "what is not given follows the model's generation config"
    )
    group.add_argument(
        "--max_new_tokens", type=int, default=max_new_tokens, help="default: %(default)s"
    )
    for name, (kind, about) in _NUMBERS.items():
        group.add_argument(f"--{name}", type=kind, help=about)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    group.add_argument(
        "--stop_token_id",
        action="append",
        type=int,
        metavar="ID",
        help="end at this token instead of the generation config's; may be repeated",
    )


def sampling_from(arguments: argparse.Namespace, generator: "Generator") -> "Sampling":
    """The Sampling that flags and generation config ask for; ValueError names a bad flag."""
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _NUMBERS}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"max_new_tokens": arguments.max_new_tokens}
    given |= {"stop": tuple(from_command_line(stop) for stop in arguments.stop)}
    if arguments.stop_token_id is not None:
        given["stop_token_ids"] = tuple(arguments.stop_token_id)
    try:
        sampling = generator.default_sampling(**given)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    for name in ("top_k", "top_p", "min_p"):
        if name in given and sampling.temperature == 0:
            raise ValueError(
                f"--{name} has no meaning at temperature 0, where the likeliest token is taken; "
                "give --temperature too"
            )
    return sampling


def from_command_line(text: str) -> str:
    """An argument as UTF-8, whatever the locale says that it is."""
    return os.fsencode(text).decode("utf-8", errors="replace")


def speak_utf8() -> None:
    """Let standard input and output be UTF-8 under any locale."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
