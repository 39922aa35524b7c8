"""Two "nodes" on one machine: network namespaces with a virtual cable between them.

They live in a user namespace, so root is not needed where the kernel gives one to everybody, and
all of it is gone when the process that holds it ends: no name of it is seen outside.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launching import REPOSITORY

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE_ENDS = ("cable0", "cable1")  # the interface of each node

# `ip netns` keeps its names in /run, of which this shell gets one of its own.
SET_UP = """
mount -t tmpfs tmpfs /run
for i in 0 1; do ip netns add node$i; done
ip link add cable0 netns node0 type veth peer name cable1 netns node1
for i in 0 1; do
  ip -n node$i addr add 10.77.0.$((i + 1))/24 dev cable$i
  ip -n node$i link set cable$i up
  ip -n node$i link set lo up
done
echo ready
exec cat
"""
# Also a host name for each, which nobody can resolve, as it may be on a cluster.
IN_NODE = 'hostname "$1"; cd "$2"; shift 2; exec "$@"'


class TwoNodes:
    """Commands run in node 0 and node 1; the cable between them can be cut."""

    def __init__(self, holder: int) -> None:
        self._enter = ["nsenter", "--target", str(holder), "--user", "--mount", "--net"]
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, node: int, command: list[str], log: Path, env: Mapping[str, str] = os.environ
    ) -> "subprocess.Popen[bytes]":
        """Start a command in a node; what it says goes to ``log``. Its pid is the process's own."""
        name = f"node{node}"
        words = [*self._enter, "ip", "netns", "exec", name, "unshare", "--uts"]
        words += ["sh", "-euc", IN_NODE, "sh", name, str(REPOSITORY), *command]
        with log.open("w") as output:
            process = subprocess.Popen(
                words,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def set_cable(self, state: str) -> None:
        """ "down" or "up", at node 1's end."""
        words = [*self._enter, "ip", "-n", "node1", "link", "set", CABLE_ENDS[1], state]
        subprocess.run(words, check=True, capture_output=True, timeout=30)

    def end_all(self) -> None:
        """Kill what still runs, with all of its children."""
        for process in self._started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
                process.kill()
                process.wait()


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The nodes, up and joined. Skips where they cannot be had, which CI=true makes a failure."""
    words = ["unshare", "--map-root-user", "--mount", "--net", "sh", "-euc", SET_UP]
    try:
        holder = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError as error:
        _skip(f"there is no {error.filename} here")
    assert holder.stdout is not None
    try:
        if holder.stdout.readline() != "ready\n":
            _skip(f"no network namespaces with a cable here: {holder.communicate()[1].strip()}")
        nodes = TwoNodes(holder.pid)
        try:
            yield nodes
        finally:
            nodes.end_all()
    finally:
        holder.kill()
        holder.wait()


def _skip(reason: str) -> None:
    reason += " (needs root or user namespaces, and the Debian package iproute2)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
