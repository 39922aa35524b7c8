"""A hostfile: start `launch.sh` on every host by pdsh or ssh, and end them all together.

Each host gets a connection of its own, over which it says the process id of its launcher first.
Signals are sent to that id through another connection, because neither ssh nor pdsh carries them.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from mini_llm.command_line import UsageError

from .nodes import DEFAULT_PORT
from .options import Options
from .supervise import end_with_parent, on_signals
from .terminal import go_on_without

# What a node gets from here of the environment. No tokens, and never all of it.
HANDED_ON = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"),
    *("NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE"),
    *("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE"),
    *("MINI_LLM_VENV", "MINI_LLM_CACHE", "TORCH_EXTENSIONS_DIR"),
)
PROCESS_MARK = "mini_llm launcher process"
# After a failure, until what is left on the other hosts is killed: more than a rank takes to save.
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Host:
    """A line of the hostfile; ``name`` is what ssh takes, ``user@host`` too."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """DeepSpeed's format: "host slots=8" a line, # for comments. UsageError names a wrong one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UsageError(
            f"--hostfile {path} cannot be read ({why}); give a file with a line "
            "'host slots=8' for every node"
        ) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None
        # A "-" would begin an option of ssh, brackets and commas be several hosts to pdsh.
        if slots is None or not re.fullmatch(r"[\w.:@][\w.:@-]*", words[0]):
            raise UsageError(
                f"--hostfile {path}, line {number}: '{line.strip()}' is not of the form 'host "
                "slots=8', with at least one slot"
            )
        if words[0] in (host.name for host in hosts):
            raise UsageError(
                f"--hostfile {path}, line {number}: {words[0]} is there already; give each host "
                "one line"
            )
        hosts.append(Host(words[0], int(slots[1])))
    if not hosts:
        raise UsageError(f"--hostfile {path} names no host; add a line 'host slots=8' for each")
    for host in hosts:
        address = host.name.rpartition("@")[2]
        if len(hosts) > 1 and (address in ("localhost", "::1") or address.startswith("127.")):
            raise UsageError(
                f"--hostfile {path}: {host.name} means another machine on each of the "
                f"{len(hosts)} hosts; give the name by which the others reach it"
            )
    return hosts


def host_commands(
    options: Options, hosts: list[Host], environment: Mapping[str, str], repository: Path
) -> dict[str, list[str]]:
    """Host name -> the command that starts its launcher from here. Raises UsageError."""
    processes = _processes(options, hosts)
    missing = [name for name in options.env if name not in environment]
    if missing:
        raise UsageError(
            f"--env {missing[0]}: that variable is not set here; set it or leave it out"
        )
    names = [*dict.fromkeys([*HANDED_ON, *options.env])]
    handed_on = {name: environment[name] for name in names if name in environment}
    main_ip = options.main_ip or hosts[0].name.rpartition("@")[2]
    transport = find_transport()
    commands = {}
    for rank, host in enumerate(hosts):
        flags = ["--config_file", options.config_file, "--procs_per_node", str(processes)]
        flags += ["--nodes", str(len(hosts)), "--node_rank", str(rank), "--main_ip", main_ip]
        port = DEFAULT_PORT if options.main_port is None else options.main_port
        flags += ["--main_port", str(port), "--max_restarts", str(options.max_restarts)]
        flags += ["--rendezvous_timeout", str(options.rendezvous_timeout)]
        if options.network_interface is not None:
            flags += ["--network_interface", options.network_interface]
        line = _shell_line(
            host, [options.recipe, *flags, *options.recipe_flags], handed_on, repository
        )
        commands[host.name] = [*transport, host.name, line]
    return commands


def _processes(options: Options, hosts: list[Host]) -> int:
    """On each host: as asked for, else its slots."""
    if options.procs_per_node is not None:
        for host in hosts:
            if host.slots < options.procs_per_node:
                raise UsageError(
                    f"--procs_per_node {options.procs_per_node} is more than the slots={host.slots}"
                    f" of {host.name} in --hostfile {options.hostfile}; give fewer"
                )
        return options.procs_per_node
    for host in hosts[1:]:
        if host.slots != hosts[0].slots:
            raise UsageError(
                f"--hostfile {options.hostfile}: {hosts[0].name} has slots={hosts[0].slots} but "
                f"{host.name} slots={host.slots}, and every node runs as many processes; give "
                "--procs_per_node N"
            )
    return hosts[0].slots


