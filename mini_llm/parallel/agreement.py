"""Ranks that would train different things stop at once."""

from collections.abc import Mapping

from accelerate.utils import gather_object


def check_ranks_agree(facts: Mapping[str, str]) -> None:
    """Raise RuntimeError naming what differs, and between which ranks; a collective.

    ``facts`` maps a name in words ("--data") to a value that must be the same on all ranks.
    """
    of_ranks = gather_object([dict(facts)])
    for name, value in of_ranks[0].items():
        for rank, other in enumerate(of_ranks):
            if other.get(name) != value:
                raise RuntimeError(
                    f"ranks 0 and {rank} differ in {name}: {value} and {other.get(name)}; give all "
                    "of them the same and start again"
                )
