"""What raw sources hold besides what can be trained on: counted over all ranks, told at the end."""

from collections import Counter
from collections.abc import Mapping

from accelerate.utils import gather_object

from mini_llm.data.stream import RowStream


def rejected_rows(stream: RowStream) -> dict[str, Counter[str]]:
    """Rows and lines of each raw source left out since step 0, by reason, over all ranks.

    A collective where there is a raw source; empty where there is none.
    """
    own = stream.rejected_per_source
    total: dict[str, Counter[str]] = {name: Counter() for name in own}
    for of_rank in gather_object([own]) if own else []:
        for name, reasons in of_rank.items():
            total[name].update(reasons)
    return total


def describe_rejected(rejected: Mapping[str, Counter[str]]) -> list[str]:
    """One line for each source that had any: how many, and how many for each reason."""
    return [
        f"{name}: {reasons.total():,} rows or lines were nothing to train on and were left out "
        f"({', '.join(f'{count:,} {reason}' for reason, count in sorted(reasons.items()))})"
        for name, reasons in rejected.items()
        if reasons
    ]
