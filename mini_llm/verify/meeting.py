"""What the drivers of all nodes tell each other, through a store that node 0 keeps.

Node 0 decides what runs next and for how long, and hears from every node how that ended: so all
start the same launches in the same order, whatever their clocks say or one of them lost.
"""

import json
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from mini_llm.command_line import UsageError
from mini_llm.launch.nodes import Nodes

FAREWELL_SECONDS = 20.0
ANSWER_SECONDS = 60.0  # of the store, once it is there
LOOK_SECONDS = 0.2  # the store's own waiting would be deaf to signals


@dataclass(frozen=True)
class Outcome:
    """How a step ended on a node; ``status`` None: its time ran out and it was ended."""

    status: int | None
    said: str = ""  # of a failure: the line that says most

    @property
    def is_ok(self) -> bool:
        """Whether it did what it should."""
        return self.status == 0


class Meeting:
    """This node's end of the store. Raises UsageError if node 0 does not open it in time."""

    def __init__(self, nodes: Nodes, patience: int) -> None:
        self.nodes, self.patience = nodes, patience  # seconds
        self._host = nodes.main_ip or "127.0.0.1"
        if nodes.rank != 0:
            self._wait_for_node_0()
        self._store = TCPStore(
            self._host,
            nodes.main_port,  # 0 on a single node: any free one
            is_master=nodes.rank == 0,
            timeout=timedelta(seconds=ANSWER_SECONDS),
            wait_for_workers=False,
        )

    def _wait_for_node_0(self) -> None:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                socket.create_connection((self._host, self.nodes.main_port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise self.absent(0, str(error)) from None
            time.sleep(LOOK_SECONDS)

    def absent(self, node: int, why: str = "it has not answered") -> UsageError:
        """What to say of a node that did not come."""
        return UsageError(
            f"node {node} did not come to {self._host}, port {self.nodes.main_port}, within "
            f"{self.patience} s ({why}; --rendezvous_timeout); start the same command on all "
            f"{self.nodes.count} nodes, and check that no firewall is between them"
        )

    def tell(self, key: str, content: Any) -> None:
        """For whoever asks."""
        self._store.set(key, json.dumps(content))

    def hear(self, key: str, seconds: float) -> Any:
        """Wait for it; None if it did not come in time, or node 0 is gone."""
        deadline = time.monotonic() + seconds
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(LOOK_SECONDS)
            return json.loads(self._store.get(key))
        except DistError:
            return None

    def say_farewell(self) -> None:
        """Node 0 keeps the store until the others have heard all they need."""
        self.tell(f"farewell/{self.nodes.rank}", True)
        if self.nodes.rank == 0:
            for node in range(self.nodes.count):
                self.hear(f"farewell/{node}", FAREWELL_SECONDS)
