"""From what the ranks measured to rows of the table. Nothing here judges absolute speed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .pairs import BETWEEN_NODES, SAME_NODE
from .table import Row, Verdict

SLOW_RANK = 1.25  # times the median of the ranks
SLOW_PAIR = 0.5  # of the median of its kind
# Of the large presets a checkpoint is about 3 GB; two are kept while a third is written.
LEAST_FREE_BYTES = 10 * 10**9
# Ranks that differ in these may well train alike; in others (versions of packages, the code) they
# compute other things or cannot talk to each other.
MAY_DIFFER = ("python", "driver", "GPU")
NONE = "none"  # a version of what is not there


@dataclass(frozen=True)
class Disk:
    """What the first rank of a node found at the checkpoint path; ``error``: why it cannot write.

    Bytes and bytes/s. ``shared``: it sees the file that rank 0 wrote.
    """

    error: str | None = None
    free: int = 0
    write_speed: float = 0.0
    shared: bool = True


@dataclass(frozen=True)
class PairSpeed:
    """A pair's bandwidth in bytes/s in one operation ("all-reduce" or "all-to-all")."""

    kind: str
    operation: str
    ranks: tuple[int, int]
    speed: float


class Ranks:
    """Names ranks with their hosts."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts

    def name(self, ranks: Sequence[int]) -> str:
        """E.g. "ranks 0-3 (alpha), 8 (beta)"."""
        by_host: dict[str, list[int]] = {}
        for rank in sorted(ranks):
            by_host.setdefault(self.hosts[rank], []).append(rank)
        named = ", ".join(f"{numbers(own)} ({host})" for host, own in by_host.items())
        return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def numbers(sorted_numbers: Sequence[int]) -> str:
    """E.g. "0-3, 6" for 0, 1, 2, 3, 6."""
    spans: list[list[int]] = []
    for number in sorted_numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else f"{s[0]}" for s in spans)


def version_rows(facts: Sequence[Mapping[str, str]], ranks: Ranks) -> list[Row]:
    """One row if all ranks have the same; else one for each name in which they differ."""
    differing = []
    for name in dict.fromkeys(name for own in facts for name in own):
        holders: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            holders.setdefault(own.get(name, NONE), []).append(rank)
        if len(holders) > 1:
            most_first = sorted(holders.items(), key=lambda item: -len(item[1]))
            text = "; ".join(f"{value} on {ranks.name(own)}" for value, own in most_first)
            verdict: Verdict = "WARN" if name in MAY_DIFFER else "FAIL"
            differing.append(Row(f"same {name}", verdict, f"{len(holders)} different", text))
    same = [
        f"{name} {value}"
        for name, value in facts[0].items()
        if value != NONE and all(own.get(name) == value for own in facts)
    ]
    listed = ("the rest: " if differing else "") + ", ".join(same)
    return [*differing, Row("same versions", "ok", f"{len(facts)} rank(s)", listed)]


def disk_rows(disks: Mapping[int, Disk], output_dir: str, ranks: Ranks) -> list[Row]:
    """By the first rank of every node."""
    broken = {rank: disk.error for rank, disk in disks.items() if disk.error is not None}
    if broken:
        first = next(iter(broken.values()))
        reason = f"{output_dir} cannot be written by {ranks.name(list(broken))}: {first}"
        return [Row("disk", "FAIL", "", f"{reason}; give another --output_dir")]
    rows = []
    full = [rank for rank, disk in disks.items() if disk.free < LEAST_FREE_BYTES]
    least = min(disk.free for disk in disks.values())
    rows.append(
        Row(
            "disk: free",
            "WARN" if full else "ok",
            f"{least / 1e9:.1f} GB",
            f"{output_dir} has less than {LEAST_FREE_BYTES / 1e9:.0f} GB free for checkpoints, "
            f"seen by {ranks.name(full)}"
            if full
            else f"at {output_dir}",
        )
    )
    slowest = min(disks, key=lambda rank: disks[rank].write_speed)
    speed = f"{disks[slowest].write_speed / 1e6:.0f} MB/s"
    text = f"written and synced by {ranks.name([slowest])}"
    text += f", the slowest of {len(disks)} nodes at once" if len(disks) > 1 else ""
    rows.append(Row("disk: write", "ok", speed, text))
    if len(disks) > 1:
        apart = [rank for rank, disk in disks.items() if not disk.shared]
        text = "all nodes see the same folder"
        if apart:
            text = (
                f"node-local: {ranks.name(apart)} do(es) not see what rank 0 writes to "
                f"{output_dir}; a run needs one folder that all nodes share"
            )
        rows.append(Row("disk: shared", "FAIL" if apart else "ok", "", text))
    return rows


def slow_ranks(seconds: Sequence[float]) -> list[int]:
    """Those that took more than 1.25 times the median; of two ranks, than the faster."""
    middle = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > SLOW_RANK * middle]


def compute_row(kind: str, operations: float, seconds: Sequence[float], ranks: Ranks) -> Row:
    """Median times of a matrix product of ``operations`` FLOP on each rank."""
    middle = statistics.median_low(seconds)
    figure = f"{operations / middle / 1e12:.3g} TFLOP/s"
    slow = slow_ranks(seconds)
    if not slow:
        spread = max(seconds) / min(seconds)
        text = "one rank: nothing to compare" if len(seconds) == 1 else f"spread {spread:.2f}x"
        return Row(f"compute {kind}", "ok", figure, f"median of the ranks, {text}")
    slowest = max(slow, key=lambda rank: seconds[rank])
    text = (
        f"slow: {ranks.name(slow)}, up to {seconds[slowest] / middle:.2f}x the median time "
        f"(limit {SLOW_RANK}x); all others wait for them in every step"
    )
    return Row(f"compute {kind}", "WARN", figure, text)


def slow_pairs(speeds: Sequence[PairSpeed]) -> list[PairSpeed]:
    """Those of one kind and operation that have less than half of the median."""
    middle = statistics.median(own.speed for own in speeds)
    return [own for own in speeds if own.speed < SLOW_PAIR * middle]


def pair_rows(speeds: Sequence[PairSpeed], ranks: Ranks) -> list[Row]:
    """A row for every kind and operation, also where there is no such pair."""
    rows = []
    for kind in (SAME_NODE, BETWEEN_NODES):
        for operation in ("all-reduce", "all-to-all"):
            check = f"{operation} of pairs, {kind}"
            own = [s for s in speeds if (s.kind, s.operation) == (kind, operation)]
            if not own:
                rows.append(Row(check, "skipped", "", "no such pair was measured"))
                continue
            middle = statistics.median(s.speed for s in own)
            slow = slow_pairs(own)
            text = f"median of {len(own)} pair(s), {_range(own)}"
            if slow:
                worst = sorted(slow, key=lambda s: s.speed)
                named = "; ".join(
                    f"{ranks.name(s.ranks)} {s.speed / 1e9:.3g} GB/s" for s in worst[:5]
                )
                more = f" and {len(worst) - 5} more" if len(worst) > 5 else ""
                text = f"slow, below half of the median: {named}{more}"
            rows.append(
                Row(check, "WARN" if slow else "ok", f"{middle / 1e9:.3g} GB/s", text),
            )
    return rows


def _range(speeds: Sequence[PairSpeed]) -> str:
    if len(speeds) == 1:
        return "nothing to compare it with"
    values = [own.speed / 1e9 for own in speeds]
    return f"{min(values):.3g} to {max(values):.3g}"
