"""The flags of `./launch.sh verify`, beside those of the launcher. Imports nothing slow."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from mini_llm.command_line import RaisingParser, UsageError
from mini_llm.launch.nodes import PORTS_PER_JOB
from mini_llm.launch.options import DEFAULT_CONFIG, LAST_PORT, Options

PARTS = ("preflight", "equivalence")


@dataclass(frozen=True)
class VerifyFlags:
    """What verify was asked for."""

    output_dir: Path
    max_minutes: float
    skip: str | None


def parser() -> argparse.ArgumentParser:
    """Takes the flags that the launcher left over; UsageError for what it does not know."""
    made = RaisingParser(prog="", usage=argparse.SUPPRESS, add_help=False)
    made.add_argument(
        "--output_dir",
        type=Path,
        default=Path("output/verify"),
        help="folder of the checkpoints that you are going to train: its disk is tested, and "
        "verify.json and verify.md are written there (default: output/verify)",
    )
    made.add_argument(
        "--max_minutes",
        type=float,
        default=10.0,
        help="checks that do not fit into this time are skipped, and said to be (default: 10)",
    )
    made.add_argument("--skip", choices=PARTS, help="leave out one of the two parts")
    return made


def parse_flags(options: Options) -> VerifyFlags:
    """The flags of this command line. Raises UsageError in one sentence."""
    flags = VerifyFlags(**vars(parser().parse_args(options.recipe_flags)))
    if not flags.max_minutes > 0:
        raise UsageError(f"--max_minutes is {flags.max_minutes}; it must be above 0")
    if options.config_file != DEFAULT_CONFIG:
        raise UsageError(
            f"--config_file {options.config_file}: verify goes through all engines by itself; "
            "leave --config_file out"
        )
    if options.max_restarts:
        raise UsageError("--max_restarts is for training; verify reports what fails")
    if options.main_port and options.main_port + PORTS_PER_JOB - 1 > LAST_PORT:
        raise UsageError(
            f"--main_port {options.main_port}: each launch takes the next port, and there is none "
            f"above {LAST_PORT}; give at most {LAST_PORT - PORTS_PER_JOB + 1}"
        )
    return flags
