"""The exact command that trains on this node, what is set for it, and both in words."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import network
from .devices import gpu_count, threads_per_process, torch_build
from .nodes import Nodes
from .options import Options

REPOSITORY = Path(__file__).resolve().parents[2]
# Each names the interface for its library; without it, gloo takes the one that the host name
# resolves to, which is often the loopback interface.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Launch:
    """`accelerate launch` on this node: its words but for the port, and the variables to set."""

    options: Options
    nodes: Nodes
    processes: int  # of this node, as of every other
    threads: int
    variables: dict[str, str]

    def command(self, attempt: int = 0) -> list[str]:
        """The words of the command, for the first try (0) or a restart.

        A restart takes the next port: the node that failed first would else find the store of the
        try before, on a node that has not noticed yet, and join a job that is about to end.
        """
        nodes = self.nodes
        words = [str(Path(sys.executable).with_name("accelerate")), "launch"]
        words += ["--config_file", self.options.config_file]
        words += ["--num_machines", str(nodes.count)]
        words += ["--num_processes", str(nodes.count * self.processes)]
        port = nodes.main_port + (attempt if nodes.main_port else 0)
        words += ["--main_process_port", str(port)]
        if nodes.count > 1:
            words += ["--main_process_ip", str(nodes.main_ip), "--machine_rank", str(nodes.rank)]
            # Else Accelerate calls pdsh, trains on one node where there is no hostfile, and says
            # that all went well.
            words += ["--deepspeed_multinode_launcher", "standard"]
            words += ["--rdzv_conf", f"timeout={self.options.rendezvous_timeout}"]
        words += ["--num_cpu_threads_per_process", str(self.threads)]
        return [*words, *self.options.program, *self.options.recipe_flags]

    def shell_line(self) -> str:
        """The command with its variables, to be pasted into a shell in the repository."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*words, shlex.join(self.command())])

    def start_block(self, environment: Mapping[str, str]) -> str:
        """What this node is about to do, one fact a line."""
        nodes, options = self.nodes, self.options
        first = nodes.rank * self.processes
        ranks = f"{first} to {first + self.processes - 1}" if self.processes > 1 else f"{first}"
        found = {name: environment[name] for name in INTERFACE_VARIABLES if environment.get(name)}
        lines = {
            "node": f"{nodes.rank} of {nodes.count} ({network.host_name()}), {nodes.found_by}; "
            f"rank {ranks} of {nodes.count * self.processes}",
            "main": f"node 0 at {nodes.main_ip}, port {nodes.main_port}",
            "set here": _assignments(self.variables),
            "found set": _assignments(found) or f"none of {', '.join(INTERFACE_VARIABLES)}",
            "waits": f"{options.rendezvous_timeout} s for the other nodes (--rendezvous_timeout); "
            "in training, --ddp_timeout of the recipe",
            "restarts": f"{options.max_restarts} after a failure (--max_restarts)"
            + (", each on the next port" if options.max_restarts else ""),
        }
        return "\n".join(f"{name:>9}  {text}" for name, text in lines.items())


def _assignments(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def processes_per_node(options: Options) -> int:
    """As asked for, else one per GPU of this node, else 1."""
    return options.procs_per_node or gpu_count() or 1


def build_launch(
    options: Options, nodes: Nodes, processes: int, environment: Mapping[str, str]
) -> Launch:
    """Settle what ``environment`` leaves open; a variable that is set there, not empty, wins.

    Raises UsageError where node 0 cannot be reached or an interface does not exist.
    """
    threads = threads_per_process(processes)
    variables = {"OMP_NUM_THREADS": str(threads)}  # beside the flag, or torchrun warns
    if gpu_count() == 0 and torch_build("hip") is None:
        variables["DS_ACCELERATOR"] = "cpu"  # spares each rank a search and its warning
    if nodes.count > 1:
        if options.network_interface is not None:
            network.own_address(options.network_interface)  # refuses one that does not exist
        interface = options.network_interface or network.interface_towards(str(nodes.main_ip))
        variables |= dict.fromkeys(INTERFACE_VARIABLES, interface)
    variables = {name: value for name, value in variables.items() if not environment.get(name)}
    return Launch(options, nodes, processes, threads, variables)
