"""How many nodes there are, which one this is, and where the first one listens."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mini_llm.command_line import UsageError

from . import network
from .options import Options
from .rendezvous import Registration, meet

# torchrun's own default. Fixed, because every node must know it without asking.
DEFAULT_PORT = 29500
# SLURM jobs that share a node must not share a port. A job has PORTS_PER_JOB, for its restarts, and
# all of them lie below the range from which Linux takes the ports of outgoing connections.
FIRST_SLURM_PORT, SLURM_JOBS, PORTS_PER_JOB = 10_000, 1000, 20


@dataclass(frozen=True)
class Nodes:
    """This node's place; ``main_ip`` is an address or a name of node 0, None on a single node.

    ``main_port`` 0: any free one, on a single node.
    """

    count: int = 1
    rank: int = 0
    main_ip: str | None = None
    main_port: int = 0
    found_by: str = ""  # in words, for the start block


def find_nodes(options: Options, environment: Mapping[str, str], processes: int) -> Nodes:
    """Work it out from the flags, the rendezvous file or SLURM's environment.

    ``processes`` of each node. Raises UsageError in one sentence where that is not enough.
    """
    if options.rendezvous_file and (options.nodes or 1) > 1:
        nodes = _from_rendezvous(options, environment, processes)
    elif options.node_rank is not None and (options.nodes or 1) > 1:
        if options.main_ip is None:
            raise UsageError(
                f"--nodes {options.nodes} --node_rank {options.node_rank} needs --main_ip IP: an "
                "address of node 0 that all nodes reach"
            )
        port = DEFAULT_PORT if options.main_port is None else options.main_port
        assert options.nodes is not None
        nodes = Nodes(options.nodes, options.node_rank, options.main_ip, port, "by hand")
    else:
        nodes = _from_slurm(options, environment) or _single(options)
    if nodes.count > 1 and nodes.main_port == 0:
        raise UsageError("--main_port 0 (any free port) is for one node; all nodes must know it")
    return nodes


def _single(options: Options) -> Nodes:
    if options.nodes is not None and options.nodes > 1:
        raise UsageError(
            f"--nodes {options.nodes} does not say which node this is; add --node_rank R and "
            "--main_ip IP, or --rendezvous_file PATH, or start by srun or with --hostfile"
        )
    if options.main_ip is not None and options.nodes is None:
        raise UsageError("--main_ip needs --nodes N and --node_rank R: which node of how many")
    return Nodes(main_port=options.main_port or 0)


def _from_rendezvous(options: Options, environment: Mapping[str, str], processes: int) -> Nodes:
    assert options.rendezvous_file is not None and options.nodes is not None
    # Gloo takes a list too, and the address under which others reach it is that of the first.
    chosen = environment.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    interface = options.network_interface or chosen or None
    mine = Registration(
        host=network.host_name(),
        address=network.own_address(interface),
        port=DEFAULT_PORT if options.main_port is None else options.main_port,
        nodes=options.nodes,
        processes=processes,
    )
    found = meet(options.rendezvous_file, mine, job_key(environment), options.rendezvous_timeout)
    main = found.registrations[0]
    return Nodes(
        options.nodes, found.rank, main.address, main.port, f"by {options.rendezvous_file}"
    )


# The variables in which batch systems name the job.
JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


def job_key(environment: Mapping[str, str]) -> str:
    """What the nodes of one job have in common and, under a batch system, no other job has."""
    for variable in JOB_ID_VARIABLES:
        if job := environment.get(variable):
            restart = environment.get("SLURM_RESTART_COUNT", "0")  # a requeued job keeps its id
            return re.sub(r"[^A-Za-z0-9]+", "_", f"{job}-{restart}")
    return "job"


# ---------------------------------------------------------------- SLURM

# The step in which we run, where it is none that srun started.
BATCH = ""  # a batch script, which has no step id
SLURM_SHELL = "4294967290"  # the shell that salloc opens


def _from_slurm(options: Options, environment: Mapping[str, str]) -> Nodes | None:
    """This task of `srun`; None outside SLURM, and on one node of it."""
    if "SLURM_JOB_ID" not in environment:
        return None
    allocated = _slurm_number(environment, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    step = environment.get("SLURM_STEP_ID", BATCH)
    if step in (BATCH, SLURM_SHELL):
        if allocated > 1 and options.nodes != 1:
            raise UsageError(
                f"this SLURM job has {allocated} nodes, but only srun starts something on each: "
                "srun --ntasks-per-node=1 ./launch.sh …, or --nodes 1 to use this node alone"
            )
        return None
    count = _slurm_number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = _slurm_number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks != count:
        raise UsageError(
            f"srun started {tasks} tasks on {count} node(s), but one a node is right, which starts "
            "the processes itself; add --ntasks-per-node=1 to srun"
        )
    if options.nodes not in (None, count):
        raise UsageError(
            f"--nodes {options.nodes} contradicts SLURM, which runs this on {count} node(s); leave "
            f"--nodes out, or give srun --nodes={options.nodes}"
        )
    if count == 1:
        return None
    port = FIRST_SLURM_PORT
    port += int(environment["SLURM_JOB_ID"]) % SLURM_JOBS * PORTS_PER_JOB
    return Nodes(
        count,
        _slurm_number(environment, "SLURM_NODEID"),
        options.main_ip or _first_host(environment),
        port if options.main_port is None else options.main_port,
        f"by SLURM, job {environment['SLURM_JOB_ID']}",
    )


def _slurm_number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    raise UsageError(
        f"SLURM's environment has no number in {' or '.join(names)}; give --nodes, --node_rank and "
        "--main_ip instead"
    )


def _first_host(environment: Mapping[str, str]) -> str:
    """Of the nodes of this step, which need not be all of the job."""
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    question = ["scontrol", "show", "hostnames", names]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, check=True)
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UsageError(
            f"'{' '.join(question)}' names no node 0 ({error}); give it with --main_ip IP"
        ) from None
