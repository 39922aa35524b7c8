"""Ranks that would train different things stop at once."""

import os
from collections.abc import Mapping

from accelerate.utils import gather_object

from .hang_report import ranks_in_words

LONGEST = 80  # characters of a value that a sentence can bear


def check_ranks_agree(facts: Mapping[str, str]) -> list[str]:
    """Raise RuntimeError naming what differs, and between which ranks; a collective.

    ``facts`` maps a name in words ("--data") to a value that must be the same on all ranks.
    Returns the ranks' hosts.
    """
    of_ranks = gather_object([(os.uname().nodename, dict(facts))])
    hosts = [host for host, _ in of_ranks]
    differences = find_differences(hosts, [facts for _, facts in of_ranks])
    if differences:
        raise RuntimeError(
            f"the ranks differ in {'; in '.join(differences)}; give all of them the same and start "
            "again"
        )
    return hosts


def find_differences(hosts: list[str], of_ranks: list[dict[str, str]]) -> list[str]:
    """What is not the same on all ranks: name, then each value with the ranks that have it."""
    names = list(dict.fromkeys(name for facts in of_ranks for name in facts))
    differences = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(of_ranks):
            ranks.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = _around_difference(list(ranks))
            parts = (
                f"{value} on {ranks_with_hosts(having, hosts)}"
                for value, having in zip(values, ranks.values(), strict=True)
            )
            differences.append(f"{name} ({', '.join(parts)})")
    return differences


def ranks_with_hosts(ranks: list[int], hosts: list[str]) -> str:
    """``rank 0 (host a)``, or ``ranks 0-3 (hosts a, b)``."""
    names = dict.fromkeys(hosts[rank] for rank in ranks)
    return f"{ranks_in_words(ranks)} (host{'s' * (len(names) > 1)} {', '.join(names)})"


def _around_difference(values: list[str]) -> list[str]:
    """Long values cut to where they differ."""
    if max(map(len, values)) <= LONGEST:
        return values
    letters = enumerate(zip(*values, strict=False))
    first = next((i for i, of_each in letters if len(set(of_each)) > 1), min(map(len, values)))
    begin = max(first - LONGEST // 2, 0)
    return [f"{'…' * (begin > 0)}{value[begin : begin + LONGEST]}…" for value in values]
