"""``python -m mini_llm.hub push DIR --repo_id owner/name``: share a trained model."""

import argparse
import sys
from pathlib import Path

from mini_llm.parallel import watchdog

from .push import MAIN_BRANCH, PushFailedError, push


def main(command_line: list[str] | None = None) -> None:
    """Run a command; ends with status 2 and one sentence where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m mini_llm.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "push a model with its tokenizer and a model card to the Hugging Face hub"
    pushing = commands.add_parser("push", help=about, description=about)
    pushing.add_argument(
        "directory", type=Path, help="a run's folder, its final/, or one of its checkpoints/step-N"
    )
    pushing.add_argument("--repo_id", required=True, help="owner/name; made if it is not there")
    pushing.add_argument("--public", action="store_true", help="make it public (default: private)")
    pushing.add_argument("--revision", default=MAIN_BRANCH, metavar="BRANCH", help="default: main")
    pushing.add_argument(
        "--drop_mtp", action="store_true", help="leave the multi-token-prediction layers out"
    )
    pushing.add_argument("--commit_message", default="", help="default: which weights they are")
    pushing.add_argument("--license", default="", help="of the weights, instead of the run's")
    pushing.add_argument("--language", default="", help="e.g. zh,en, instead of the run's")
    args = parser.parse_args(command_line)
    watchdog.end_with_launcher()  # a push beside training ends with it
    try:
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
    except (ValueError, PushFailedError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    print(f"pushed {args.directory} to {url}", flush=True)


if __name__ == "__main__":
    main()
