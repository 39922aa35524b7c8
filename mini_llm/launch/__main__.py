"""`python -m mini_llm.launch pretrain|sft|verify FLAGS`: what launch.sh hands over to.

`python -m mini_llm.launch gpus` prints how many GPUs training can use.
"""

import os
import shlex
import subprocess
import sys
from types import FrameType
from typing import NoReturn

from mini_llm.command_line import UsageError
from mini_llm.verify.arguments import parse_flags
from mini_llm.verify.arguments import parser as verify_parser

from . import network
from .command import REPOSITORY, build_launch, processes_per_node
from .devices import gpu_count
from .fan_out import fan_out, host_commands, read_hostfile
from .nodes import find_nodes
from .options import HELP, Options, check_options, parse_options
from .quiet import quietly
from .supervise import USAGE_ERROR, on_signals, supervise


def main(words: list[str]) -> int:
    """Run the command and return its exit status: 2 for a wrong command line, in one sentence."""
    match words:
        case ["gpus"]:
            print(gpu_count())
            return 0
        case [("pretrain" | "sft" | "verify") as recipe, *flags]:
            os.chdir(REPOSITORY)  # where relative paths start, also those in Accelerate configs
            try:
                return launch(parse_options(recipe, flags))
            except UsageError as error:
                print(f"launch.sh: {recipe}: {error}", file=sys.stderr)
                return USAGE_ERROR
        case _:
            print("usage: python -m mini_llm.launch pretrain|sft|verify FLAGS", file=sys.stderr)
            return USAGE_ERROR


def launch(options: Options) -> int:
    """Start what the options ask for, on this node or on all hosts. Raises UsageError."""
    if options.help:
        print(HELP, flush=True)
        if options.recipe == "verify":
            print(verify_parser().format_help())
            return 0
        return subprocess.run([sys.executable, f"recipes/{options.recipe}.py", "--help"]).returncode
    check_options(options)
    if options.recipe == "verify":
        parse_flags(options)  # before any node waits for another
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
        commands = host_commands(options, hosts, os.environ, REPOSITORY)
        if options.print:
            print("\n".join(shlex.join(command) for command in commands.values()))
            return 0
        return fan_out(commands)

    processes = processes_per_node(options)
    nodes = find_nodes(options, os.environ, processes)
    ready = build_launch(options, nodes, processes, os.environ)
    if nodes.rank == 0 and nodes.main_ip is not None:
        network.check_is_this_machine(nodes.main_ip)
        if not options.print:
            network.check_port_is_free(nodes.main_port)
    if options.recipe == "verify":
        from mini_llm.verify.driver import verify  # imports torch

        return verify(options, nodes, processes)
    if options.print:
        print(ready.shell_line())
        return 0
    hint = ""
    if nodes.count > 1:
        print(ready.start_block(os.environ), flush=True)
        hint = (
            f"the nodes meet at {nodes.main_ip}, port {nodes.main_port}, within "
            f"{options.rendezvous_timeout} s; check that all {nodes.count} were started with the "
            "same --nodes and --main_port, and that no firewall is between them"
        )
    return supervise(
        lambda attempt: quietly(ready.command(attempt)),
        {**os.environ, **ready.variables},
        max_restarts=options.max_restarts,
        hint_without_ranks=hint,
    )


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """On a signal before anything was started: clear up what a rendezvous began, and end."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    on_signals(leave)
    sys.exit(main(sys.argv[1:]))
