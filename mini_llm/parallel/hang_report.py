"""Which rank the others wait for, from what each of them said last; nothing here talks to anyone.

A rank that waits in a collective and one that never reaches it look alike from outside: neither
gets on. What tells them apart, in this order: a rank that failed, or that gives no sign of life;
one that is behind the others; the one that stands outside of a collective while they stand in one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Where a rank stands.
COLLECTIVE = "in a collective"
BACKWARD = "in a backward pass, which may wait for other ranks"
ELSEWHERE = "outside of any collective"

# Calls of these wait for other ranks.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_WAITING_LIBRARIES = ("torch/", "deepspeed/")


@dataclass(frozen=True)
class Frame:
    """One call of a stack."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{'/'.join(self.path.split('/')[-3:])}:{self.line} {self.function}"


@dataclass(frozen=True)
class RankState:
    """What is known of a rank: its last sign of life, and its answer if it answered."""

    rank: int
    host: str
    pid: int
    beats: int  # how often it has said that it gets on: the same work makes as many on all ranks
    step: int
    phase: str
    clock: str  # of this sign of life, by the clock of its machine
    where: str = ""  # COLLECTIVE, BACKWARD or ELSEWHERE; "" as long as it does not answer
    frames: tuple[Frame, ...] = ()  # its main thread's innermost calls, the innermost last
    failure: str = ""  # the exception that ends it, unless that only says that a peer is gone

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def place(self) -> str:
        """Step and phase in words."""
        return f"at step {self.step}, {self.phase}" if self.step else f"before step 1, {self.phase}"


def standing(stack: Sequence[Frame]) -> str:
    """Where a thread with this stack (the innermost call last) stands."""
    if any(part in frame.path for frame in stack for part in _COLLECTIVES):
        return COLLECTIVE
    if not stack:
        return ELSEWHERE
    innermost = stack[-1]
    if innermost.function == "wait" and any(p in innermost.path for p in _WAITING_LIBRARIES):
        return COLLECTIVE  # for one that was begun before
    if innermost.path.endswith("torch/nn/parallel/distributed.py"):
        return COLLECTIVE
    return BACKWARD if "torch/autograd/" in innermost.path else ELSEWHERE


def name_late_ranks(
    states: Mapping[int, RankState], world_size: int, processes: Mapping[int, str]
) -> str:
    """Sentences on who is late, and why we think so.

    ``states`` holds the ranks that ever gave a sign of life; ``processes`` says of some silent ones
    what became of their process ("suspended").
    """
    failed = [s for s in states.values() if s.failure]
    missing = [rank for rank in range(world_size) if rank not in states]
    silent = [s for s in states.values() if not s.where and not s.failure]
    answered = [s for s in states.values() if s.where and not s.failure]
    lines = [f"{s} failed {s.place}: {s.failure}" for s in failed]
    if failed:
        return "\n".join(lines)
    if missing:
        lines.append(
            f"{ranks_in_words(missing)} never gave a sign of life: not started, or without a way "
            "to the main node"
        )
    for s in silent:
        cause = processes.get(s.rank, "stopped, or its machine or network is gone")
        lines.append(f"{s} is late {s.place}: no sign of life since {s.clock}, its time ({cause})")
    if lines or not answered:
        return "\n".join(lines)
    late = answered
    first = min(s.beats for s in late)
    behind = [s for s in late if s.beats == first]
    outside = [s for s in behind if s.where == ELSEWHERE]
    if len(behind) < len(late):
        late = outside or behind
        leader = max(answered, key=lambda s: s.beats)
        again = ", a later one" * (leader.place == late[0].place)
        why = f"it is behind rank {leader.rank}, which is {leader.place}{again}"
    elif 0 < len(outside) < len(late):
        late = outside
        why = "it alone is not" if len(late) == 1 else "they alone are not"
        why += " in a collective, in which the others wait"
    else:
        if all(s.where == COLLECTIVE for s in late):
            what = "all wait, in collectives that do not match or for what a network lost"
        else:
            what = "which one the others wait for cannot be told"
        places = "".join(f"\n  {s}: {s.place}, {s.where}: {_calls(s)}" for s in answered)
        return f"no rank is behind the others; {what}{places}"
    return "\n".join(f"{s} is late {s.place}: {why}; it stands at {_calls(s)}" for s in late)


def _calls(state: RankState) -> str:
    return " > ".join(map(str, state.frames)) or "(no Python code)"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(words)}"
