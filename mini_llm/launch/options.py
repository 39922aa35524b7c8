"""The command line of `launch.sh pretrain|sft|verify`: the launcher's flags and the recipe's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_llm.command_line import UsageError

DEFAULT_CONFIG = "accelerate_configs/zero1.yaml"
# A node that failed waits here for the others, which may hang until the watchdog ends them
# (--ddp_timeout, 600 s), and then takes some seconds to start.
DEFAULT_PATIENCE = 900
LAST_PORT = 65535

HELP = f"""\
Usage: ./launch.sh {{pretrain|sft|verify}} [launch flags] [recipe flags]

Launch flags
  --config_file F          Accelerate config (default {DEFAULT_CONFIG})
  --procs_per_node N       processes on each node (default: one per GPU, 1 without a GPU)
  --print                  print the exact command with its environment and exit

Several nodes, by one of these
  --nodes N --node_rank R --main_ip IP
                           by hand, on every node: R counts from 0, IP is an address of node 0
  --nodes N --rendezvous_file PATH
                           on every node: they meet through PATH on a file system they all share
  --hostfile F             on any machine: starts all nodes by pdsh or ssh; lines "host slots=8"
  srun --ntasks-per-node=1 ./launch.sh …
                           under SLURM: everything from its environment (examples/pretrain.sbatch)

  --main_port P            port on node 0 (default: 29500, under SLURM one made of the job id, on
                           one node a free one); the k-th restart uses P + k
  --network_interface NAME for gloo's and NCCL's connections (default: the one with the route to
                           node 0); GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, win
  --rendezvous_timeout S   seconds that nodes wait for each other (default {DEFAULT_PATIENCE})
  --env NAME               with --hostfile: hand on this variable too (it stands in the process
                           list of the nodes: not for secrets); may be repeated
  --max_restarts N         after a failure, start again at most N times (default 0); the recipe
                           goes on from its newest checkpoint

All other flags go to the recipe:
"""


@dataclass
class Options:
    """The launcher's flags; None where one was not given."""

    recipe: str
    config_file: str = DEFAULT_CONFIG
    procs_per_node: int | None = None
    nodes: int | None = None
    node_rank: int | None = None
    main_ip: str | None = None
    main_port: int | None = None
    hostfile: str | None = None
    rendezvous_file: str | None = None
    rendezvous_timeout: int = DEFAULT_PATIENCE
    network_interface: str | None = None
    env: list[str] = field(default_factory=list)
    max_restarts: int = 0
    print: bool = False
    help: bool = False
    recipe_flags: list[str] = field(default_factory=list)

    @property
    def program(self) -> list[str]:
        """What `accelerate launch` starts on every rank."""
        if self.recipe == "verify":
            return ["--module", "mini_llm.verify.preflight"]
        return [f"recipes/{self.recipe}.py"]


def _number(least: int, most: int | None = None) -> Callable[[str, str], int]:
    def parse(flag: str, text: str) -> int:
        is_number = text.isascii() and text.isdigit()
        if not is_number or int(text) < least or (most is not None and int(text) > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise UsageError(f"{flag} must be a whole number {limit}, got '{text}'")
        return int(text)

    return parse


def _text(flag: str, text: str) -> str:
    if not text:
        raise UsageError(f"{flag} needs a value, got an empty one")
    return text


VALUES: dict[str, Callable[[str, str], Any]] = {
    "--config_file": _text,
    "--procs_per_node": _number(1),
    "--nodes": _number(1),
    "--node_rank": _number(0),
    "--main_ip": _text,
    "--main_port": _number(0, LAST_PORT),
    "--hostfile": _text,
    "--rendezvous_file": _text,
    "--rendezvous_timeout": _number(1),
    "--network_interface": _text,
    "--env": _text,
    "--max_restarts": _number(0),
}


def parse_options(recipe: str, words: list[str]) -> Options:
    """Take the launcher's flags out of ``words``; the rest, in order, is the recipe's.

    Raises UsageError for a flag without a value and for a value that is none.
    """
    options = Options(recipe)
    remaining = iter(words)
    for word in remaining:
        flag, has_value, value = word.partition("=")
        if word in ("-h", "--help"):
            options.help = True
        elif word == "--print":
            options.print = True
        elif flag in VALUES:
            if not has_value:
                following = next(remaining, None)
                if following is None:
                    raise UsageError(f"{flag} needs a value")
                value = following
            parsed = VALUES[flag](flag, value)
            if flag == "--env":
                options.env.append(parsed)
            else:
                setattr(options, flag.removeprefix("--"), parsed)
        else:
            options.recipe_flags.append(word)
    return options


def check_options(options: Options) -> None:
    """Refuse what contradicts itself, before anything is looked up. Raises UsageError."""
    if not Path(options.config_file).is_file():
        raise UsageError(
            f"--config_file {options.config_file} does not exist; the ones that come with the "
            "project are in accelerate_configs/"
        )
    if options.main_port and options.main_port + options.max_restarts > LAST_PORT:
        raise UsageError(
            f"--main_port {options.main_port} with --max_restarts {options.max_restarts}: each "
            f"restart takes the next port, and there is none above {LAST_PORT}; give a smaller one"
        )
    if options.env and not options.hostfile:
        raise UsageError("--env is for --hostfile; elsewhere the environment is there already")
    if options.hostfile:
        for flag in ("nodes", "node_rank", "rendezvous_file"):
            if getattr(options, flag) is not None:
                raise UsageError(
                    f"--hostfile and --{flag} are two ways to say the same: the hostfile gives the "
                    f"nodes and their order; leave --{flag} out"
                )
    if options.rendezvous_file:
        for flag in ("node_rank", "main_ip"):
            if getattr(options, flag) is not None:
                raise UsageError(
                    f"--rendezvous_file and --{flag} are two ways to say the same: the nodes find "
                    f"that out through the file; leave --{flag} out"
                )
        if options.nodes is None:
            raise UsageError("--rendezvous_file needs --nodes N: how many nodes to wait for")
        if options.print:
            raise UsageError(
                "--print cannot show what --rendezvous_file will find out; give --node_rank and "
                "--main_ip instead"
            )
    if options.node_rank is not None:
        if options.nodes is None:
            raise UsageError("--node_rank needs --nodes N: how many nodes there are")
        if options.node_rank >= options.nodes:
            raise UsageError(
                f"--node_rank {options.node_rank} does not exist with --nodes {options.nodes}: "
                f"they are numbered from 0 to {options.nodes - 1}"
            )
