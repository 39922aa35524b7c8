"""``python -m mini_llm.hub``: ``push`` a model to the hub, or ``export`` it for llama.cpp."""

import argparse
import sys
from pathlib import Path

from mini_llm.command_line import Parser
from mini_llm.parallel import watchdog

from .gguf import DEFAULT_DTYPE, DTYPES, export_gguf
from .push import MAIN_BRANCH, PushFailedError, push

DIRECTORY = "a run's folder, its final/, or one of its checkpoints/step-N"


def main(command_line: list[str] | None = None) -> None:
    """Run a command; ends with status 2 and one sentence where it cannot be done."""
    parser = Parser(prog="python -m mini_llm.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "push a model with its tokenizer and a model card to the Hugging Face hub"
    pushing = commands.add_parser("push", help=about, description=about)
    pushing.add_argument("directory", type=Path, help=DIRECTORY)
    pushing.add_argument("--repo_id", required=True, help="owner/name; made if it is not there")
    pushing.add_argument("--public", action="store_true", help="make it public (default: private)")
    pushing.add_argument("--revision", default=MAIN_BRANCH, metavar="BRANCH", help="default: main")
    pushing.add_argument(
        "--drop_mtp", action="store_true", help="leave the multi-token-prediction layers out"
    )
    pushing.add_argument("--commit_message", default="", help="default: which weights they are")
    pushing.add_argument("--license", default="", help="of the weights, instead of the run's")
    pushing.add_argument("--language", default="", help="e.g. zh,en, instead of the run's")
    pushing.set_defaults(run=run_push)
    about = "write a model with its tokenizer as one file that llama.cpp runs"
    exporting = commands.add_parser("export", help=about, description=about)
    exporting.add_argument("directory", type=Path, help=DIRECTORY)
    exporting.add_argument("--format", required=True, choices=["gguf"], help="gguf: llama.cpp's")
    exporting.add_argument("--output", required=True, type=Path, metavar="FILE.gguf")
    exporting.add_argument(
        "--dtype",
        default=DEFAULT_DTYPE,
        choices=list(DTYPES),
        help=f"of the matrices (default: {DEFAULT_DTYPE}); the rest stays in f32",
    )
    exporting.set_defaults(run=run_export)
    args = parser.parse_args(command_line)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, PushFailedError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def run_push(args: argparse.Namespace) -> None:
    """The command ``push``."""
    watchdog.end_with_launcher()  # a push beside training ends with it
    url = push(
        args.directory,
        args.repo_id,
        private=not args.public,
        revision=args.revision,
        drop_mtp=args.drop_mtp,
        commit_message=args.commit_message,
        license=args.license,
        language=args.language,
    )
    print(f"pushed {args.directory} to {url}", flush=True)


def run_export(args: argparse.Namespace) -> None:
    """The command ``export``."""
    written = export_gguf(args.directory, args.output, args.dtype)
    print(
        f"wrote {written.path}: {written.tensors} tensors of a llama.cpp {written.architecture}, "
        f"{args.dtype}, {written.path.stat().st_size / 2**20:,.1f} MiB"
    )
    if written.kept_f16:
        print(f"{written.kept_f16} matrices are f16: their rows do not divide into blocks of 32")


if __name__ == "__main__":
    main()