def _shell_line(
    host: Host, words: list[str], variables: Mapping[str, str], repository: Path
) -> str:
    """For the login shell of a host, whichever that is."""
    folder = shlex.quote(str(repository))
    assignments = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    absent = (
        f"launch.sh: {words[0]}: {host.name} has no {repository}/launch.sh; the project must lie "
        "at the same path on every host, on a shared file system say"
    )
    script = (
        f"echo {PROCESS_MARK} $$; "
        f"[ -x {folder}/launch.sh ] || {{ echo {shlex.quote(absent)} >&2; exit 2; }}; "
        f"cd {folder} && {assignments}exec ./launch.sh {shlex.join(words)}"
    )
    return f"exec /bin/sh -c {shlex.quote(script)}"


def find_transport() -> list[str]:
    """The words before a host's name. Raises UsageError where there is neither pdsh nor ssh."""
    if shutil.which("pdsh"):
        # -S: the exit status of the command; -N: no host name before each line, we add it.
        remote = [] if "PDSH_RCMD_TYPE" in os.environ else ["-R", "ssh"]
        return ["pdsh", "-S", "-N", *remote, "-w"]
    if shutil.which("ssh"):
        return ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=30"]
    raise UsageError(
        "--hostfile needs pdsh or ssh, and neither is installed here; install one, or start every "
        "node by hand with --nodes, --node_rank and --main_ip"
    )


def fan_out(commands: Mapping[str, list[str]], *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Run them all to their end; return 0, or the exit status of the first that failed.

    When one fails, the others are ended. A signal to this process goes to all of them.
    """
    nodes = [_Node(host, command) for host, command in commands.items()]
    status, deadline = 0, float("inf")

    def hand_on(number: int, frame: FrameType | None) -> None:
        for node in nodes:  # whose own terminal is not the one that was closed
            node.signal(signal.SIGTERM if number == signal.SIGHUP else number)

    on_signals(hand_on)
    while any(node.status() is None for node in nodes):
        for node in nodes:
            ended = node.status()
            if ended and not status:
                status = ended
                deadline = time.monotonic() + grace_seconds
                _say(f"{node.host} ended with status {status}; ending the others")
                hand_on(signal.SIGTERM, None)
        if time.monotonic() > deadline:
            deadline = float("inf")
            for node in nodes:
                node.kill()
        time.sleep(0.1)
    for node in nodes:
        node.finish()
        status = status or node.status() or 0
    return status


class _Node:
    """The launcher of one host, at the other end of a connection."""

    def __init__(self, host: str, command: list[str]) -> None:
        self.host = host
        *self._transport, _ = command
        self._process_id: int | None = None
        self._connection = _start(command, output=subprocess.PIPE)
        self._reader = threading.Thread(target=self._forward, daemon=True)
        self._reader.start()

    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        status = self._connection.poll()
        return 128 - status if status is not None and status < 0 else status

    def signal(self, number: int) -> None:
        """Hand a signal on to its launcher; before that is there, end the connection."""
        if self.status() is not None:
            return
        if self._process_id is None:
            self._connection.terminate()
        else:
            name = signal.Signals(number).name.removeprefix("SIG")
            _start([*self._transport, f"kill -{name} {self._process_id}"])

    def kill(self) -> None:
        """At once; its ranks notice that their launcher is gone."""
        if self.status() is None:
            _say(f"{self.host} has not ended; killing its launcher")
            self.signal(signal.SIGKILL)

    def finish(self) -> None:
        """Forward what is left of its output."""
        self._reader.join(timeout=10)

    def _forward(self) -> None:
        output: IO[bytes] | None = self._connection.stdout
        assert output is not None
        for line in output:
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if self._process_id is None and (found := re.fullmatch(rf"{PROCESS_MARK} (\d+)", text)):
                self._process_id = int(found[1])
            else:
                try:
                    print(f"{self.host}: {text}", flush=True)
                except OSError as error:  # read on, or the host waits for ever to write
                    go_on_without(sys.stdout, error)


def _start(command: list[str], output: int | None = None) -> "subprocess.Popen[bytes]":
    """Where no Ctrl-C of this terminal finds it; it ends when this process is killed."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def _say(text: str) -> None:
    print(f"launch.sh: {text}", file=sys.stderr, flush=True)
