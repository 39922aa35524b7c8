"""What the drivers of all nodes tell each other, through a store that node 0 keeps.

Node 0 decides what runs next and for how long, and hears from every node how that ended: so all
start the same launches in the same order, whatever their clocks say or one of them lost.
"""

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from mini_llm.launch.nodes import Nodes
from mini_llm.launch.options import UsageError

FAREWELL_SECONDS = 20.0


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
    """This node's end of the store. Raises UsageError if the nodes do not come together."""

    def __init__(self, nodes: Nodes, patience: int) -> None:
        self.nodes = nodes
        host = nodes.main_ip or "127.0.0.1"
        try:
            self._store = TCPStore(
                host,
                nodes.main_port,  # 0 on a single node: any free one
                world_size=nodes.count,
                is_master=nodes.rank == 0,
                timeout=timedelta(seconds=patience),
                wait_for_workers=True,
            )
        except DistError as error:
            raise UsageError(
                f"within {patience} s not all {nodes.count} nodes came to {host}, port "
                f"{nodes.main_port} (--rendezvous_timeout); start the same command on all of them, "
                f"and check that no firewall is between them ({error})"
            ) from None

    def tell(self, key: str, content: Any) -> None:
        """For whoever asks."""
        self._store.set(key, json.dumps(content))

    def hear(self, key: str, seconds: float) -> Any:
        """Wait for it; None if it did not come in time, or node 0 is gone."""
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except DistError:
            return None
        return json.loads(self._store.get(key))

    def say_farewell(self) -> None:
        """Node 0 keeps the store until the others have heard all they need."""
        self.tell(f"farewell/{self.nodes.rank}", True)
        if self.nodes.rank == 0:
            for node in range(self.nodes.count):
                self.hear(f"farewell/{node}", FAREWELL_SECONDS)
