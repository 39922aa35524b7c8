"""Runs of a recipe whose collectives are counted: ``accelerate launch counted_traffic.py FILE``.

FILE is as for several_runs.py. Each rank writes ``traffic-RANK.json`` into its run's folder: what
it handed to collectives in each of the STEPS, call by call, and beside that what the kernel says
that this process sent over its sockets in the same time, an independent count of the total.

Calls are counted in torch's dispatcher, which every collective passes once, whoever makes it:
DeepSpeed, Accelerate, the recipe, or DDP's reducer in C++. An operation that is not in the table
below ends the run.
"""

import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mini_llm.parallel import spread_experts
from mini_llm.training.interruption import Interruption
from tests.distributed import several_runs

STEPS = (3, 4, 5)  # gathers and prefetches of ZeRO-3 have found their rhythm, nothing is logged
EVEN_ROUTING = "EVEN_ROUTING"  # in a run's environment: every expert gets as many tokens

# The dispatcher's operation -> (kind, the tensors whose bytes a rank hands to it).
COUNTED: dict[str, tuple[str, Callable[[Any], list[torch.Tensor]]]] = {
    "c10d.allreduce_.default": ("all_reduce", lambda args: args[0]),
    "c10d.broadcast_.default": ("broadcast", lambda args: args[0]),
    "c10d._allgather_base_.default": ("all_gather", lambda args: [args[0]]),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", lambda args: [args[1]]),
    "c10d.alltoall_base_.default": ("all_to_all", lambda args: [args[1]]),
}


class CollectiveCounter(TorchDispatchMode):
    """Notes the collectives of this thread while ``step`` is one of STEPS."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.calls: dict[int, list[dict[str, Any]]] = {step: [] for step in STEPS}
        self.exchanged: dict[int, tuple[int, int, float]] = {}  # Wire.read() of each step
        self.socket_bytes: dict[int, int] = {}  # when a step begins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and self.step in STEPS:
            kind, handed = COUNTED[str(func)]
            group = next(
                dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject)
            )
            ranks = dist.get_process_group_ranks(group)
            for tensor in handed(args):
                call = {
                    "kind": kind,
                    "ranks": len(ranks),
                    "stride": ranks[1] - ranks[0] if len(ranks) > 1 else 1,
                    "type": str(tensor.dtype).removeprefix("torch."),
                    "elements": tensor.numel(),
                    "bytes": tensor.numel() * tensor.element_size(),
                }
                if kind == "all_to_all" and args[4]:  # rows by given counts, else the same to all
                    rows, here = args[4], args[4][ranks.index(dist.get_rank())]
                    call["left"] = call["bytes"] * (sum(rows) - here) // sum(rows)
                self.calls[self.step].append(call)
        return func(*args, **(kwargs or {}))

    def begin_step(self) -> None:
        """The recipe is about to make the first collective of a step."""
        self.step += 1
        self.socket_bytes[self.step] = bytes_sent_over_sockets()

    def write(self, folder: Path) -> None:
        """``traffic-RANK.json``."""
        sent = {s: self.socket_bytes[s + 1] - self.socket_bytes[s] for s in STEPS}
        content = {
            str(step): {
                "calls": self.calls[step],
                "exchanged": self.exchanged.get(step),
                "socket_bytes": sent[step],
            }
            for step in STEPS
        }
        (folder / f"traffic-{dist.get_rank()}.json").write_text(json.dumps(content))


def bytes_sent_over_sockets() -> int:
    """What this process's open TCP sockets have sent so far, resent bytes not counted.

    From the kernel's ``struct tcp_info``: ``tcpi_bytes_sent`` less ``tcpi_bytes_retrans``.
    """
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            duplicate = os.dup(int(descriptor))
        except OSError:  # that of the listing itself
            continue
        with socket.socket(fileno=duplicate) as tcp:
            if (
                tcp.family not in (socket.AF_INET, socket.AF_INET6)
                or tcp.type != socket.SOCK_STREAM
            ):
                continue
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
            sent, resent = struct.unpack_from("QQ", info, 200)
            total += sent - resent
    return total


@contextlib.contextmanager
def counted(flags: list[str]) -> Iterator[None]:
    """Count the collectives of the run with these flags; it ends once they are written down."""
    counter = CollectiveCounter()
    wishes, read = Interruption.wishes, spread_experts.Wire.read

    def mark_step(self: Any) -> Any:  # asked for just before a step's first collective
        counter.begin_step()
        if counter.step > STEPS[-1]:  # enough: no checkpoint, no export
            counter.write(Path(flags[flags.index("--output_dir") + 1]))
            dist.barrier()
            os._exit(0)
        return wishes(self)

    def note_exchanged(self: Any) -> Any:  # read before that, so this is the step that is over
        counter.exchanged[counter.step] = found = read(self)
        return found

    Interruption.wishes = mark_step  # type: ignore[method-assign]
    spread_experts.Wire.read = note_exchanged  # type: ignore[method-assign]
    if os.environ.get(EVEN_ROUTING):
        spread_experts.SpreadExperts.forward = with_even_routing(  # type: ignore[method-assign]
            spread_experts.SpreadExperts.forward
        )
    with counter:
        yield


def with_even_routing(forward: Any) -> Any:
    """SpreadExperts.forward, all experts taking their turn whatever the router says."""

    def even(self: Any, hidden: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        turns = torch.arange(top_k_index.numel(), device=top_k_index.device) % self.num_experts
        return forward(self, hidden, turns.view_as(top_k_index), top_k_weights)

    return even


if __name__ == "__main__":
    several_runs.run_all(Path(sys.argv[1]), counted)
